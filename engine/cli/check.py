"""``haast check MODEL``: what a model is, how large, which GPUs hold it, and how fast they could be at most.

Configs and headers of the weight files are read, never the weights, so 120 GB take about a second and no
GPU. What is said rests on assumptions, and they are said too:

- 90 % of a GPU's memory can be used, of which 2 GB are kept for CUDA, activations and the few matrices that
  are held wider than they are stored.
- Weights are held as stored, and in bfloat16 where they are not quantised. The KV cache is bfloat16, or for
  the target e4m3 with ``--kv-cache-dtype fp8``.
- On several GPUs weights are split evenly; latent KV rows are whole on each of them, KV heads are split.
  haast runs on one GPU today.
- The floor of a step is what its reads take at all of the memory's bandwidth; see ``cli/roofline.py``.

Tables on stdout, or with ``--json`` one JSON object. A checkpoint that cannot be served is the reader's
error.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from typing import Final

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from draft.load import HeadCheckpoint
from draft.mistral_eagle import copied_output_bytes
from engine.build import DEFAULT_HEAD, DEFAULT_MODEL, default_model_path, open_head
from engine.checkpoint import Checkpoint, MistralCheckpoint, open_model
from engine.checkpoint.native import MistralHead, NativeCheckpoint
from engine.cli.footprint import (
    EMBEDDINGS,
    SCALES,
    Footprint,
    Group,
    head_footprint,
    kv_token_bytes,
    target_footprint,
)
from engine.cli.options import GPU_MEMORY_UTILIZATION, KV_DTYPES
from engine.cli.roofline import GPUS, Gpu, floor_seconds, step_bytes
from engine.config import EngineConfig, LlamaConfig, Mistral4Config
from engine.errors import CheckpointError, ConfigError
from engine.memory import GPU_RESERVE

NUM_GPUS: Final = (1, 2, 4, 8)
NUM_TOKENS: Final = (1, 2, 4, 8)
CONTEXT: Final = 1024  # cached tokens of a step whose floor is given
_LAUNCH_LEN: Final = 32768  # the most that the launch line asks for by itself
_DTYPE: Final = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Part:
    """A target or a head."""

    name: str
    architecture: str
    format: str
    num_layers: int
    num_experts: int
    num_experts_per_token: int
    hidden_size: int
    vocab_size: int
    context: int
    parameters: int
    stored_bytes: int
    memory_bytes: int
    kv_bytes_per_token: int
    elements: dict[str, int]
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether so many GPUs hold the pair."""

    num_gpus: int
    fits: bool
    kv_tokens: int  # 0 if the weights do not fit
    served: bool  # by haast today


@dataclass(frozen=True, slots=True)
class OnGpu:
    """One kind of GPU.

    floor_ms: of a target's step by number of tokens; draft_floor_ms: of a drafted level.
    """

    gpu: Gpu
    fits: tuple[Fit, ...]
    floor_ms: dict[int, float]
    draft_floor_ms: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What ``--json`` prints."""

    target: Part
    head: Part | None
    output_rows_bytes: int  # the head's own copy of a part of the output matrix
    tokens_needed: int  # of KV, to call it a fit
    usable_share: float
    reserve_bytes: int
    floor_context: int
    gpus: tuple[OnGpu, ...]
    launch: str | None
    launch_gpu: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast check``."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a GGUF file, a directory or a hub name; without it, the default pair",
    )
    parser.add_argument(
        "--spec-model", metavar="HEAD", help="directory of a draft head, or 'ngram' or 'none'"
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help=f"longest prompt plus answer that must fit (default {EngineConfig().max_model_len})",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=tuple(KV_DTYPES),
        default="auto",
        help="of the model's KV rows, as haast serve takes it",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Read, count, print. Raises ConfigError or CheckpointError."""
    report = check(args.model, args.spec_model, args.max_model_len, args.kv_cache_dtype)
    if args.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        show(report, Console(highlight=False, markup=False))
    return 0


def check(
    model: str | None, head: str | None = None, max_model_len: int | None = None, kv_cache_dtype: str = "auto"
) -> Report:
    """The report on a target and its draft head, from their headers.

    model, head: as ``engine.build.build`` takes them. max_model_len: what must fit; ``haast serve``'s default
    if None. kv_cache_dtype: as its flag. Raises CheckpointError for files, ConfigError for values.
    """
    kv_dtype = KV_DTYPES[kv_cache_dtype] or _DTYPE
    checkpoint = open_model(default_model_path() if model is None else model)
    spoken = head
    if head is None and model is None:
        head = str(DEFAULT_HEAD)
    draft = None if head in (None, "none", "ngram") else open_head(head)
    needed = _tokens_needed(checkpoint, max_model_len)
    target = target_footprint(checkpoint)
    part = _target_part(checkpoint, target, DEFAULT_MODEL if model is None else checkpoint.name, kv_dtype)
    pools = [(checkpoint.config, kv_dtype)]
    head_part, row_bytes, copied, draft_bytes = None, 0, 0, None
    if draft is not None:
        _check_pair(draft, checkpoint.config)
        footprint = head_footprint(draft)
        head_part = _head_part(draft, footprint)
        row_bytes, copied = _output_rows(draft, footprint, checkpoint.config)
        pools.append((draft.config, _DTYPE))
        reads = footprint.reads(draft.config, head_part.kv_bytes_per_token)
        draft_bytes = step_bytes(reads, 1, context=CONTEXT) + row_bytes
    weights = part.memory_bytes + copied + (0 if head_part is None else head_part.memory_bytes)
    reads = target.reads(checkpoint.config, part.kv_bytes_per_token)
    gpus = tuple(
        OnGpu(
            gpu,
            tuple(_fit(gpu, num_gpus, weights, pools, needed) for num_gpus in NUM_GPUS),
            {n: 1e3 * floor_seconds(step_bytes(reads, n, context=CONTEXT), gpu) for n in NUM_TOKENS},
            None if draft_bytes is None else 1e3 * floor_seconds(draft_bytes, gpu),
        )
        for gpu in GPUS
    )
    smallest = min((on for on in gpus if on.fits[0].fits), key=lambda on: on.gpu.memory_bytes, default=None)
    launch = None
    if smallest is not None:
        kv_bytes = sum(kv_token_bytes(config, 1, dtype) for config, dtype in pools)
        length = max_model_len or _launch_len(smallest.fits[0].kv_tokens, part.context)
        launch = _launch_line(model, spoken, length, kv_bytes, smallest.fits[0].kv_tokens, kv_cache_dtype)
    return Report(
        part, head_part, copied, needed, GPU_MEMORY_UTILIZATION, GPU_RESERVE, CONTEXT, gpus,
        launch, None if smallest is None else smallest.gpu.name,
    )  # fmt: skip


def _tokens_needed(checkpoint: Checkpoint | MistralCheckpoint, max_model_len: int | None) -> int:
    context = checkpoint.config.max_position_embeddings
    if max_model_len is None:
        return min(EngineConfig().max_model_len, context)
    if not 1 <= max_model_len <= context:
        raise ConfigError(
            f"--max-model-len is {max_model_len}, expected 1 to the {context} positions that "
            f"{checkpoint.name} was made for"
        )
    return max_model_len


def _check_pair(head: HeadCheckpoint | MistralHead, target: LlamaConfig | Mistral4Config) -> None:
    """CheckpointError unless the head fits the target, as ``engine.build`` would say after loading."""
    if isinstance(head, MistralHead) and not isinstance(target, Mistral4Config):
        raise CheckpointError(f"head {head.path}: made for Mistral Small 4, found a Llama target")
    for key in ("hidden_size", "vocab_size") if isinstance(head, MistralHead) else ("hidden_size",):
        found, expected = getattr(head.config, key), getattr(target, key)
        if found != expected:
            raise CheckpointError(f"head {head.path}: its {key} is {found}, the target's {expected}")


def _target_part(
    checkpoint: Checkpoint | MistralCheckpoint, footprint: Footprint, name: str, kv_dtype: torch.dtype
) -> Part:
    if isinstance(checkpoint.config, Mistral4Config):
        native = isinstance(checkpoint, NativeCheckpoint)
        form = "Mistral's, params.json" if native else "Hugging Face's, config.json"
        return _part(name, "Mistral Small 4", form, checkpoint.config, footprint, kv_dtype)
    form = "GGUF" if checkpoint.path.is_file() else "Hugging Face's, config.json"
    return _part(name, "Llama", form, checkpoint.config, footprint, kv_dtype)


def _head_part(head: HeadCheckpoint | MistralHead, footprint: Footprint) -> Part:
    if isinstance(head, MistralHead):
        form = "Mistral's, params.json"
        return _part(head.path.name, "Eagle head of Mistral Small 4", form, head.config, footprint)
    kind = "EAGLE-3 head" if head.kind == "eagle3" else "EAGLE head"
    return _part(head.path.name, kind, "safetensors with config.json", head.config, footprint)


def _part(
    name: str,
    architecture: str,
    form: str,
    config: LlamaConfig | Mistral4Config,
    footprint: Footprint,
    kv_dtype: torch.dtype = _DTYPE,
) -> Part:
    moe = config if isinstance(config, Mistral4Config) else None
    return Part(
        name=name,
        architecture=architecture,
        format=form,
        num_layers=config.num_layers,
        num_experts=0 if moe is None else moe.num_experts,
        num_experts_per_token=0 if moe is None else moe.num_experts_per_tok,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=footprint.parameters,
        stored_bytes=footprint.stored_bytes,
        memory_bytes=footprint.memory_bytes,
        kv_bytes_per_token=kv_token_bytes(config, 1, kv_dtype),
        elements=dict(footprint.elements),
        groups=footprint.groups,
    )


def _output_rows(
    head: HeadCheckpoint | MistralHead, footprint: Footprint, target: LlamaConfig | Mistral4Config
) -> tuple[int, int]:
    """Bytes of the target's output rows that a drafted level reads, and of those that the head copies."""
    row = target.hidden_size * _DTYPE.itemsize
    if isinstance(head, MistralHead):
        num_rows = min(EngineConfig().draft_vocab_size or target.vocab_size, target.vocab_size)
        if num_rows == target.vocab_size:
            return num_rows * row, 0
        copied = copied_output_bytes(num_rows, target.hidden_size, _DTYPE, fp8=True)
        return copied, copied
    if head.kind == "eagle":
        return target.vocab_size * row, 0
    if any(group.name == EMBEDDINGS for group in footprint.groups):
        return 0, 0  # its own, counted with its weights
    return head.draft_vocab_size * row, head.draft_vocab_size * row


def _fit(
    gpu: Gpu,
    num_gpus: int,
    weights: int,
    pools: list[tuple[LlamaConfig | Mistral4Config, torch.dtype]],
    needed: int,
) -> Fit:
    kv_bytes = sum(kv_token_bytes(config, num_gpus, dtype) for config, dtype in pools)
    left = int(gpu.memory_bytes * GPU_MEMORY_UTILIZATION) - GPU_RESERVE - -(-weights // num_gpus)
    page_size = EngineConfig().page_size
    num_pages = max(left, 0) // (kv_bytes * page_size)
    tokens = max(num_pages - 1, 0) * page_size  # one page is for what belongs to nobody
    return Fit(num_gpus, tokens >= needed, tokens, served=num_gpus == 1)


def _launch_len(kv_tokens: int, context: int) -> int:
    length = min(kv_tokens, context, _LAUNCH_LEN)
    return length // 1024 * 1024 or length


def _launch_line(
    model: str | None, head: str | None, length: int, kv_bytes: int, kv_tokens: int, kv_cache_dtype: str
) -> str:
    """haast serve with the KV memory of all requests that run at once, or as much as there is."""
    default = EngineConfig()
    page_size = default.page_size
    a_sequence = -(-(length + 64) // page_size) + 1  # 64: the largest tree
    num_pages = min(default.max_num_seqs * a_sequence, kv_tokens // page_size) + 1
    words = ["haast", "serve", *([] if model is None else [model])]
    words += [] if head is None else ["--spec-model", head]
    words += ["--max-model-len", str(length)]
    words += [] if kv_cache_dtype == "auto" else ["--kv-cache-dtype", kv_cache_dtype]
    words += ["--kv-cache-memory", str(num_pages * page_size * kv_bytes)]
    return shlex.join(words)


def show(report: Report, console: Console) -> None:
    """Print the report as tables."""
    for part in (report.target, report.head):
        if part is not None:
            _show_part(part, console)
    kv_bytes = report.target.kv_bytes_per_token
    line = f"KV cache: {kv_bytes:,} bytes a token"
    if report.head is not None:
        line += f", and {report.head.kv_bytes_per_token:,} for the head"
    console.print(line + "\n", soft_wrap=True)
    _show_fits(report, console)
    _show_floors(report, console)
    if report.launch is None:
        console.print("None of these GPUs holds it alone, and haast serves on one GPU today.")
    else:
        console.print(f"On one {report.launch_gpu}:\n  {report.launch}", soft_wrap=True)


def _show_part(part: Part, console: Console) -> None:
    layers = "1 layer" if part.num_layers == 1 else f"{part.num_layers} layers"
    facts = [layers, f"width {part.hidden_size:,}"]
    if part.num_experts:
        facts.append(f"{part.num_experts} experts a layer, {part.num_experts_per_token} a token")
    facts += [f"vocabulary {part.vocab_size:,}", f"context {part.context:,}"]
    console.print(f"{part.name}: {part.architecture} ({part.format})", soft_wrap=True)
    console.print("  " + ", ".join(facts), soft_wrap=True)
    table = Table("group", "stored as")
    for title in ("parameters", "in files", "in memory"):
        table.add_column(title, justify="right")
    for group in part.groups:
        numbers = f"({group.parameters:,})" if group.name == SCALES else f"{group.parameters:,}"
        types = ", ".join(group.stored_as)
        in_files, in_memory = _size(group.stored_bytes), _size(group.memory_bytes)
        table.add_row(group.name, types, numbers, in_files, in_memory)
    table.add_section()
    table.add_row("total", "", f"{part.parameters:,}", _size(part.stored_bytes), _size(part.memory_bytes))
    console.print(table)


def _show_fits(report: Report, console: Console) -> None:
    table = Table("tokens of KV on", *(f"{n}" + "*" * (n > 1) for n in NUM_GPUS))
    for on in report.gpus:
        cells = (f"{fit.kv_tokens:,}" if fit.fits else "-" for fit in on.fits)
        table.add_row(on.gpu.name, *cells)
    console.print(table)
    console.print(
        f"of {report.usable_share:.0%} of the memory, less {_size(report.reserve_bytes)} for CUDA and "
        f"activations, less the weights;\n- fewer than {report.tokens_needed:,} tokens. * Several GPUs are "
        "not served yet: weights split\nevenly, latent KV rows whole on every GPU, KV heads split.\n"
    )


def _show_floors(report: Report, console: Console) -> None:
    table = Table("ms a step", "GB/s", *(f"{n} token" + "s" * (n > 1) for n in NUM_TOKENS))
    if report.head is not None:
        table.add_column("draft")
    for on in report.gpus:
        cells = [f"{ms:.2f}" for ms in on.floor_ms.values()]
        if on.draft_floor_ms is not None:
            cells.append(f"{on.draft_floor_ms:.2f}")
        table.add_row(on.gpu.name, f"{on.gpu.bandwidth / 1e9:,.0f}", *cells)
    console.print(table)
    console.print(
        f"at least: what one step at batch 1 with {report.floor_context} cached tokens reads, at all of\n"
        "the bandwidth of one such GPU. A bound, not a forecast.\n"
    )


def _size(num_bytes: int) -> str:
    """Decimal units, as GPUs and disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
