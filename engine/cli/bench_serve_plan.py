"""Flags of ``haast bench serve`` and what they ask for, checked before anything is sent."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from engine.cli.client import CHAT, COMPLETIONS
from engine.errors import ConfigError

if TYPE_CHECKING:
    from perf.serving import Asked
    from perf.workload import Ask

_PATHS: Final = {"openai-chat": CHAT, "openai": COMPLETIONS, "vllm": COMPLETIONS}
_GENERATED: Final = {"random": (1024, 0, 1), "prefix_repetition": (256, 256, 10)}  # input, prefix, prefixes
_DATASETS: Final = ("chat", "custom", "sharegpt", *_GENERATED)
_NUM_GENERATED: Final = 100
_NUM_BLOCKS: Final = 10
SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast bench serve``."""
    _add_server_arguments(parser.add_argument_group("server"))
    _add_prompt_arguments(parser.add_argument_group("prompts"))
    _add_traffic_arguments(parser.add_argument_group("traffic"))
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    for name in SAMPLING[1:]:
        kind = int if name == "top_k" else float
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar="X", help="sent to the server if given")
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on to the full length; always so with random prompts"
    )
    group.add_argument("--extra-body", type=_object, metavar="JSON", help="more fields of every request")
    _add_result_arguments(parser.add_argument_group("result"))


def _add_server_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", metavar="URL", help="the server; without it, --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="of the server")
    group.add_argument("--port", type=int, default=8000, help="of the server")
    group.add_argument("--backend", choices=tuple(_PATHS), default="openai-chat", help="chat or completions")
    group.add_argument("--endpoint", metavar="PATH", help="default: what --backend says")
    group.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    group.add_argument("--served-model-name", metavar="NAME", help="the same; wins over --model")
    group.add_argument("--api-key", metavar="KEY", help="default: the variable OPENAI_API_KEY")
    group.add_argument("--header", nargs="+", metavar="KEY=VALUE", help="more headers of every request")
    group.add_argument(
        "--ready-check-timeout-sec", type=float, default=30, metavar="S", help="wait for a starting server"
    )
    group.add_argument(
        "--request-timeout", type=float, default=600, metavar="S", help="an answer that takes longer failed"
    )
    group.add_argument("--compare", metavar="URL2", help="alternate with this server, same key and headers")
    group.add_argument(
        "--compare-extra-body",
        type=_object,
        metavar="JSON",
        help="more fields of the second server's requests; without --compare it is the first server again",
    )
    group.add_argument(
        "--compare-blocks", type=int, metavar="N", help=f"turns of each server (up to {_NUM_BLOCKS})"
    )
    for name in ("--tokenizer", "--tokenizer-mode"):  # the server counts
        group.add_argument(name, help=argparse.SUPPRESS)


def _add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=_DATASETS, default="chat", help="kind of prompts")
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="of custom and sharegpt prompts")
    group.add_argument(
        "--num-prompts", type=int, metavar="N", help=f"default: all of a file, {_NUM_GENERATED} random ones"
    )
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrival times")
    group.add_argument("--disable-shuffle", action="store_true", help="prompts in the order of the file")
    group.add_argument(
        "--output-len",
        "--random-output-len",
        "--sharegpt-output-len",
        "--custom-output-len",
        "--prefix-repetition-output-len",
        type=int,
        default=128,
        metavar="TOKENS",
        help="longest answer",
    )
    group.add_argument(
        "--input-len",
        "--random-input-len",
        "--prefix-repetition-suffix-len",
        type=int,
        metavar="WORDS",
        help="of a random prompt (1024), or after a repeated prefix (256)",
    )
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="SHARE", help="input length varies so much"
    )
    group.add_argument(
        "--prefix-len",
        "--random-prefix-len",
        "--prefix-repetition-prefix-len",
        type=int,
        metavar="WORDS",
        help="words that random prompts share (0), or that a repeated prefix has (256)",
    )
    group.add_argument(
        "--num-prefixes",
        "--prefix-repetition-num-prefixes",
        type=int,
        metavar="N",
        help="different prefixes (1, or 10)",
    )


def _add_traffic_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-concurrency", type=int, metavar="N", help="most requests at once; default: any")
    group.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="R", help="arrivals per second; inf: all at 0"
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X", help="1 is Poisson, below bursts, inf a clock"
    )
    group.add_argument("--num-warmups", type=int, default=1, metavar="N", help="requests before it counts")


def _add_result_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="LIST", help="what to tell"
    )
    group.add_argument("--metric-percentiles", default="90,99", metavar="LIST", help="of each")
    group.add_argument(
        "--goodput", nargs="+", metavar="NAME:MS", help="count requests within all of these; ttft, tpot, e2el"
    )
    group.add_argument("--save-result", action="store_true", help="write the result as JSON")
    group.add_argument("--save-detailed", action="store_true", help="and every request with its times")
    group.add_argument("--result-dir", type=Path, default=Path(), metavar="DIR", help="where")
    group.add_argument("--result-filename", metavar="FILE", help="default: label, rate, model and date")
    group.add_argument("--label", help="of the result; default: the backend")
    group.add_argument("--metadata", nargs="+", metavar="KEY=VALUE", help="more keys of the result")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="picture of TTFT and TPOT")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


@dataclass(frozen=True, slots=True)
class Plan:
    """The flags, checked."""

    asks: Sequence[Ask]
    num_blocks: int
    asked: Asked
    path: str
    api_key: str | None
    headers: dict[str, str]
    metadata: dict[str, str]


def check(args: argparse.Namespace) -> Plan:
    """The plan that the flags make. Raises ConfigError naming the flag."""
    from perf.plot import new_figure

    for flag in (
        "output_len",
        "num_prompts",
        "input_len",
        "num_prefixes",
        "max_concurrency",
        "compare_blocks",
    ):
        _at_least(args, flag, 1)
    for flag in ("prefix_len", "num_warmups", "seed", "ready_check_timeout_sec", "temperature"):
        _at_least(args, flag, 0)
    for flag in ("request_rate", "burstiness", "request_timeout"):
        if not getattr(args, flag) > 0:
            raise ConfigError(f"{_spelt(flag)} is {getattr(args, flag):g}, expected more than 0")
    if not 0 <= args.random_range_ratio < 1:
        raise ConfigError(f"--random-range-ratio is {args.random_range_ratio:g}, expected 0 to less than 1")
    for flag in ("save_detailed", "result_filename"):
        if getattr(args, flag) and not args.save_result:
            raise ConfigError(f"found {_spelt(flag)}, expected --save-result with it")
    if args.plot is not None:
        new_figure(1, 1)  # refused now rather than after the run
        if not args.plot.resolve().parent.is_dir():
            raise ConfigError(f"--plot {args.plot}: the directory does not exist")
    asks = _asks(args)
    return Plan(
        asks,
        _num_blocks(args, len(asks)),
        _asked(args),
        _path(args),
        args.api_key or os.environ.get("OPENAI_API_KEY"),
        _pairs(args, "header"),
        _pairs(args, "metadata"),
    )


def _spelt(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _at_least(args: argparse.Namespace, flag: str, least: int) -> None:
    value = getattr(args, flag)
    if value is not None and not value >= least:
        raise ConfigError(f"{_spelt(flag)} is {value:g}, expected at least {least}")


def _pairs(args: argparse.Namespace, flag: str) -> dict[str, str]:
    pairs = {}
    for item in getattr(args, flag) or ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            shown = key[:40] if flag == "header" else item[:80]  # a header's value may be a key
            raise ConfigError(f"{_spelt(flag)}: found {shown!r}, expected KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs


def _object(text: str) -> dict[str, Any]:
    """Parse a JSON object. Raises argparse.ArgumentTypeError."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no JSON object: {error}") from error


def _path(args: argparse.Namespace) -> str:
    path = _PATHS[args.backend] if args.endpoint is None else args.endpoint.lstrip("/")
    ending = "chat/completions" if args.backend == "openai-chat" else "completions"
    if not path.endswith(ending) or path.endswith("chat/completions") != (args.backend == "openai-chat"):
        raise ConfigError(
            f"--endpoint is {args.endpoint}, expected .../{ending} with --backend {args.backend}"
        )
    return path


def _asked(args: argparse.Namespace) -> Asked:
    from perf.serving import GOALS, METRICS, Asked

    metrics = tuple(name.strip() for name in args.percentile_metrics.split(","))
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"--percentile-metrics: found {name!r}, expected some of {', '.join(METRICS)}")
    goals = {}
    for item in args.goodput or ():
        name, _, limit = item.partition(":")
        goals[name] = _number(limit, "--goodput", f"{item!r}", 0, math.inf)
        if name not in GOALS:
            raise ConfigError(f"--goodput: found {name!r}, expected some of {', '.join(GOALS)}")
    percentiles = [
        _number(item, "--metric-percentiles", f"{item!r}", 0, 100)
        for item in args.metric_percentiles.split(",")
    ]
    return Asked(metrics, percentiles, goals)


def _number(text: str, flag: str, found: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ConfigError(f"{flag}: found {found}, expected a number from {low:g} to {high:g}")
    return value


def _asks(args: argparse.Namespace) -> list[Ask]:
    from perf import workload

    rng = np.random.default_rng([args.seed, 0])
    name, path = args.dataset_name, args.dataset_path
    if (name in ("custom", "sharegpt")) != (path is not None):
        expected = "expected --dataset-path FILE" if path is None else "which has no file"
        raise ConfigError(f"--dataset-name is {name}, {expected}")
    if name in _GENERATED:
        given = (args.input_len, args.prefix_len, args.num_prefixes)
        input_len, prefix_len, num_prefixes = (
            default if value is None else value
            for value, default in zip(given, _GENERATED[name], strict=True)
        )
        asks = workload.generated(
            args.num_prompts or _NUM_GENERATED,
            input_len,
            rng,
            prefix_len=prefix_len,
            num_prefixes=num_prefixes,
            range_ratio=args.random_range_ratio,
            kind=name,
        )
    else:
        read = workload.read_sharegpt if name == "sharegpt" else workload.read_custom
        asks = read(path or workload.DEFAULT_PROMPTS)
        asks = workload.pick(asks, args.num_prompts, None if args.disable_shuffle else rng)
    return workload.with_lengths(asks, args.output_len)


def _num_blocks(args: argparse.Namespace, num_asks: int) -> int:
    """In how many turns the servers alternate; a turn has room for all that shall run at once."""
    if args.compare is None and args.compare_extra_body is None:
        if args.compare_blocks is not None:
            raise ConfigError("found --compare-blocks, expected --compare or --compare-extra-body with it")
        return 1
    most = max(num_asks // (args.max_concurrency or 1), 1)
    wanted: int = args.compare_blocks or min(_NUM_BLOCKS, most)
    if wanted > most:
        raise ConfigError(
            f"--compare-blocks is {wanted}, expected at most {most}: a turn of {num_asks} / {wanted} prompts "
            f"never has {args.max_concurrency or 1} at once"
        )
    return wanted
