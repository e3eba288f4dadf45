"""Synthetic checkpoints of Mistral Small 4 and its Eagle head: true names, shapes and types, random numbers.

The published weights are large; what has to be exact to read them is how they are written down. This module
writes that for a config of any size, in each layout of ``checkpoint/synthetic_tables.py``. ``write_target``
and ``write_head`` fill the tables: one seed means one model, so layouts can be compared. ``write_headers``
writes files that have a header and a length, and holes for data.

Scales lie in the last shard, apart from their matrices, as published files are free to do.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.mistral_tables import VisionShape
from engine.checkpoint.synthetic_config import config_json, params_json
from engine.checkpoint.synthetic_tables import (
    Layout,
    Module,
    Table,
    TensorSpec,
    head_table,
    hf_name,
    hf_stack,
    module_groups,
    target_table,
    vision_table,
)
from engine.config import Mistral4Config
from engine.errors import ConfigError
from kernels.quant import dequantise_fp8, quantise_fp8, quantise_nvfp4

_FP8_MAX: Final = 448.0
_SCALES: Final = ("qscale_weight", "qscale_act", "_global_scale", "_scale_inv", "activation_scale")
_DTYPE_NAMES: Final = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}

# --- numbers


def _master(module: Module, seed: int) -> Tensor:
    """The module's weight before it is stored, float32: unit spread in, about unit spread out."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {module.name}".encode()))
    noise = torch.randn(module.shape, generator=generator)
    if module.role == "norm":
        return noise.mul_(0.1).add_(1.0)
    return noise if module.name == "tok_embeddings" else noise.div_(module.shape[-1] ** 0.5)


def _encode(module: Module, layout: Layout, seed: int) -> dict[str, Tensor]:
    """The stored tensors of a module under their native names."""
    master, name = _master(module, seed), module.name
    if layout.endswith("fp8") and module.role in ("linear", "expert"):
        codes, scale = quantise_fp8(master)
        return {
            f"{name}.weight": codes,
            f"{name}.qscale_weight": scale.bfloat16(),
            f"{name}.qscale_act": _input_scale(module, seed).bfloat16(),
        }
    if layout == "native-nvfp4" and module.role == "expert":
        packed, block_scales, divisor = quantise_nvfp4(master)
        input_divisor = (1 / _input_scale(module, seed)).reshape(1)
        shared = ".shared_experts." in name
        return {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": block_scales,
            f"{name}.weight_global_scale": divisor.reshape(1),
            f"{name}.input_global_scale": input_divisor.bfloat16() if shared else input_divisor,
        }
    return {f"{name}.weight": master.bfloat16()}


def _input_scale(module: Module, seed: int) -> Tensor:
    """[] float32: a calibrated static scale of inputs of unit spread."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {module.name} input".encode()))
    return (4.0 + 4.0 * torch.rand((), generator=generator)) / _FP8_MAX


def _encode_group(group: list[Module], layout: Layout, seed: int) -> Iterator[tuple[str, Tensor]]:
    if not layout.startswith("hf"):
        for module in group:
            yield from _encode(module, layout, seed).items()
    elif len(group) == 1:
        for name, tensor in _encode(group[0], layout, seed).items():
            yield hf_name(name), tensor
    else:
        yield from _fuse(group, layout, seed)


def _fuse(group: list[Module], layout: Layout, seed: int) -> Iterator[tuple[str, Tensor]]:
    """All routed experts of a layer as Hugging Face's converter stores them: gate and up get the larger of
    their scales and are rounded again.
    """
    stack, parts = hf_stack(group), {".w1": group[0::3], ".w2": group[1::3], ".w3": group[2::3]}
    stored: dict[str, dict[str, Tensor]] = {}
    for part, modules in parts.items():
        encoded = [_encode(module, layout, seed) for module in modules]
        suffixes = [name.removeprefix(modules[0].name) for name in encoded[0]]
        stored[part] = {
            suffix: torch.stack(
                [one[module.name + suffix] for module, one in zip(modules, encoded, strict=True)]
            )
            for suffix in suffixes
        }
    gate, up, down = stored[".w1"], stored[".w3"], stored[".w2"]
    if layout == "hf-bf16":
        yield f"{stack}.gate_up_proj", torch.cat((gate[".weight"], up[".weight"]), dim=1)
        yield f"{stack}.down_proj", down[".weight"]
        return
    scale = torch.maximum(gate[".qscale_weight"], up[".qscale_weight"])
    yield f"{stack}.gate_up_proj", torch.cat([_rescale(half, scale) for half in (gate, up)], dim=1)
    yield f"{stack}.gate_up_proj_scale_inv", scale[:, None, None]
    yield f"{stack}.gate_up_proj_activation_scale", torch.maximum(gate[".qscale_act"], up[".qscale_act"])
    yield f"{stack}.down_proj", down[".weight"]
    yield f"{stack}.down_proj_scale_inv", down[".qscale_weight"][:, None, None]
    yield f"{stack}.down_proj_activation_scale", down[".qscale_act"]


def _rescale(stored: dict[str, Tensor], scale: Tensor) -> Tensor:
    """Codes [E, out, in] for another scale [E]."""
    wide = dequantise_fp8(stored[".weight"], stored[".qscale_weight"].float(), torch.float32)
    wide /= scale.float()[:, None, None]
    return wide.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)


# --- files


def write_target(
    directory: Path,
    config: Mistral4Config,
    layout: Layout,
    *,
    seed: int = 0,
    vision: VisionShape | None = None,
    num_shards: int = 1,
) -> Path:
    """A target's directory: config and weights, no tokenizer. Needs memory for about one shard.

    Raises ConfigError for a layout that the config's sizes do not allow.
    """
    if layout == "native-nvfp4" and (config.hidden_size % 16 or config.moe_intermediate_size % 16):
        raise ConfigError(
            f"hidden_size is {config.hidden_size} and moe_intermediate_size {config.moe_intermediate_size}, "
            "expected multiples of 16 for NVFP4"
        )
    images = ((name, torch.full(spec.shape, 0.01).bfloat16()) for name, spec in vision_table(vision, layout))
    tensors = itertools.chain(_numbers(config, layout, seed), images)
    _write_config(directory, config, layout, vision)
    _write_shards(directory, layout, target_table(config, layout, vision), tensors, num_shards)
    return directory


def write_head(
    directory: Path, config: Mistral4Config, layout: Layout = "native-fp8", *, seed: int = 0
) -> Path:
    """An Eagle head's directory: params.json and one consolidated.safetensors. config: without experts."""
    table = head_table(config, layout)
    _write_config(directory, config, layout, None)
    _write_shards(directory, layout, table, _numbers(config, layout, seed), 1)
    return directory


def write_headers(
    directory: Path,
    config: Mistral4Config,
    layout: Layout,
    *,
    vision: VisionShape | None = None,
    num_shards: int = 1,
) -> Path:
    """What ``write_target`` writes, or for a config without experts ``write_head``, but with holes for data:
    files of their full length that take up no space and read as zeros.
    """
    table = target_table(config, layout, vision) if config.num_experts else head_table(config, layout)
    _write_config(directory, config, layout, vision)
    shards = _shards(layout, table, num_shards)
    for file, names in shards.items():
        entries, end = {}, 0
        for name in names:
            spec, start = table[name], end
            end += spec.num_bytes
            entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with (directory / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(header)) + header)
            opened.truncate(opened.tell() + end)
    _write_index(directory, layout, table, shards)
    return directory


def _numbers(config: Mistral4Config, layout: Layout, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the text model in the order of its table."""
    for group in module_groups(config):
        yield from _encode_group(group, layout, seed)


def _stem(layout: Layout) -> str:
    return "model" if layout.startswith("hf") else "consolidated"


def _write_config(
    directory: Path, config: Mistral4Config, layout: Layout, vision: VisionShape | None
) -> None:
    quantised = layout.partition("-")[2]
    write, name = (config_json, "config.json") if layout.startswith("hf") else (params_json, "params.json")
    raw = write(config, None if quantised == "bf16" else quantised, vision)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(raw, indent=2) + "\n")


def _shards(layout: Layout, table: Table, num_shards: int) -> dict[str, list[str]]:
    """File name -> tensors in it: data in the table's order in equal parts, all scales in the last file."""
    stem = _stem(layout)
    files = [f"{stem}-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]
    shards: dict[str, list[str]] = (
        {file: [] for file in files} if num_shards > 1 else {f"{stem}.safetensors": []}
    )
    parts = list(shards.values())
    total, done = sum(spec.num_bytes for spec in table.values()), 0
    for name, spec in table.items():
        part = num_shards - 1 if name.endswith(_SCALES) else done * num_shards // total
        parts[part].append(name)
        done += spec.num_bytes
    return shards


def _write_shards(
    directory: Path, layout: Layout, table: Table, tensors: Iterator[tuple[str, Tensor]], num_shards: int
) -> None:
    """Write each shard as soon as its last tensor is made. Scales wait for the last shard."""
    shards = _shards(layout, table, num_shards)
    waiting: dict[str, Tensor] = {}
    for file, names in shards.items():
        while not all(name in waiting for name in names):
            name, tensor = next(tensors)
            spec = TensorSpec(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            assert spec == table[name], (name, spec, table[name])
            waiting[name] = tensor.contiguous()
        save_file({name: waiting.pop(name) for name in names}, directory / file)
    assert not waiting, sorted(waiting)[:3]
    assert next(tensors, None) is None
    _write_index(directory, layout, table, shards)


def _write_index(directory: Path, layout: Layout, table: Table, shards: Mapping[str, list[str]]) -> None:
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in table.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (directory / f"{_stem(layout)}.safetensors.index.json").write_text(json.dumps(index))
