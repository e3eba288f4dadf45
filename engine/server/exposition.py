"""What Prometheus reads at /metrics: the counters and the engine's state as text.

Every metric has haast's name. Those that others have too appear a second time under vLLM's name, so that
dashboards, load balancers and benchmarks made for it work; they are aliases, not another measurement. With
trees, a "position" in vLLM's sense is a depth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from engine.server.runner import EngineRunner
from engine.server.totals import Histogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
_OURS, _BOTH = ("haast:",), ("haast:", "vllm:")


def render(runner: EngineRunner, model_name: str) -> bytes:
    """The text of all metrics. Call on the event loop; of the engine it reads nothing but what the engine's
    thread has laid down."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(runner, model_name))
    return generate_latest(registry)


class _Snapshot(Collector):
    """All metrics at one moment, each labelled with the model."""

    def __init__(self, runner: EngineRunner, model_name: str) -> None:
        self._runner, self._model = runner, {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        runner, state = self._runner, self._runner.state
        yield from self._gauge(_BOTH, "num_requests_running", "Requests that run", state.num_running)
        yield from self._gauge(_BOTH, "num_requests_waiting", "Requests that wait", state.num_waiting)
        yield from self._gauge(
            _BOTH, "kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1", state.kv_usage
        )
        yield from self._gauge(
            _OURS,
            "num_queued_prompt_tokens",
            "Tokens of prompts that have not begun",
            runner.num_queued_tokens,
        )
        for name, what, value in (
            ("num_places_taken", "Answers that were admitted and are not out", runner.in_flight),
            ("num_tasks", "Tasks of the event loop", len(asyncio.all_tasks())),
        ):
            yield from self._gauge(_OURS, name, what, value)
        is_up = runner.failure is None and not runner.is_stalled
        yield from self._gauge(_OURS, "engine_up", "1 while the engine works", float(is_up))
        if state.vocab_coverage is not None:
            what = "Share of the tokens that the draft's vocabulary has"
            yield from self._gauge(_OURS, "draft_vocabulary_coverage", what, state.vocab_coverage)

    def _counters(self) -> Iterator[Metric]:
        totals, state = self._runner.totals, self._runner.state
        for names, name, what, value in (
            (_BOTH, "prompt_tokens", "Tokens of prompts", totals.num_prompt_tokens),
            (_BOTH, "generation_tokens", "Tokens of answers", totals.num_generated_tokens),
            (_BOTH, "prefix_cache_queries", "Tokens of prompts looked up", state.num_asked),
            (_BOTH, "prefix_cache_hits", "Tokens of prompts found", state.num_found),
            (_BOTH, "spec_decode_num_drafts", "Steps that drafted, by request", totals.num_spec_steps),
            (_BOTH, "spec_decode_num_draft_tokens", "Drafted tokens", totals.num_draft_tokens),
            (_BOTH, "spec_decode_num_accepted_tokens", "Accepted draft tokens", totals.num_accepted),
            (_OURS, "unknown_fields", "Fields of bodies that were ignored", totals.num_unknown_fields),
            (_OURS, "failed_steps", "Steps that raised", totals.num_failed_steps),
            (_OURS, "canary_steps", "Steps decoded once more, plainly", state.canary.num_steps),
            (_OURS, "canary_ties", "Tokens that differed by rounding", state.canary.num_ties),
            (_OURS, "canary_bugs", "Tokens that differed otherwise", state.canary.num_bugs),
        ):
            yield from self._counter(names, name, what, [({}, value)])
        depths = enumerate(totals.accepted_at_depth)
        yield from self._counter(
            _BOTH,
            "spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by depth, from 0",
            [({"position": str(depth)}, value) for depth, value in depths],
        )
        finished = [({"finished_reason": reason}, count) for reason, count in totals.finished.items()]
        yield from self._counter(_BOTH, "request_success", "Requests that ended, by reason", finished)
        refused = [({"code": code}, count) for code, count in totals.refused.items()]
        yield from self._counter(_OURS, "requests_refused", "Requests refused, by error code", refused)

    def _histograms(self) -> Iterator[Metric]:
        totals = self._runner.totals
        for name, what, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", totals.first_token),
            ("inter_token_latency_seconds", "Per token, a mean per answer", totals.between_tokens),
            ("e2e_request_latency_seconds", "Arrival to last token", totals.answered),
            ("request_queue_time_seconds", "Arrival to first step", totals.queued),
        ):
            for prefix in _BOTH:
                family = HistogramMetricFamily(prefix + name, what, labels=list(self._model))
                family.add_metric(list(self._model.values()), _buckets(histogram), histogram.total)
                yield family

    def _gauge(self, prefixes: Iterable[str], name: str, what: str, value: float) -> Iterator[Metric]:
        for prefix in prefixes:
            family = GaugeMetricFamily(prefix + name, what, labels=list(self._model))
            family.add_metric(list(self._model.values()), value)
            yield family

    def _counter(
        self, prefixes: Iterable[str], name: str, what: str, samples: list[tuple[dict[str, str], int]]
    ) -> Iterator[Metric]:
        """samples: further labels, of which all have the same, and the count."""
        if not samples:
            return
        for prefix in prefixes:
            family = CounterMetricFamily(prefix + name, what, labels=[*self._model, *samples[0][0]])
            for labels, count in samples:
                family.add_metric([*self._model.values(), *labels.values()], count)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Upper bounds, and how many values lie at or below each."""
    buckets, below = [], 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((str(bound), float(below)))
    return buckets
