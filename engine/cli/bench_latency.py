"""``haast bench latency``: one request at a time, in process, plain against speculative on the same weights.

The measuring is in ``perf/latency.py``; here are the flags, the table and the JSON. The prefix cache is off
unless asked for. With ``--load-format dummy`` there is no answer worth timing, and single steps are timed:
see ``bench_steps``. The last line of stdout is one JSON object, whatever else is printed, so ``haast bench
latency | tail -1`` always parses.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.build import Served
from engine.checkpoint import open_checkpoint
from engine.cli import bench_steps
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments, engine_config
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from engine.errors import ConfigError
from engine.text.conversation import conversation_ids

if TYPE_CHECKING:
    from perf.latency import Mode, Prompt, Row, Run

ABOUT = "in process, one request at a time, plain against speculative"
PEER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP_PROMPTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast bench latency``."""
    add_engine_arguments(parser)
    # Every prompt is run again and again, and its first token is to be timed as that of a new one.
    parser.set_defaults(enable_prefix_caching=False)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL with id, kind and prompt; default: ours"
    )
    group.add_argument("--num-prompts", type=int, metavar="N", help="only N prompts, spread over the kinds")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="rounds over the prompt set")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    group.add_argument("--peer", choices=("transformers",), help="run another engine, too")
    group.add_argument(
        "--peer-dtype", choices=tuple(PEER_DTYPES), default="bfloat16", help="dtype of the peer's weights"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    bench_steps.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and the result. Raises ConfigError or CheckpointError."""
    from perf import document, latency

    for flag in ("max_tokens", "repeats", "num_prompts", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}, expected at least 1")
    if args.temperature < 0:
        raise ConfigError(f"--temperature is {args.temperature}, expected at least 0")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: the directory does not exist")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.load_format == "dummy":
        return bench_steps.run(args)
    bench_steps.refuse_without_dummy(args)
    path = args.prompts or latency.DEFAULT_PROMPTS
    prompts = spread(latency.read_prompts(path), args.num_prompts)
    load_before = round(os.getloadavg()[0], 2)  # anything near 1 or above: others were using the machine
    served = open_engine(args)
    try:
        rows = measure(prompts, modes(served, args), args.repeats)
    finally:
        if served.engine.step_log is not None:
            served.engine.step_log.close()
    result = describe(served, args, path, len(prompts)) | latency.report(rows)
    result |= {"load_before": load_before, "draft_vocab_coverage": served.engine.vocab_coverage()}
    show(result)
    document.write(result, args.json, prompts=latency.per_prompt(rows))
    return 0


def spread(prompts: Sequence[Prompt], num_prompts: int | None) -> list[Prompt]:
    """The first ``num_prompts`` when the kinds take turns; all of them in file order for None."""
    if num_prompts is None:
        return list(prompts)
    seen: dict[str, int] = {}
    turns = []
    for prompt in prompts:
        seen[prompt.kind] = seen.get(prompt.kind, 0) + 1
        turns.append(seen[prompt.kind])
    order = sorted(range(len(prompts)), key=lambda number: (turns[number], number))
    return [prompts[number] for number in order[:num_prompts]]


def modes(served: Served, args: argparse.Namespace) -> dict[str, Mode]:
    """Ways to answer a prompt: plain, spec, and the peer if one is asked for."""
    from perf import latency

    ids = count()
    tokens: dict[str, tuple[int, ...]] = {}

    def prompt_ids(prompt: Prompt) -> tuple[int, ...]:
        if prompt.id not in tokens:  # rendered once: a clock in a template must not make the modes differ
            messages = [{"role": "user", "content": prompt.prompt}]
            tokens[prompt.id] = tuple(conversation_ids(served.tokenizer, messages))
        return tokens[prompt.id]

    def ours(speculation: Speculation | None) -> Mode:
        def answer(prompt: Prompt) -> Run:
            sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
            return latency.run_engine(
                served.engine, Request(next(ids), prompt_ids(prompt), sampling, speculation)
            )

        return answer

    found = {latency.PLAIN: ours(SPECULATION_OFF), latency.SPEC: ours(None)}
    if args.peer is not None:
        found[args.peer] = _peer(served, args, prompt_ids)
    return found


def _peer(served: Served, args: argparse.Namespace, prompt_ids: Callable[[Prompt], tuple[int, ...]]) -> Mode:
    from perf.peers import TransformersPeer

    checkpoint = open_checkpoint(served.root)
    weights = checkpoint.load(PEER_DTYPES[args.peer_dtype], engine_config(args).device)
    peer = TransformersPeer(checkpoint.config, weights, served.tokenizer.eos_token_ids)
    return lambda prompt: peer.run(prompt_ids(prompt), args.max_tokens, args.temperature)


def measure(prompts: Sequence[Prompt], modes: Mapping[str, Mode], repeats: int) -> list[Row]:
    """Warm up, then run every prompt in every mode, with a progress bar on a terminal."""
    from perf import latency

    for prompt in prompts[:WARM_UP_PROMPTS]:
        for mode in modes.values():
            mode(prompt)
    console = Console(stderr=True)
    return list(
        track(
            latency.interleave(prompts, modes, repeats),
            "Measuring",
            len(prompts) * repeats,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )


def describe(served: Served, args: argparse.Namespace, path: Path, num_prompts: int) -> dict[str, Any]:
    """What was measured, where and how."""
    from perf import document, provenance

    config = engine_config(args)
    found = document.described("latency", served) | {
        "speculation": dataclasses.asdict(config.speculation),
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "prefix_caching": config.prefix_caching,
        "repeats": args.repeats,
        "num_prompts": num_prompts,
        "prompt_set": path.name,
        "prompt_set_sha256": provenance.file_hash(path),
    }
    if args.peer is not None:
        import importlib.metadata

        version = importlib.metadata.version(args.peer)
        found |= {"peer": f"{args.peer} {version}", "peer_dtype": args.peer_dtype}
    return found


COLUMNS = (
    ("plain tok/s", "plain_tok_s"),
    ("spec tok/s", "spec_tok_s"),
    ("speed-up", "speedup"),
    ("tokens/step", "acceptance_length"),
    ("TTFT ms", "ttft_ms_p50"),
    ("plain step ms", "plain_step_ms_p50"),
    ("step ms", "step_ms_p50"),
    ("draft ms", "draft_ms_p50"),
    ("verify ms", "verify_ms_p50"),
    ("equal", "texts_equal_share"),
)


def show(result: Mapping[str, Any]) -> None:
    """Print the table: a row per kind and one for all."""
    columns = [*COLUMNS]
    if "peer" in result:
        name = result["peer"].split()[0]
        columns.insert(2, (f"{name} tok/s", f"{name}_tok_s"))
        columns.insert(3, (f"plain vs {name}", f"plain_vs_{name}"))
    size = result["speculation"]
    tree = f"{size['nodes']}/{size['depth']}/{size['top_k']}, lookup {size['lookup']}"
    table = Table(
        caption=(
            f"{result['model']}, draft {result['draft']}, tree {tree}, {result['dtype']}, "
            f"{result['device']}, {result['threads']} threads; "
            "times are medians of speculative runs; tok/s without the first token"
        )
    )
    table.add_column("kind")
    for title, _ in columns:
        table.add_column(title, justify="right")
    for kind, figures in result["kinds"].items():
        table.add_row(kind, *(number(figures[key]) for _, key in columns))
    table.add_section()
    table.add_row("all", *(number(result[key]) for _, key in columns), style="bold")
    console = Console()
    # a pipe has no width; the table must not be folded into 80 columns there
    (console if console.is_terminal else Console(width=160)).print(table)


def number(value: float | None) -> str:
    """A figure in a table: three digits or so, "-" where there is none."""
    return "-" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
