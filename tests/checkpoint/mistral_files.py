"""What the tests of Mistral Small 4's formats share: files read and rewritten by the format's own library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight
from kernels.quant import dequantise_fp8, dequantise_nvfp4

Changes = Mapping[str, Tensor | None]


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every file, as stored."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def rewrite(directory: Path, changes: Changes) -> Path:
    """Replace, add or (None) remove tensors of a checkpoint in a single file."""
    [file] = directory.glob("*.safetensors")
    tensors: dict[str, Tensor | None] = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    return directory


def edit_json(file: Path, changes: Mapping[str, Any]) -> None:
    """Merge into a JSON file; inner objects are merged too, None removes a key."""

    def merge(raw: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        for key, value in changes.items():
            if value is None:
                raw.pop(key, None)
            elif isinstance(value, dict) and isinstance(raw.get(key), dict):
                merge(raw[key], value)
            else:
                raw[key] = value
        return raw

    file.write_text(json.dumps(merge(json.loads(file.read_text()), changes)))


def wide(weight: Weight) -> Tensor:
    """The numbers a weight stands for, float32."""
    if isinstance(weight, Fp8Weight):
        return dequantise_fp8(weight.codes, weight.scale, torch.float32)
    if isinstance(weight, Nvfp4Weight):
        return dequantise_nvfp4(weight.codes, weight.block_scales, weight.divisor, torch.float32)
    return weight.float()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
