"""Checkpoints: from a path or a hub name to a config, a tokenizer and finite, fully checked tensors.

``open_checkpoint`` looks at what the argument is and hands over to a format:

    a .gguf file                    checkpoint/gguf.py   quantised or not; tokenizer and chat template inside
    a directory with config.json    checkpoint/hf.py     safetensors, one file or shards
    org/name                        downloaded from the Hugging Face hub, then a directory

``base.py`` holds the table of expected tensors and the checks that both share.
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.checkpoint.base import Checkpoint, Progress, expected_tensors
from engine.errors import CheckpointError

__all__ = ["Checkpoint", "Progress", "expected_tensors", "open_checkpoint"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the config of a model. Weights are read by ``load``.

    path: a .gguf file, a directory with config.json, or ``org/name`` on the hub (HF_HUB_OFFLINE=1: from its
    cache). Raises CheckpointError for anything else, ConfigError for a config value that we do not implement.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if not _HUB_ID.fullmatch(str(path)):
            raise CheckpointError(f"{path}: no such file or directory, and not a hub name like 'org/name'")
        return _open_directory(_download(str(path)), name=str(path))
    if local.is_dir():
        return _open_directory(local, name=local.resolve().name)
    if local.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{local}: found a file named *{local.suffix or local.name}, expected a .gguf file or a "
            "directory with config.json"
        )
    from engine.checkpoint.gguf import GgufCheckpoint  # here, because importing gguf takes most of a second

    return GgufCheckpoint(local)


def _open_directory(directory: Path, name: str) -> Checkpoint:
    from engine.checkpoint.hf import HfCheckpoint

    if not (directory / "config.json").is_file():
        found = sorted(entry.name for entry in directory.iterdir())[:8]
        raise CheckpointError(
            f"{directory}: no config.json in this directory, found {', '.join(found) or 'nothing'}"
        )
    return HfCheckpoint(directory, name)


def _download(hub_id: str) -> Path:
    """Fetch a hub repository; all files come from the one commit that ``main`` names now."""
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RevisionResolutionError,
    )

    network_error: type = HfHubHTTPError.__bases__[0]  # of the HTTP library underneath, whose name changes
    assert issubclass(network_error, Exception)

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except (OSError, network_error, EntryNotFoundError, HFValidationError, RevisionResolutionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{hub_id}: no such local path, and the hub did not deliver it: {reason[0]}"
        ) from error
