"""From what a user names as a model to a directory: a local one, or a repository of the Hugging Face hub.

All files of a repository come from one commit. Small files are fetched first and say in which format the
weights are wanted, because Mistral's repositories hold the same weights in two: fetching both would be twice
120 GB. HF_HUB_OFFLINE=1 makes the hub's cache answer instead of the network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from engine.errors import CheckpointError
from engine.text.tokenizer import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "params.json",
    "model.safetensors.index.json",
    "consolidated.safetensors.index.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_INDEX = "{}.safetensors.index.json"


def local_directory(path: str | Path, weights: bool = True) -> tuple[Path, str]:
    """(what there is on disk, what to call it) for a path or an ``org/name`` on the hub.

    The path may turn out to be a file. weights: whether those are wanted of a repository, or small files
    only. Raises CheckpointError for what is neither here nor on the hub.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local, local.resolve().name
    if not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path}: no such file or directory, and not a hub name like 'org/name'")
    return _download(str(path)) if weights else _snapshot(str(path), _SMALL_FILES), str(path)


def wants_native(directory: Path) -> bool:
    """Whether params.json describes a model with latent attention, or is the only description there is.

    Older Mistral models come in both formats too, and are Llama models in the other.
    """
    if not (directory / "params.json").is_file():
        return False
    return not (directory / "config.json").is_file() or "kv_lora_rank" in read_json(directory / "params.json")


def _download(hub_id: str) -> Path:
    """Fetch a repository at the commit that ``main`` names now, weights in one format only."""
    directory = _snapshot(hub_id, _SMALL_FILES)
    stem = "consolidated" if wants_native(directory) else "model"
    if not _is_complete(directory, stem):
        directory = _snapshot(hub_id, (f"{stem}*.safetensors",), revision=directory.name)
    return directory


def _is_complete(directory: Path, stem: str) -> bool:
    """Whether the snapshot of this commit holds the weights already."""
    index = directory / _INDEX.format(stem)
    if not index.is_file():
        return (directory / f"{stem}.safetensors").is_file()
    weight_map = read_json(index).get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return bool(files) and all(isinstance(file, str) and (directory / file).is_file() for file in files)


def _snapshot(hub_id: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
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
        if revision is None:
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns))
        )
    except (OSError, network_error, EntryNotFoundError, HFValidationError, RevisionResolutionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{hub_id}: no such local path, and the hub did not deliver it: {reason[0]}"
        ) from error
