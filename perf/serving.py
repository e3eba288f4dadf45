"""What a serving benchmark says: pure functions from traces to figures.

The latencies are those of ``vllm bench serve``, and so are the names of the figures:

    TTFT   sent -> first piece of the answer
    E2EL   sent -> last piece
    TPOT   (E2EL - TTFT) / (tokens - 1), of answers of at least two tokens
    ITL    between one piece and the next. With speculation a piece holds all tokens of a step, so this is
           the time of a step and not of a token; tools disagree about the name, so only JSON has it

Of each: mean, median, standard deviation (of all, not of a sample) and percentiles (linear between ranks)
over the requests that succeeded, ITL over all their gaps at once. Where there is nothing to average a figure
is None and not zero; the same holds for what needs numbers of tokens that the server did not send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec
import numpy as np

from perf.load import Part, Trace

METRICS: Final = ("ttft", "tpot", "itl", "e2el")
GOALS: Final = ("ttft", "tpot", "e2el")  # what a goodput may ask
_MS: Final = 1e3

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a summary shall hold. percentiles: 0 to 100; goals: milliseconds by a name of GOALS."""

    metrics: Sequence[str] = METRICS
    percentiles: Sequence[float] = (99.0,)
    goals: Mapping[str, float] = field(default_factory=dict)


def samples(traces: Sequence[Trace], metric: str) -> list[float]:
    """All values of a metric, in seconds, over the traces that succeeded."""
    good = _answered(traces)
    if metric == "itl":
        return [gap for trace in good for gap in trace.gaps]
    if metric == "tpot":
        return [tpot for trace in good if (tpot := trace.tpot) is not None]
    return [trace.ttft if metric == "ttft" else trace.latency for trace in good]


def summarise(traces: Sequence[Trace], num_asked: int, duration: float, asked: Asked) -> Figures:
    """The figures of a run. num_asked: requests that should have been sent; duration: seconds of the run."""
    good = _answered(traces)
    outputs, inputs = _total(good, "completion_tokens"), _total(good, "prompt_tokens")
    both = None if outputs is None or inputs is None else outputs + inputs
    figures: Figures = {
        "duration": duration,
        "completed": len(good),
        "failed": len(traces) - len(good),
        "not_sent": num_asked - len(traces),
        "without_usage": sum(trace.completion_tokens is None for trace in good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _ratio(len(good), duration),
        "request_goodput": None,
        "output_throughput": _ratio(outputs, duration),
        "total_token_throughput": _ratio(both, duration),
        "max_output_tokens_per_s": peak_tokens(good),
        "max_concurrent_requests": peak_requests(traces),
    }
    if asked.goals:
        met = sum(meets(trace, asked.goals) for trace in good)
        figures |= {"request_goodput": _ratio(met, duration), "goodput_share": _ratio(met, num_asked)}
    for metric in asked.metrics:
        figures |= spread(metric, samples(traces, metric), asked.percentiles)
    return figures | acceptance(good) | {"error_counts": _counted(traces)}


def spread(metric: str, seconds: Sequence[float], percentiles: Sequence[float]) -> Figures:
    """Mean, median, deviation and percentiles under vLLM's keys, in milliseconds."""
    known = bool(seconds)
    values = np.asarray(seconds, np.float64) * _MS
    figures: Figures = {
        f"mean_{metric}_ms": float(values.mean()) if known else None,
        f"median_{metric}_ms": float(np.median(values)) if known else None,
        f"std_{metric}_ms": float(values.std()) if known else None,
    }
    for percentile in percentiles:
        key = f"p{percentile:g}_{metric}_ms"
        figures[key] = float(np.percentile(values, percentile)) if known else None
    return figures


def meets(trace: Trace, goals: Mapping[str, float]) -> bool:
    """Whether an answer keeps all limits, in milliseconds.

    An answer of one token has no TPOT and keeps any; of one whose tokens nobody counted it is not known, so
    it keeps none.
    """
    found = {"ttft": trace.ttft, "e2el": trace.latency, "tpot": trace.tpot}
    if trace.tpot is None:
        found["tpot"] = 0.0 if trace.completion_tokens is not None else float("inf")
    return all((found[name] or 0.0) * _MS <= limit for name, limit in goals.items())


def peak_requests(traces: Sequence[Trace]) -> int:
    """The most requests that were under way at once; of those that failed before any answer nobody knows how
    long they were."""
    begun = [trace for trace in traces if trace.chunks]
    steps = sorted([(trace.chunks[-1], -1) for trace in begun] + [(trace.sent, 1) for trace in begun])
    running = peak = 0
    for _, step in steps:  # at equal times an end comes before a beginning
        running += step
        peak = max(peak, running)
    return peak


def peak_tokens(traces: Sequence[Trace]) -> float | None:
    """The most tokens in any second, counted from the first request; each piece of an answer counts for as
    many as the answer's others, since how many came in it is not told."""
    if not traces or _total(traces, "completion_tokens") is None:
        return None
    start = min(trace.sent for trace in traces)
    times = np.concatenate([trace.chunks for trace in traces]) - start
    weights = np.concatenate(
        [np.full(len(trace.chunks), (trace.completion_tokens or 0) / len(trace.chunks)) for trace in traces]
    )
    return float(np.bincount(times.astype(np.int64), weights).max())


class _Speculation(msgspec.Struct):
    """What is used of ``metrics.speculative_decoding``."""

    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    acceptance_histogram: list[int]  # entry i: steps in which i draft tokens were accepted


class _Metrics(msgspec.Struct):
    speculative_decoding: _Speculation | None = None


def acceptance(traces: Sequence[Trace]) -> Figures:
    """Acceptance over all requests of which the server tells it; empty if it tells none.

    vLLM's keys, the rate in percent as there. The last one is aiperf's: emitted tokens per token that the
    target had to score, the honest price of trees. A position is a depth of the tree.
    """
    told = [found for trace in traces if (found := _speculation(trace)) is not None]
    steps = sum(one.num_spec_steps for one in told)
    accepted = sum(one.num_accepted_draft_tokens for one in told)
    drafted = sum(one.num_draft_tokens for one in told)
    if not steps or not drafted:
        return {}
    histogram = [0] * max(len(one.acceptance_histogram) for one in told)
    for one in told:
        for number, count in enumerate(one.acceptance_histogram):
            histogram[number] += count
    reached = [sum(histogram[depth:]) / steps for depth in range(1, len(histogram))]
    return {
        "spec_decode_acceptance_rate": 100 * accepted / drafted,
        "spec_decode_acceptance_length": 1 + accepted / steps,
        "spec_decode_num_drafts": steps,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": reached,
        "spec_decode_accepted_per_verified": (accepted + steps) / (drafted + steps),
    }


def _speculation(trace: Trace) -> _Speculation | None:
    """None, too, where a server means something else by the name."""
    try:
        return msgspec.convert(trace.metrics, _Metrics).speculative_decoding
    except msgspec.ValidationError:
        return None


def by_kind(traces: Sequence[Trace]) -> dict[str, Figures]:
    """The main figures of each kind of prompt."""
    kinds: dict[str, list[Trace]] = {}
    for trace in traces:
        kinds.setdefault(trace.ask.kind, []).append(trace)
    found = {}
    for kind, group in kinds.items():
        good = _answered(group)
        found[kind] = {
            "completed": len(good),
            "failed": len(group) - len(good),
            "total_output_tokens": _total(good, "completion_tokens"),
            "median_ttft_ms": spread("ttft", samples(good, "ttft"), ())["median_ttft_ms"],
            "median_tpot_ms": spread("tpot", samples(good, "tpot"), ())["median_tpot_ms"],
            "acceptance_length": acceptance(good).get("spec_decode_acceptance_length"),
        }
    return found


def detail(traces: Sequence[Trace]) -> Figures:
    """One entry per request that was sent, under vLLM's keys; times in seconds, zero where there is none."""
    start = min((trace.sent for trace in traces), default=0.0)
    return {
        "input_lens": [trace.prompt_tokens or 0 for trace in traces],
        "output_lens": [trace.completion_tokens or 0 for trace in traces],
        "ttfts": [trace.ttft if trace.chunks else 0.0 for trace in traces],
        "itls": [trace.gaps for trace in traces],
        "start_times": [trace.sent - start for trace in traces],
        "delays": [trace.delay for trace in traces],
        "kinds_of_prompts": [trace.ask.kind for trace in traces],
        "generated_texts": [trace.text for trace in traces],
        "errors": ["" if trace.error is None else str(trace.error) for trace in traces],
    }


Pair = tuple[Part, Part]  # one block of prompts on two servers
_Figure = Callable[[int, Iterable[int]], float | None]  # of side 0 or 1, over the blocks with these numbers


def compare(
    blocks: Sequence[Pair], rng: np.random.Generator, num_resamples: int = 1000
) -> dict[str, Figures]:
    """Ratios second / first, with intervals that hold the true ratio 19 times in 20 if blocks are alike.

    A bootstrap over whole blocks, both servers' sides of a block together: requests of a block share the
    machine's mood and are not independent, blocks nearly are. Of a single block there is no interval.
    """
    whole = np.arange(len(blocks))
    draws = rng.integers(0, len(blocks), size=(num_resamples if len(blocks) > 1 else 0, len(blocks)))
    ratios = {}
    for name, figure in _compared(blocks).items():
        drawn = [_ratio(figure(1, draw), figure(0, draw)) for draw in draws]
        known = [ratio for ratio in drawn if ratio is not None]
        low, high = map(float, np.percentile(known, [2.5, 97.5])) if known else (None, None)
        first, second = figure(0, whole), figure(1, whole)
        ratios[name] = {"first": first, "second": second, "ratio": _ratio(second, first)}
        ratios[name] |= {"low": low, "high": high}
    return ratios


def _compared(blocks: Sequence[Pair]) -> dict[str, _Figure]:
    sides = list(zip(*blocks, strict=True))

    def latency(metric: str, reduce: Callable[[np.ndarray], Any]) -> _Figure:
        values = [[np.asarray(samples(part.traces, metric)) * _MS for part in side] for side in sides]

        def figure(side: int, draw: Iterable[int]) -> float | None:
            drawn = np.concatenate([values[side][number] for number in draw])
            return float(reduce(drawn)) if drawn.size else None

        return figure

    tokens = [[_total(_answered(part.traces), "completion_tokens") for part in side] for side in sides]

    def throughput(side: int, draw: Iterable[int]) -> float | None:
        seconds = sum(sides[side][number].duration for number in draw)
        return _ratio(_sum(tokens[side][number] for number in draw), seconds)

    found: dict[str, _Figure] = {"output_throughput": throughput}
    for metric in GOALS:
        found |= {
            f"mean_{metric}_ms": latency(metric, np.mean),
            f"median_{metric}_ms": latency(metric, np.median),
        }
    return found


def equal_share(blocks: Sequence[Pair]) -> float | None:
    """Share of prompts that both answered, and answered alike."""
    pairs = [
        (a, b)
        for block in blocks
        for a, b in zip(block[0].traces, block[1].traces, strict=False)  # the last may be cut short
        if a.error is None and b.error is None
    ]
    return _ratio(sum(a.text == b.text for a, b in pairs), len(pairs))


def _counted(traces: Sequence[Trace]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trace in traces:
        if trace.error is not None:
            counts[str(trace.error)] = counts.get(str(trace.error), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _answered(traces: Iterable[Trace]) -> list[Trace]:
    return [trace for trace in traces if trace.error is None]


def _total(traces: Iterable[Trace], name: str) -> int | None:
    return _sum(getattr(trace, name) for trace in traces)


def _sum(numbers: Iterable[int | None]) -> int | None:
    """The sum of counts, None if one of them is not known."""
    found = list(numbers)
    return None if None in found else sum(cast(list[int], found))


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
