"""``haast bench latency --load-format dummy``: what steps of a model cost whose weights are random numbers.

Such a model answers nothing worth timing, but its steps read what the real model's would. So in place of
answers, single steps are timed: by nodes of the tree, by context, by sequences, and prompts by length;
beside each figure is the least that it could be on this device. The measuring is in ``perf/step_costs.py``;
here are the flags, the tables and the JSON, which is the last line of stdout and is kept in ``--json FILE``
from figure to figure.

``mistral-small-4`` stands for the published model and its head, of which no file is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table

from draft.load import HeadCheckpoint
from engine.build import DEFAULT_HEAD, build_engine, default_model_path, open_head
from engine.checkpoint import Checkpoint, MistralCheckpoint
from engine.checkpoint.dummy import DummyMistral, open_dummy
from engine.checkpoint.native import MistralHead
from engine.checkpoint.published import PUBLISHED, published_head, published_target, with_layers
from engine.cli.loading import check_quantization, enough_memory, prepare, quantization_kind
from engine.cli.options import engine_config, model_name
from engine.cli.progress import LoadingBar
from engine.cli.speculative import asked
from engine.config import EngineConfig
from engine.core import Speculation
from engine.errors import ConfigError
from engine.step import Engine

if TYPE_CHECKING:
    from perf.kernel_timing import Ceilings
    from perf.step_costs import Costs, Floors, Wanted

AnyHead = HeadCheckpoint | MistralHead | str

# Flags of ``haast bench latency`` that say something about answers, and those that the contexts decide.
_OF_ANSWERS: Final = frozenset(
    ("--prompts", "--num-prompts", "--max-tokens", "--temperature", "--repeats", "--peer-dtype", "--spec-log")
)
_DECIDED: Final = frozenset(
    ("--max-model-len", "--max-num-seqs", "--spec-plan", "--spec-tokens", "--spec-nodes", "--spec-depth",
     "--spec-top-k", "--spec-lookup", "--spec-max-model-len", "--enable-prefix-caching", "--canary")
)  # fmt: skip
_OF_STEPS: Final = frozenset(
    ("--num-hidden-layers", "--seconds", "--steps", "--nodes", "--batches", "--contexts", "--prompt-lens",
     "--routing-overlap")
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say what to time."""
    group = parser.add_argument_group("steps (--load-format dummy)")
    group.add_argument("--num-hidden-layers", type=int, metavar="N", help="only the first N layers")
    group.add_argument(
        "--seconds", type=float, metavar="S", help="time budget, loading included (default 480)"
    )
    group.add_argument("--steps", type=int, metavar="N", help="timed for each figure (default 16)")
    for flag, what in (
        ("--nodes", "sizes of trees, root included"),
        ("--batches", "sequences at once"),
        ("--contexts", "tokens that steps are behind"),
        ("--prompt-lens", "tokens of prompts"),
    ):
        group.add_argument(flag, type=int, nargs="+", metavar="N", help=what)
    group.add_argument(
        "--routing-overlap",
        type=float,
        metavar="SHARE",
        help="how much the experts of alike texts overlap (default 0.45)",
    )


def refuse_without_dummy(args: argparse.Namespace) -> None:
    """ConfigError if steps are to be timed, but of a model with weights."""
    _refuse(args, _OF_STEPS, "expected --load-format dummy with it: of real weights answers are timed")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and the result. Raises ConfigError or CheckpointError."""
    from perf import document
    from perf.step_costs import Floors

    began = time.perf_counter()
    _refuse(
        args, _OF_ANSWERS, "which is for answers; of random weights (--load-format dummy) steps are timed"
    )
    _refuse(args, _DECIDED, "which --contexts, --batches and --nodes decide with --load-format dummy")
    wanted = wanted_of(args)
    checkpoint, head = open_pair(args)
    config = config_for(engine_config(args), wanted, checkpoint)
    limits = _limits(config.device)  # now, while there is memory to copy
    with enough_memory(config):
        with LoadingBar() as bar:
            engine = build_engine(checkpoint, (), head, config, bar.update)
        prepare(engine)
    loaded = time.perf_counter() - began
    facts = {"benchmark": "steps", **_facts(args, checkpoint, head, config), "load_s": round(loaded, 2)}
    result: dict[str, Any] = {}
    # Written after each figure, so that what ends a run early takes none of them.
    floors = Floors.of(checkpoint, head if isinstance(head, MistralHead) else None, config, limits)
    for result in _measured(began, facts, engine, floors, wanted):
        document.save(result, args.json)
    del engine
    gc.collect()  # an engine is full of cycles, and the peer needs its memory
    if args.peer is not None:
        from perf.layer_peer import per_layer

        for peer in per_layer(checkpoint, config, result["steps"]):
            result["peer"] = peer
            document.save(result, args.json)
    show(result)
    document.write(result, args.json)
    return 0


def _refuse(args: argparse.Namespace, flags: frozenset[str], why: str) -> None:
    for given in args.given:
        if given.flag in flags:
            raise ConfigError(f"found {given}, {why}")


def wanted_of(args: argparse.Namespace) -> Wanted:
    """What the flags ask for. Raises ConfigError."""
    from perf.step_costs import Wanted

    lists = {
        "nodes": args.nodes,
        "batches": args.batches,
        "contexts": args.contexts,
        "prompts": args.prompt_lens,
    }
    named = {"overlap": args.routing_overlap, "num_steps": args.steps, "seconds": args.seconds}
    given: dict[str, Any] = {key: tuple(sorted(set(some))) for key, some in lists.items() if some is not None}
    given |= {key: number for key, number in named.items() if number is not None}
    wanted = dataclasses.replace(Wanted(), **given)
    for flag, numbers in (
        ("--nodes", wanted.nodes),
        ("--batches", wanted.batches),
        ("--contexts", wanted.contexts),
        ("--prompt-lens", wanted.prompts),
        ("--steps", (wanted.num_steps,)),
    ):
        if min(numbers) < 1:
            raise ConfigError(f"{flag} is {min(numbers)}, expected at least 1")
    if max(wanted.nodes) > _MOST_NODES:
        raise ConfigError(f"--nodes is {max(wanted.nodes)}, expected at most {_MOST_NODES}")
    if not wanted.seconds > 0:
        raise ConfigError(f"--seconds is {wanted.seconds}, expected more than 0")
    if not 0 < wanted.overlap < 1:
        raise ConfigError(f"--routing-overlap is {wanted.overlap}, expected more than 0 and less than 1")
    # Plain steps of one sequence are what all else is compared with.
    return dataclasses.replace(
        wanted, nodes=tuple(sorted({1, *wanted.nodes})), batches=tuple(sorted({1, *wanted.batches}))
    )


_MOST_NODES: Final = 16  # that four levels with four children a node are sure to have


def open_pair(args: argparse.Namespace) -> tuple[Checkpoint | MistralCheckpoint, AnyHead]:
    """Target and head without their weights. Raises ConfigError, CheckpointError."""
    name, draft = model_name(args), asked(args)
    spoken = draft.head
    head: AnyHead = "none" if spoken is None else spoken
    checkpoint: Checkpoint | MistralCheckpoint
    if name is not None and name in PUBLISHED:
        checkpoint = published_target(name, quantization_kind(args.quantization or "fp8"))
        head = published_head(name) if spoken is None else spoken
    else:
        if args.quantization is not None:
            check_quantization(args.quantization, name, dummy=True)
        checkpoint = open_dummy(default_model_path() if name is None else name)
        head = str(DEFAULT_HEAD) if spoken is None and name is None else head
    if args.num_hidden_layers is not None:
        if not isinstance(checkpoint, DummyMistral):
            raise ConfigError(
                f"--num-hidden-layers is for Mistral Small 4, found the model {checkpoint.name}"
            )
        checkpoint = with_layers(checkpoint, args.num_hidden_layers)
    if isinstance(head, str) and head not in ("none", "ngram"):
        head = open_head(head, dummy=True)
    kind = "eagle" if isinstance(head, MistralHead) else head if isinstance(head, str) else head.kind
    if draft.method not in (None, kind):
        raise ConfigError(f"the method asked for is {draft.method!r}, but the head is one of {kind!r}")
    return checkpoint, head


def config_for(
    config: EngineConfig, wanted: Wanted, checkpoint: Checkpoint | MistralCheckpoint
) -> EngineConfig:
    """An engine's options with which all that is wanted can run. Raises ConfigError."""
    from perf.steps import room

    more, most = room(wanted.num_steps), checkpoint.config.max_position_embeddings
    longest = max(wanted.contexts[-1] + more, wanted.prompts[-1] + 1)
    if longest > most:
        raise ConfigError(
            f"--contexts {wanted.contexts[-1]} with {more} tokens behind them, --prompt-lens "
            f"{wanted.prompts[-1]}: {checkpoint.name} was made for at most {most} positions"
        )
    crowd = wanted.batches[-1] * min(wanted.nodes[-1], 4)
    return dataclasses.replace(
        config,
        max_model_len=longest,
        max_num_seqs=wanted.batches[-1],
        max_num_batched_tokens=max(config.max_num_batched_tokens, crowd, wanted.nodes[-1]),
        prefix_caching=True,
        speculation=Speculation(wanted.nodes[-1]),
        planned=False,
        draft_max_model_len=longest,
    )


def _facts(
    args: argparse.Namespace, checkpoint: Checkpoint | MistralCheckpoint, head: AnyHead, config: EngineConfig
) -> dict[str, Any]:
    """What is measured, where and how."""
    from perf import provenance

    return {
        "model": checkpoint.name,
        "weights": "random",
        "quantization": args.quantization or ("fp8" if checkpoint.name in PUBLISHED else None),
        "num_layers": checkpoint.config.num_layers,
        "head": head if isinstance(head, str) else head.path.name,
        "draft_vocab_size": config.draft_vocab_size,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "kv_cache_dtype": str(config.kv_dtype).removeprefix("torch."),
        "enforce_eager": config.enforce_eager,
        "pdl": config.pdl,
    } | provenance.provenance(config.device, config.dtype_name)


def _limits(device: str) -> Ceilings:
    """What the device reaches; its memory is free again afterwards."""
    from perf.kernel_timing import measured_ceilings

    if not device.startswith("cuda"):
        return measured_ceilings("cpu")
    found = measured_ceilings("cuda")
    torch.cuda.empty_cache()
    return found


def _measured(
    began: float, facts: Mapping[str, Any], engine: Engine, floors: Floors, wanted: Wanted
) -> Iterator[dict[str, Any]]:
    """The result after each figure of the engine, the last one whole."""
    from perf.step_costs import Costs
    from perf.steps import Steps

    costs = Costs(Steps(engine, wanted.num_steps), floors, wanted)
    for name in costs.measure(began):
        sys.stderr.write(f"{time.perf_counter() - began:6.1f} s  {name}\n")
        yield {**facts, **_figures(costs)}
    yield {**facts, **_figures(costs)}


def _figures(costs: Costs) -> dict[str, Any]:
    from perf.step_costs import assumed, memory

    limits = costs.floors.limits
    return {
        "copy_bytes_per_second": round(limits.bandwidth),
        "flops": round(limits.flops),
        "steps": costs.rows,
        "launches": costs.launches,
        "prompts": costs.prompts,
        "assumed": assumed(costs.rows),
        "alike_embedding_share": costs.embedding_share,
        "memory": memory(costs.steps),
        "left_out": costs.left_out,
    }


# --- tables

_STEP_COLUMNS: Final = (
    ("routing", "routing"), ("batch", "batch"), ("context", "context"), ("nodes", "nodes"),
    ("experts", "experts_per_layer"), ("step ms", "step_ms"), ("verify ms", "verify_ms"),
    ("floor", "floor_ms"), ("share", "floor_share"), ("draft ms", "draft_ms"), ("floor", "draft_floor_ms"),
    ("share", "draft_floor_share"), ("rest ms", "other_ms"),
)  # fmt: skip
_LAUNCH_COLUMNS: Final = (
    ("dependent", "pdl"), ("batch", "batch"), ("context", "context"), ("nodes", "nodes"),
    ("step ms", "step_ms"), ("verify ms", "verify_ms"), ("draft ms", "draft_ms"), ("rest ms", "other_ms"),
)  # fmt: skip
_PROMPT_COLUMNS: Final = (
    ("prompt", "tokens"), ("TTFT ms", "ttft_ms"), ("floor", "floor_ms"), ("share", "floor_share"),
)  # fmt: skip
_ASSUMED_COLUMNS: Final = (
    ("assumed acceptance", "assumed_acceptance"), ("routing", "routing"), ("context", "context"),
    ("levels", "levels"), ("tokens/step", "tokens_per_step"), ("tok/s", "tok_s"),
    ("plain tok/s", "plain_tok_s"), ("speed-up", "speedup"),
)  # fmt: skip


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    wide = console if console.is_terminal else Console(width=160)  # a pipe has no width
    layers = f"{result['num_layers']} layers"
    for title, columns, rows in (
        (f"{result['model']}, {layers}, random weights, {result['device']}", _STEP_COLUMNS, result["steps"]),
        ("dependent launches", _LAUNCH_COLUMNS, result["launches"]),
        ("time to first token", _PROMPT_COLUMNS, result["prompts"]),
        ("acceptance assumed, not measured", _ASSUMED_COLUMNS, result["assumed"]),
    ):
        if rows:
            wide.print(_table(title, columns, rows))
    for left in result["left_out"]:
        wide.print(f"left out: {left['what']}: {left['why']}", markup=False, soft_wrap=True)


def _table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for _, key in columns))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return "-" if value is None else str(value)
