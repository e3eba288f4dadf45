"""Checkpoints of a training run: one safetensors file, nothing executable.

Tensors are the head's (``head.*``) and AdamW's two moments (``exp_avg.*``, ``exp_avg_sq.*``); everything else
of the state is a JSON object in the file's metadata, so that both are replaced in one move and always belong
together.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import CheckpointError, ConfigError


@dataclass(slots=True)
class Progress:
    """Where a run is. Batches are counted within the epoch; seconds leave interruptions out."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(
    path: Path,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Write a checkpoint, replacing the one before."""
    tensors: dict[str, Tensor] = {f"head.{name}": value for name, value in head.state_dict().items()}
    for name, parameter in head.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(host, str(part), {"state": json.dumps({"progress": asdict(progress), "settings": settings})})
    os.replace(part, path)


def load_state(
    path: Path, head: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Progress:
    """Continue from a checkpoint. ConfigError where it was made with other settings, CheckpointError if it is
    broken.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            raw = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        progress = Progress(**raw["progress"])
        found = raw["settings"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a training checkpoint: {error!r}") from error
    for key, expected in json.loads(json.dumps(settings)).items():
        if found.get(key) != expected:
            raise ConfigError(
                f"{path}: made with {key} = {found.get(key)!r}, this run has {expected!r}; "
                "give another --run-dir, or the same options"
            )
    head.load_state_dict(
        {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    )
    for name, parameter in head.named_parameters():
        if f"exp_avg.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(progress.step)),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return progress
