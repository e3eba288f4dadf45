"""``haast bench spec``: what drafting is worth, by kind of prompt, depth and rank, for several settings.

One request at a time, in process. The settings (``--shapes`` x ``--temperatures`` x ``--shared-noise``) take
turns prompt by prompt; plain decoding is always among them. The arithmetic is in ``perf/acceptance.py``; here
are the flags, the tables and the JSON, whose last line on stdout is one object.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table

from engine.build import Served
from engine.cli.bench_latency import measure, number, spread
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments
from engine.errors import ConfigError
from engine.text.conversation import conversation_ids

if TYPE_CHECKING:
    from perf.acceptance import Cell
    from perf.latency import Prompt, Row

ABOUT = "in process, acceptance by kind of prompt, depth and rank, for several trees and temperatures"
NOISES: Final = {"on": True, "off": False}
_NUM_DEPTHS: Final = 4  # of the table; the JSON has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast bench spec``."""
    add_engine_arguments(parser)
    # Every prompt is run again and again, and its first token is to be timed as that of a new one.
    parser.set_defaults(enable_prefix_caching=False)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--shapes",
        default="3/2/1,4/3/2,8/4/4,auto",
        metavar="LIST",
        help="what to draft, with commas: NODES/DEPTH/TOP_K, with prompt lookup as in 8/4/4+lookup8, or auto",
    )
    group.add_argument(
        "--temperatures", default="0", metavar="LIST", help="with commas, as in 0,0.7; 0 is greedy"
    )
    group.add_argument(
        "--shared-noise",
        default="on",
        metavar="LIST",
        help="on, off or on,off: when sampling, whether the head drafts with the sampler's own noise",
    )
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL with id, kind and prompt; default: ours"
    )
    group.add_argument("--num-prompts", type=int, metavar="N", help="only N prompts, spread over the kinds")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="rounds over the prompt set")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and the result. Raises ConfigError or CheckpointError."""
    from perf import acceptance, document, latency

    cells = asked_cells(args)
    path = args.prompts or latency.DEFAULT_PROMPTS
    prompts = spread(latency.read_prompts(path), args.num_prompts)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    load_before = round(os.getloadavg()[0], 2)
    served = open_engine(args)
    try:
        rows = answers(served, cells, prompts, args)
    finally:
        if served.engine.step_log is not None:
            served.engine.step_log.close()
    result = describe(served, args, path, len(prompts))
    result |= {"load_before": load_before, "cells": acceptance.report(rows, cells)}
    show(result)
    document.write(result, args.json)
    return 0


def asked_cells(args: argparse.Namespace) -> list[Cell]:
    """The settings to compare. Raises ConfigError naming the flag with which something is wrong."""
    from perf.acceptance import cells
    from perf.shapes import shapes

    for flag in ("max_tokens", "repeats", "num_prompts", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}, expected at least 1")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: the directory does not exist")
    noises = args.shared_noise.split(",")
    if not set(noises) <= NOISES.keys() or len(set(noises)) < len(noises):
        raise ConfigError(f"--shared-noise is {args.shared_noise!r}, expected on, off or on,off")
    found = shapes(args.shapes.split(","))
    return cells(found, temperatures(args.temperatures), [NOISES[noise] for noise in noises])


def temperatures(text: str) -> list[float]:
    """A list with commas. Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(value == 0 or 1e-5 <= value <= 100 for value in found):
        raise ConfigError(f"--temperatures is {text!r}, expected numbers with commas, 0 or 1e-5 to 100")
    return list(dict.fromkeys(found))


def answers(
    served: Served, cells: Sequence[Cell], prompts: Sequence[Prompt], args: argparse.Namespace
) -> list[Row]:
    """All prompts in all cells."""
    from perf.acceptance import Bench

    # Rendered once: a clock in a chat template must not make the cells differ.
    tokens = {
        prompt.id: tuple(conversation_ids(served.tokenizer, [{"role": "user", "content": prompt.prompt}]))
        for prompt in prompts
    }
    switches = any(cell.shared_noise is False for cell in cells)
    bench = Bench(served.engine, switches, lambda prompt: tokens[prompt.id], args.max_tokens)
    return measure(prompts, {cell.name: bench.mode(cell) for cell in cells}, args.repeats)


def describe(served: Served, args: argparse.Namespace, path: Path, num_prompts: int) -> dict[str, Any]:
    """What was measured, where and how."""
    from perf import document, provenance

    return document.described("spec", served) | {
        "draft_vocab_coverage": served.engine.vocab_coverage(),
        "max_tokens": args.max_tokens,
        "prefix_caching": served.engine.config.prefix_caching,
        "repeats": args.repeats,
        "num_prompts": num_prompts,
        "prompt_set": path.name,
        "prompt_set_sha256": provenance.file_hash(path),
    }


# --- tables -----------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    """Print three tables: speed and acceptance by depth, by kind of prompt, by rank."""
    console = Console()
    if not console.is_terminal:  # a pipe has no width; the tables must not be folded into 80 columns there
        console = Console(width=160)
    for table in (_by_depth(result), _by_kind(result["cells"]), _by_rank(result["cells"])):
        console.print(table)


def _by_depth(result: Mapping[str, Any]) -> Table:
    columns = {
        "tok/s": "tok_s",
        "speed-up": "speedup",
        "tokens/step": "acceptance_length",
        "nodes": "nodes_per_step",
        "draft ms": "draft_ms_p50",
        "verify ms": "verify_ms_p50",
        "equal": "texts_equal_share",
    }
    depths = [f"depth {depth}" for depth in range(1, _NUM_DEPTHS + 1)]
    table = _table([*columns, *depths])
    table.caption = (
        f"{result['model']}, draft {result['draft']}, {result['dtype']}, {result['device']}, "
        f"{result['threads']} threads; times are medians per step; depth d: share of the steps that "
        "accepted a token at depth d, of those that got before one"
    )
    for cell in result["cells"]:
        shares = {row["depth"]: row["acceptance"] for row in cell["by_depth"]}
        cells = [number(cell[key]) for key in columns.values()]
        table.add_row(*_setting(cell), *cells, *(number(shares.get(d + 1)) for d in range(_NUM_DEPTHS)))
    return table


def _by_kind(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(list(cells[0]["kinds"]))
    table.caption = "tokens/step (speed-up) by kind of prompt"
    for cell in cells:
        figures = cell["kinds"].values()
        table.add_row(
            *_setting(cell),
            *(f"{number(kind['acceptance_length'])} ({number(kind['speedup'])})" for kind in figures),
        )
    return table


def _by_rank(cells: Sequence[Mapping[str, Any]]) -> Table:
    shares = [{row["rank"]: row["acceptance"] for row in cell["by_rank"]} for cell in cells]
    ranks = list(dict.fromkeys(rank for found in shares for rank in found))
    table = _table([rank if rank == "lookup" else f"rank {rank}" for rank in sorted(ranks)])
    table.caption = "share of the judged children of a rank (0 is the head's first choice) that were accepted"
    for cell, found in zip(cells, shares, strict=True):
        table.add_row(*_setting(cell), *(number(found.get(rank)) for rank in sorted(ranks)))
    return table


def _table(titles: Sequence[str]) -> Table:
    table = Table("shape")
    for title in ("T", "noise", *titles):
        table.add_column(title, justify="right")
    return table


def _setting(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    noise = {None: "-", True: "shared", False: "none"}[cell["shared_noise"]]
    return cell["shape"], f"{cell['temperature']:g}", noise
