"""Checkpoints: from a path or a hub name to a config, a tokenizer and finite, fully checked tensors.

``open_model`` looks at what the argument is and hands over to a format:

    a .gguf file                       gguf.py         Llama; quantised or not; tokenizer and template inside
    params.json, consolidated*         native.py       Mistral Small 4 in Mistral's own format
    config.json of mistral3, mistral4  mistral_hf.py   the same model in Hugging Face's format
    any other config.json              hf.py           Llama; safetensors, one file or shards
    org/name                           hub.py          fetched from the Hugging Face hub, then a directory

Where a directory has Mistral's two formats the first is read: it is the one that was not rounded again.
``base.py`` holds what Llama formats share; ``plan.py`` and ``stream.py`` what those of Mistral Small 4 do.
``dummy.py`` is for models without weights, from their configuration alone.
"""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.base import Checkpoint, MistralCheckpoint, Progress, expected_tensors
from engine.checkpoint.hub import local_directory, wants_native
from engine.config import LlamaConfig
from engine.errors import CheckpointError
from engine.text.tokenizer import read_json

__all__ = ["Checkpoint", "MistralCheckpoint", "Progress", "expected_tensors", "open_checkpoint", "open_model"]


def open_model(path: str | Path) -> Checkpoint | MistralCheckpoint:
    """Read the config of a model, and the headers of its weights. Weights are read by ``load``.

    path: a .gguf file, a directory with config.json or params.json, or ``org/name`` on the hub
    (HF_HUB_OFFLINE=1: from its cache). Raises CheckpointError for anything else, ConfigError for a config
    value that we do not implement.
    """
    local, name = local_directory(path)
    if local.is_dir():
        return _open_directory(local, name)
    if local.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{local}: found a file named *{local.suffix or local.name}, expected a .gguf file or a "
            "directory with config.json"
        )
    from engine.checkpoint.gguf import GgufCheckpoint  # here, because importing gguf takes most of a second

    return GgufCheckpoint(local)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """``open_model`` for those who take Llama models only. Raises CheckpointError for any other."""
    checkpoint = open_model(path)
    if isinstance(checkpoint.config, LlamaConfig):
        return checkpoint
    raise CheckpointError(f"{checkpoint.path}: found a Mistral Small 4 model, expected a Llama model here")


def _open_directory(directory: Path, name: str) -> Checkpoint | MistralCheckpoint:
    from engine.checkpoint.hf import HfCheckpoint
    from engine.checkpoint.mistral_hf import MODEL_TYPES, MistralHfCheckpoint
    from engine.checkpoint.native import NativeCheckpoint, is_native

    has_config = (directory / "config.json").is_file()
    if is_native(directory) or (wants_native(directory) and not has_config):
        return NativeCheckpoint(directory, name)
    if not has_config:
        found = sorted(entry.name for entry in directory.iterdir())[:8]
        raise CheckpointError(
            f"{directory}: no config.json in this directory, found {', '.join(found) or 'nothing'}"
        )
    if read_json(directory / "config.json").get("model_type") in MODEL_TYPES:
        return MistralHfCheckpoint(directory, name)
    return HfCheckpoint(directory, name)
