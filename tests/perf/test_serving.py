"""The figures of a serving benchmark, on traces made by hand and against a slow oracle."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from engine.cli.client import ServerError
from perf import serving
from perf.load import Part, Trace
from perf.serving import Asked
from perf.workload import Ask


def trace(
    *chunks: float,
    sent: float = 0.0,
    tokens: int | None = None,
    kind: str = "prose",
    spec: dict[str, Any] | None = None,
    error: str | None = None,
    text: str = "",
) -> Trace:
    due = sent - 0.125  # how late it was sent is part of no latency
    found = Trace(Ask("Hi", kind, 8), due, sent, list(chunks), text, "stop", 10, tokens)
    if spec is not None:
        found.metrics = {"speculative_decoding": spec}
    found.error = None if error is None else ServerError(error)
    return found


TWO = [trace(1.5, 2.0, 4.0, sent=1.0, tokens=6), trace(2.0, 2.25, sent=1.5, tokens=2, kind="code")]
FAILED = trace(1.5, 60.0, sent=1.0, tokens=None, error="it broke")


def test_a_run_by_hand() -> None:
    figures = serving.summarise([*TWO, FAILED], 5, 10.0, Asked(percentiles=(50, 99.9)))
    expected = {
        "duration": 10.0,
        "completed": 2,
        "failed": 1,
        "not_sent": 2,
        "without_usage": 0,
        "total_input_tokens": 20,
        "total_output_tokens": 8,
        "request_throughput": 0.2,
        "request_goodput": None,
        "output_throughput": 0.8,
        "total_token_throughput": 2.8,
        "mean_ttft_ms": 500.0,
        "median_ttft_ms": 500.0,
        "std_ttft_ms": 0.0,
        "mean_tpot_ms": 375.0,  # 2.5 s / 5 and 0.25 s / 1
        "std_tpot_ms": 125.0,
        "mean_itl_ms": pytest.approx(2750 / 3),  # 0.5, 2, 0.25 s: of pieces, whatever they hold
        "median_itl_ms": 500.0,
        "p50_itl_ms": 500.0,
        "mean_e2el_ms": 1875.0,
        "p99.9_e2el_ms": pytest.approx(750 + 0.999 * 2250),
        "error_counts": {"it broke": 1},
    }
    assert {key: figures[key] for key in expected} == expected
    assert not [key for key in figures if key.startswith("spec_decode")]


def test_the_keys_are_those_of_vllm() -> None:
    """What its own tools and others' read."""
    figures = serving.summarise(TWO, 2, 1.0, Asked()) | serving.detail(TWO)
    promised = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens"}
    promised |= {"request_throughput", "request_goodput", "output_throughput", "total_token_throughput"}
    promised |= {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}
    promised |= {"max_output_tokens_per_s", "max_concurrent_requests"}
    for metric in ("ttft", "tpot", "itl", "e2el"):
        promised |= {f"{figure}_{metric}_ms" for figure in ("mean", "median", "std", "p99")}
    assert figures.keys() >= promised


def test_only_what_was_asked_for() -> None:
    figures = serving.summarise(TWO, 2, 1.0, Asked(("tpot",), (25,)))
    latencies = [key for key in figures if key.endswith("_ms")]
    assert latencies == ["mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p25_tpot_ms"]


def test_nothing_measured_is_no_zero() -> None:
    figures = serving.summarise([FAILED], 1, 2.0, Asked(goals={"ttft": 1e9}))
    assert figures["completed"] == figures["total_output_tokens"] == figures["request_goodput"] == 0
    assert figures["mean_ttft_ms"] is figures["p99_tpot_ms"] is figures["std_itl_ms"] is None
    assert serving.summarise([], 4, 0.0, Asked())["request_throughput"] is None
    assert serving.detail([trace(error="x")])["ttfts"] == [0.0]


def test_tokens_that_nobody_counted() -> None:
    figures = serving.summarise([*TWO, trace(1.5, 3.5, sent=1.0)], 3, 1.0, Asked())
    assert figures["without_usage"] == 1
    assert figures["total_output_tokens"] is figures["output_throughput"] is None
    assert figures["max_output_tokens_per_s"] is None
    assert figures["mean_tpot_ms"] == 375.0
    assert figures["mean_ttft_ms"] == 500.0


def oracle(values: list[float], percentile: float) -> float:
    """Linear between the two ranks around it."""
    ranked = sorted(values)
    place = percentile / 100 * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


@pytest.mark.parametrize("seed", range(5))
def test_against_a_slow_oracle(seed: int) -> None:
    rng = random.Random(seed)
    traces = []
    for _ in range(rng.randint(1, 60)):
        sent = rng.uniform(0, 20)
        chunks = sorted(sent + rng.expovariate(0.3) for _ in range(rng.randint(1, 9)))
        tokens = len(chunks) + rng.randint(0, 9)
        traces.append(trace(*chunks, sent=sent, tokens=tokens, error="x" if rng.random() < 0.2 else None))
    good = [one for one in traces if one.error is None]
    by_metric = {
        "ttft": [one.chunks[0] - one.sent for one in good],
        "e2el": [one.chunks[-1] - one.sent for one in good],
        "itl": [one.chunks[i] - one.chunks[i - 1] for one in good for i in range(1, len(one.chunks))],
        "tpot": [
            (one.chunks[-1] - one.chunks[0]) / (one.completion_tokens - 1)
            for one in good
            if one.completion_tokens is not None and one.completion_tokens > 1
        ],
    }
    figures = serving.summarise(traces, len(traces), 30.0, Asked(percentiles=(0, 12.5, 50, 99, 100)))
    for metric, values in by_metric.items():
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert figures[f"mean_{metric}_ms"] == pytest.approx(1e3 * mean)
        assert figures[f"std_{metric}_ms"] == pytest.approx(1e3 * math.sqrt(variance))
        assert figures[f"median_{metric}_ms"] == pytest.approx(1e3 * oracle(values, 50))
        for percentile in (0, 12.5, 50, 99, 100):
            found = figures[f"p{percentile:g}_{metric}_ms"]
            assert found == pytest.approx(1e3 * oracle(values, percentile))
    moments = [one.sent for one in traces]
    running = [sum(one.sent <= moment < one.chunks[-1] for one in traces) for moment in moments]
    assert figures["max_concurrent_requests"] == max(running)
    start = min(one.sent for one in good)
    seconds = [0.0] * 200
    for one in good:
        for chunk in one.chunks:
            assert one.completion_tokens is not None
            seconds[int(chunk - start)] += one.completion_tokens / len(one.chunks)
    assert figures["max_output_tokens_per_s"] == pytest.approx(max(seconds))


def test_goodput() -> None:
    def good(one: Trace, **goals: float) -> bool:
        return serving.meets(one, goals)

    one = trace(1.0, 2.0, tokens=5)  # TTFT 1000, TPOT 250, E2EL 2000 ms
    assert good(one, ttft=1000, tpot=250, e2el=2000)
    assert not good(one, ttft=999, tpot=250, e2el=2000)
    assert not good(one, ttft=1000, tpot=249, e2el=2000)
    assert not good(one, e2el=1999)
    assert good(trace(1.0, tokens=1), tpot=0)  # there is no further token that could be late
    assert not good(trace(1.0, 2.0), tpot=1e9)  # nobody knows
    assert good(trace(1.0, 2.0), ttft=1e9)
    figures = serving.summarise([one, one, trace(5.0, tokens=1), FAILED], 8, 4.0, Asked(goals={"ttft": 1000}))
    assert (figures["request_goodput"], figures["goodput_share"]) == (0.5, 0.25)


def spec(steps: int, drafted: int, *histogram: int) -> dict[str, Any]:
    accepted = sum(number * count for number, count in enumerate(histogram))
    return {
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "acceptance_histogram": list(histogram),
        "mean_acceptance_length": 99,
    }


def test_acceptance_is_pooled_over_steps_and_not_over_requests() -> None:
    told = [trace(1, spec=spec(10, 30, 4, 3, 2, 1)), trace(1, spec=spec(2, 4, 0, 2)), trace(1)]
    assert serving.acceptance(told) == {
        "spec_decode_num_drafts": 12,
        "spec_decode_draft_tokens": 34,
        "spec_decode_accepted_tokens": 12,
        "spec_decode_acceptance_rate": pytest.approx(100 * 12 / 34),
        "spec_decode_acceptance_length": 2.0,
        "spec_decode_per_position_acceptance_rates": pytest.approx([8 / 12, 3 / 12, 1 / 12]),
        "spec_decode_accepted_per_verified": pytest.approx(24 / 46),
    }
    # accepted tokens are the sum over positions
    assert sum(serving.acceptance(told)["spec_decode_per_position_acceptance_rates"]) * 12 == 12


@pytest.mark.parametrize("told", [None, spec(0, 0, 0), {}, {"num_spec_steps": "many"}])
def test_servers_that_do_not_tell_have_no_acceptance(told: dict[str, Any] | None) -> None:
    assert serving.acceptance([trace(1, spec=told)]) == {}


def test_kinds() -> None:
    kinds = serving.by_kind([*TWO, FAILED, trace(1.0, tokens=1, kind="code", spec=spec(1, 3, 0, 1))])
    assert kinds == {
        "prose": {
            "completed": 1,
            "failed": 1,
            "total_output_tokens": 6,
            "median_ttft_ms": 500.0,
            "median_tpot_ms": 500.0,
            "acceptance_length": None,
        },
        "code": {
            "completed": 2,
            "failed": 0,
            "total_output_tokens": 3,
            "median_ttft_ms": 750.0,
            "median_tpot_ms": 250.0,
            "acceptance_length": 2.0,
        },
    }


def part(rng: np.random.Generator, pace: float, tokens: int = 11) -> Part:
    """Five requests whose times are ``pace`` times random ones."""
    traces = []
    for _ in range(5):
        ttft, decode = pace * rng.uniform(0.5, 1.5, size=2)
        traces.append(trace(ttft, ttft + decode, tokens=tokens))
    return Part(traces, pace * 3.0)


def test_twice_as_slow_is_twice_in_every_draw() -> None:
    pairs = [(part(np.random.default_rng(n), 1.0), part(np.random.default_rng(n), 2.0)) for n in range(6)]
    ratios = serving.compare(pairs, np.random.default_rng(0), 200)
    assert len(ratios) == 7
    for name, found in ratios.items():
        wanted = 0.5 if name == "output_throughput" else 2.0
        assert [found[key] for key in ("ratio", "low", "high")] == pytest.approx([wanted] * 3), name
        assert found["second"] == pytest.approx(wanted * found["first"])
    assert ratios["output_throughput"]["first"] == pytest.approx(55 / 3)


def test_an_interval_holds_the_true_ratio_about_19_times_in_20() -> None:
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        moods = rng.uniform(0.5, 3.0, size=12)  # of the machine, in a block
        pairs = [(part(rng, 1.0 * mood), part(rng, 1.2 * mood)) for mood in moods]
        found = serving.compare(pairs, rng, 100)["mean_ttft_ms"]
        held += found["low"] <= 1.2 <= found["high"]
    assert 34 <= held <= 39


def test_one_block_has_no_interval_and_nothing_answered_no_ratio() -> None:
    rng = np.random.default_rng(0)
    found = serving.compare([(part(rng, 1.0), part(rng, 1.0))], rng)["mean_tpot_ms"]
    assert found["ratio"] is not None
    assert found["low"] is found["high"] is None
    pairs = [(part(rng, 1.0), Part([FAILED], 1.0))] * 2
    found = serving.compare(pairs, rng, 20)["mean_tpot_ms"]
    assert (found["second"], found["ratio"], found["low"]) == (None, None, None)


def test_equal_answers_are_counted_among_those_that_both_gave() -> None:
    def block(*texts: str | None) -> Part:
        return Part([trace(1, text=text or "", error=None if text else "x") for text in texts], 1.0)

    pairs = [(block("a", "b", None), block("a", "c", "d")), (block("e", "f"), block("e"))]
    assert serving.equal_share(pairs) == pytest.approx(2 / 3)
    assert serving.equal_share([(block(None), block("a"))]) is None
