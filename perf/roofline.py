"""How near to its bound is a step: ``python -m perf.roofline MODEL [--gpu H200] [--step-ms MS]``.

Bytes of a step and the time that reading them takes at least, for several numbers of scored tokens, any batch
and any context; the calculation is ``engine/cli/roofline.py``'s, the bytes are read off the model's headers.
With a measured step time, the share of the GPU's bandwidth that it reached (MBU). With ``--spec-model``, what
a level of drafting by Mistral's head reads as well. The last line of stdout is one JSON object.

A share above 100 % is possible for a mixture of experts: tokens that choose the same experts read fewer than
independent ones would, and independence is what is assumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from engine.checkpoint import open_model
from engine.checkpoint.native import read_mistral_head
from engine.cli.footprint import kv_token_bytes, target_footprint
from engine.cli.roofline import GPUS, Gpu, Reads, distinct_experts, floor_seconds, step_bytes
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError
from perf import document
from perf.provenance import command, commit
from perf.reads import draft_reads

_ON_GPU: Final = EngineConfig(dtype=torch.bfloat16, device="cuda")


def gpu_named(name: str) -> Gpu:
    """The GPU whose name begins so, as in "H200". Raises ConfigError."""
    found = [gpu for gpu in GPUS if gpu.name.lower().startswith(name.lower())]
    if len(found) != 1:
        raise ConfigError(f"--gpu is {name!r}, expected one of {', '.join(gpu.name for gpu in GPUS)}")
    return found[0]


def bandwidth_share(num_bytes: float, seconds: float, gpu: Gpu) -> float:
    """MBU: the share of the datasheet's bandwidth that reading so many bytes in a measured time comes to."""
    return floor_seconds(num_bytes, gpu) / seconds


def rows(
    reads: Reads, gpu: Gpu, nodes: Sequence[int], batch: int, context: int, step_ms: float | None
) -> list[dict[str, Any]]:
    """One row for each number of nodes. step_ms: a measured step of the first of them."""
    table: list[dict[str, Any]] = []
    for num_nodes in nodes:
        num_bytes = step_bytes(reads, num_nodes, batch, context)
        distinct = distinct_experts(reads.num_experts, reads.num_experts_per_token, num_nodes * batch)
        row = {
            "nodes": num_nodes,
            "experts_per_layer": round(distinct, 2),
            "gigabytes": round(num_bytes / 1e9, 4),
            "floor_ms": round(1e3 * floor_seconds(num_bytes, gpu), 4),
        }
        if step_ms is not None and not table:
            row["bandwidth_share"] = round(bandwidth_share(num_bytes, step_ms / 1e3, gpu), 4)
        table.append(row)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON. Returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m perf.roofline", description=about)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--gpu", default="H200", metavar="NAME")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--spec-model", metavar="HEAD", help="an Eagle head of Mistral Small 4")
    parser.add_argument("--step-ms", type=float, metavar="MS", help="measured, of the first of --nodes")
    args = parser.parse_args(argv)
    try:
        if min(*args.nodes, args.batch, args.context) < 1 or (args.step_ms is not None and args.step_ms <= 0):
            raise ConfigError("--nodes, --batch, --context and --step-ms must be positive")
        gpu, checkpoint = gpu_named(args.gpu), open_model(args.model)
        config = checkpoint.config
        reads = target_footprint(checkpoint).reads(config, kv_token_bytes(config))
        drafts = None if args.spec_model is None else draft_reads(read_mistral_head(args.spec_model), _ON_GPU)
    except EngineError as error:
        sys.stderr.write(f"roofline: error: {error}\n")
        return 1
    found = rows(reads, gpu, args.nodes, args.batch, args.context, args.step_ms)
    shown = Table(*found[0])
    for row in found:
        shown.add_row(*map(str, row.values()))
    Console(highlight=False).print(shown)
    facts = {"model": checkpoint.name, "gpu": gpu.name, "batch": args.batch, "context": args.context}
    facts |= {"step_ms": args.step_ms, "commit": commit(), "command": command()}
    if drafts is not None:
        num_bytes = step_bytes(drafts, 1, args.batch, args.context)
        facts |= {"draft_level_bytes": round(num_bytes)}
        facts |= {"draft_level_floor_ms": round(1e3 * floor_seconds(num_bytes, gpu), 4)}
    document.write({"benchmark": "roofline", **facts, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
