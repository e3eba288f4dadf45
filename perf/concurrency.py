"""Many users at once: plain decoding, fixed chains, fixed trees and the engine's own choice in one run.

    python -m perf.concurrency --minutes 25 --json perf/results/concurrency-....json

Every combination of concurrency and temperature is a *cell*, every way to draft a *mode*. A run has rounds;
in a round every cell is visited once, in random order, and all modes of a cell are measured one right after
another, in random order, each in a window of its own with the same users (``perf.closed_loop``). So whatever
the machine does meanwhile hits all modes of a cell alike, and modes are compared round by round: a ratio is
the median over the rounds of the quotient within a round.

The time that the flags ask for is divided among the windows. The windows' own figures are in the JSON file,
so that medians and spread can be computed again; the last line of stdout is the summary, one JSON object.
Users repeat each other's prompts, so the prefix cache is off unless asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.build import Served
from engine.cli.bench_spec import temperatures
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments
from engine.cli.parser import Parser
from engine.errors import ConfigError, EngineError
from engine.text.conversation import conversation_ids
from perf import document
from perf.closed_loop import Load, Trace, drive, equal_answers, figures
from perf.latency import DEFAULT_PROMPTS, ratio, read_prompts
from perf.provenance import file_hash
from perf.shapes import AUTO, PLAIN, Shape, shapes

WARM_UP_SECONDS = 1.0  # of each mode, at the lowest concurrency; the first windows would pay for it


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    try:
        modes, heats = shapes([*args.shapes.split(","), AUTO]), temperatures(args.temperatures)
        _check(args)
        prompts = read_prompts(args.prompts)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        load_before = round(os.getloadavg()[0], 2)
        served = open_engine(args)
        tokens = [
            tuple(conversation_ids(served.tokenizer, [{"role": "user", "content": prompt.prompt}]))
            for prompt in prompts
        ]
        _check_room(served, tokens, args)
        sweep = Sweep(served, tokens, modes, list(product(args.concurrency, heats)), args)
        console.print(sweep.plan())
        windows = sweep.run()
    except EngineError as error:
        sys.stderr.write(f"concurrency: error: {error}\n")
        return 1
    result = document.described("concurrency", served)
    result |= {"cells": summarise(windows), "rounds": args.rounds, "minutes": args.minutes, "seed": args.seed}
    result |= {"max_tokens": args.max_tokens, "prompt_set": args.prompts.name, "load_before": load_before}
    result |= {"prompt_set_sha256": file_hash(args.prompts)}
    show(result, console)
    document.write(result, args.json, windows=windows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m perf.concurrency", description=(__doc__ or "").split("\n")[0])
    add_engine_arguments(parser)
    parser.set_defaults(
        max_num_seqs=32, max_model_len=512, enable_prefix_caching=False
    )  # what the default flags below need
    group = parser.add_argument_group("measurement")
    group.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="C")
    group.add_argument("--temperatures", default="0,0.7", metavar="LIST", help="with commas; 0 is greedy")
    group.add_argument(
        "--shapes",
        default="3/2/1,4/3/1,4/3/2,8/4/4",
        metavar="LIST",
        help="fixed chains and trees, as in haast bench spec; plain and auto are always measured",
    )
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="visits of every cell")
    group.add_argument("--minutes", type=float, default=25.0, help="for all windows together")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer")
    group.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS, metavar="FILE", help="JSONL")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of users and order")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result and all windows here")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the flag that cannot be."""
    for flag in ("rounds", "max_tokens", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}, expected at least 1")
    if args.minutes <= 0:
        raise ConfigError(f"--minutes is {args.minutes}, expected more than 0")
    if not 1 <= min(args.concurrency) <= max(args.concurrency) <= args.max_num_seqs:
        raise ConfigError(
            f"--concurrency is {args.concurrency}, expected 1 to --max-num-seqs, which is {args.max_num_seqs}"
        )
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: the directory does not exist")


def _check_room(served: Served, tokens: Sequence[tuple[int, ...]], args: argparse.Namespace) -> None:
    """ConfigError unless every answer may become as long as asked, however many run beside it."""
    engine, longest = served.engine, max(map(len, tokens)) + args.max_tokens
    if longest > engine.config.max_model_len:
        raise ConfigError(
            f"--max-model-len is {engine.config.max_model_len}, but the longest prompt and --max-tokens "
            f"{args.max_tokens} need {longest}"
        )
    pages = engine.scheduler.pages
    wanted = max(args.concurrency) * pages.pages_for(engine.config.max_model_len)
    if pages.num_usable < wanted:
        raise ConfigError(
            f"the KV cache holds {pages.num_usable * pages.page_size} rows, but {max(args.concurrency)} "
            f"users may need {wanted * pages.page_size}: raise --kv-cache-memory or lower --max-model-len"
        )


# --- the run --------------------------------------------------------------------------------------------


def _weight(cell: tuple[int, float]) -> float:
    """A cell's share of the time: more users take longer to begin, and each of them is answered slower."""
    return 1 + cell[0] / 16


class Sweep:
    """The windows of a run: rounds x cells x modes."""

    def __init__(
        self,
        served: Served,
        prompts: Sequence[tuple[int, ...]],
        modes: Sequence[Shape],
        cells: Sequence[tuple[int, float]],
        args: argparse.Namespace,
    ) -> None:
        """cells: (concurrency, temperature); args: rounds, minutes, max_tokens and seed."""
        self._engine, self._prompts, self._modes, self._cells = served.engine, prompts, modes, cells
        self._rounds: int = args.rounds
        self._seconds = 60.0 * args.minutes
        self._max_tokens, self._seed = args.max_tokens, args.seed
        self._next_id = 0

    @property
    def num_windows(self) -> int:
        return self._rounds * len(self._cells) * len(self._modes)

    def plan(self) -> str:
        """What will be done, in a sentence."""
        unit = self._seconds / (self._rounds * len(self._modes) * sum(map(_weight, self._cells)))
        shortest, longest = (unit * _weight(choose(self._cells)) for choose in (min, max))
        return (
            f"{self.num_windows} windows: {self._rounds} rounds of {len(self._cells)} cells in "
            f"{len(self._modes)} modes ({', '.join(mode.name for mode in self._modes)}); of "
            f"{shortest:.1f} to {longest:.1f} s, {self._seconds / 60:.1f} minutes in all"
        )

    def run(self) -> list[dict[str, Any]]:
        """One object per window, in the order in which they were measured. What a window takes too long, the
        others have to make up for."""
        deadline = time.perf_counter() + self._seconds
        chance, windows = random.Random(self._seed), list[dict[str, Any]]()
        for mode in self._modes:
            self._window(mode, self._load(0, min(self._cells)), WARM_UP_SECONDS)
        bar = Console(stderr=True)
        with Progress(console=bar, transient=True, disable=not bar.is_terminal) as progress:
            task = progress.add_task("Measuring", total=self.num_windows)
            weight_left = self._rounds * len(self._modes) * sum(map(_weight, self._cells))
            for number in range(self._rounds):
                for cell in chance.sample(self._cells, len(self._cells)):
                    left = max(deadline - time.perf_counter(), 0.0)
                    seconds = left * _weight(cell) / weight_left
                    order = chance.sample(self._modes, len(self._modes))
                    windows += self._visit(number, cell, order, seconds)
                    weight_left -= len(self._modes) * _weight(cell)
                    progress.update(task, completed=len(windows))
        return windows

    def _visit(
        self, number: int, cell: tuple[int, float], order: Sequence[Shape], seconds: float
    ) -> list[dict[str, Any]]:
        """All modes of a cell in one round."""
        load = self._load(1 + number, cell)
        traces = {mode.name: self._window(mode, load, seconds) for mode in order}
        windows = []
        for mode in order:
            equal, compared = equal_answers(traces[mode.name], traces[PLAIN])
            windows.append(
                {
                    "round": number,
                    "concurrency": load.concurrency,
                    "temperature": load.temperature,
                    "mode": mode.name,
                    "family": mode.family,
                    **figures(traces[mode.name]),
                    "answers_equal": equal,
                    "answers_compared": compared,
                }
            )
        return windows

    def _load(self, number: int, cell: tuple[int, float]) -> Load:
        seed = random.Random(f"{self._seed}/{number}/{cell}").getrandbits(32)
        return Load(self._prompts, *cell, self._max_tokens, seed)

    def _window(self, mode: Shape, load: Load, seconds: float) -> Trace:
        trace = drive(self._engine, mode.speculation, load, seconds, self._next_id)
        self._next_id += len(trace.answers)
        return trace


# --- summary --------------------------------------------------------------------------------------------


def summarise(windows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One object per cell, by temperature and concurrency, with one per mode in it."""
    keys = sorted({(window["temperature"], window["concurrency"]) for window in windows})
    return [_cell([w for w in windows if (w["temperature"], w["concurrency"]) == key]) for key in keys]


def _cell(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The modes of one cell, and the best of each family by tokens per second."""
    by_mode: dict[str, dict[int, Mapping[str, Any]]] = {}
    for window in windows:
        by_mode.setdefault(window["mode"], {})[window["round"]] = window
    rates = {name: {number: w["tok_s"] for number, w in found.items()} for name, found in by_mode.items()}
    names = sorted(by_mode, key=lambda name: (name != PLAIN, name == AUTO, name))
    modes = [_mode(name, list(by_mode[name].values())) | _compared(name, rates) for name in names]
    best: dict[str, str] = {}
    for mode in sorted(modes, key=lambda mode: mode["tok_s"]):
        best[mode["family"]] = mode["mode"]
    return {
        "concurrency": windows[0]["concurrency"],
        "temperature": windows[0]["temperature"],
        "modes": modes,
        "best": best,
    }


def _mode(name: str, windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A mode's figures in one cell: the median rate of its windows, percentiles over all their answers."""
    speeds = [window["tok_s"] for window in windows]
    found: dict[str, Any] = {
        "mode": name,
        "family": windows[0]["family"],
        "tok_s": round(median(speeds), 3),
        "tok_s_by_round": speeds,
        "acceptance_length": _share(windows, "decoded_tokens", "decoded_seqs"),
        "texts_equal_share": _share(windows, "answers_equal", "answers_compared"),
    }
    for phase in ("draft", "verify", "other"):
        found[f"{phase}_share"] = round(median(window[f"{phase}_share"] for window in windows), 4)
    for what in ("ttft", "tpot"):
        pooled = [value for window in windows for value in window[f"{what}_ms"]]
        found[f"num_{what}"] = len(pooled)
        for percent in (50, 99):
            found[f"{what}_ms_p{percent}"] = (
                round(float(np.percentile(pooled, percent)), 3) if pooled else None
            )
    return found


def _share(windows: Sequence[Mapping[str, Any]], part: str, whole: str) -> float | None:
    share = ratio(sum(w[part] for w in windows), sum(w[whole] for w in windows))
    return None if share is None else round(share, 4)


def _compared(name: str, rates: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """How a mode stands to plain decoding and to whichever other mode is the best beside it."""

    def quotients(other: str) -> list[float]:
        return [rates[name][number] / rates[other][number] for number in sorted(rates[name])]

    others = {other: quotients(other) for other in rates if other != name}
    if not others:
        return {"vs_plain": 1.0, "best_other": None, "vs_best_other": None, "vs_best_other_by_round": []}
    best = min(others, key=lambda other: median(others[other]))
    return {
        "vs_plain": round(median(others.get(PLAIN, [1.0])), 4),
        "best_other": best,
        "vs_best_other": round(median(others[best]), 4),
        "vs_best_other_by_round": [round(quotient, 4) for quotient in others[best]],
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print one line per cell and mode."""
    columns = {
        "tok/s": "tok_s",
        "vs plain": "vs_plain",
        "vs best other": "vs_best_other",
        "tokens/step": "acceptance_length",
        "TTFT p50": "ttft_ms_p50",
        "p99": "ttft_ms_p99",
        "TPOT p50": "tpot_ms_p50",
        "p99 ": "tpot_ms_p99",
        "draft": "draft_share",
        "verify": "verify_share",
        "other": "other_share",
        "equal": "texts_equal_share",
    }
    table = Table("T", "users", "mode")
    for title in columns:
        table.add_column(title, justify="right")
    for cell in result["cells"]:
        for mode in cell["modes"]:
            style = "bold" if mode["mode"] in cell["best"].values() else ""
            cells = [_number(mode[key]) for key in columns.values()]
            table.add_row(
                f"{cell['temperature']:g}", str(cell["concurrency"]), mode["mode"], *cells, style=style
            )
        table.add_section()
    table.caption = (
        f"{result['model']}, draft {result['draft']}, {result['dtype']}, {result['device']}, "
        f"{result['threads']} threads; ms; rates are medians of {result['rounds']} rounds, quotients are "
        "taken within a round; bold: the best of its kind"
    )
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
