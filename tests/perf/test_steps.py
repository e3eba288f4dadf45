"""The bench of steps: that it times the engine's own steps behind the contexts asked for, counts the experts
that they choose, keeps to its time, and says what it left out. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draft.head import FeatureDraft
from engine.build import build_engine
from engine.checkpoint.published import published_head, published_target
from engine.cli.main import main
from engine.cli.roofline import routing_overlap, step_bytes
from engine.config import EngineConfig
from engine.core import Batch, DraftTree, Scores
from engine.errors import EngineError
from engine.graphs import Graphs
from engine.step import Engine
from perf.kernel_timing import Ceilings
from perf.step_costs import ALIKE, UNIFORM, Costs, Floors, Wanted, assumed, emitted, memory
from perf.steps import NoRoomError, Setting, Steps, recorded_routing
from tests.engine.rig import assert_idle

NAME = "mistral-small-4-tiny"
CONFIG = EngineConfig(
    max_model_len=400, page_size=8, max_num_seqs=4, kv_cache_memory=1 << 21, planned=False,
    draft_max_model_len=400,
)  # fmt: skip
LIMITS = Ceilings(1e9, 1e12, 2e12, "made up")


def tiny_engine() -> Engine:
    return build_engine(published_target(NAME), (), published_head(NAME), CONFIG)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps(tiny_engine(), num_steps=2)


@pytest.fixture(autouse=True)
def idle_afterwards(steps: Steps) -> Iterator[None]:
    yield
    assert_idle(steps.engine)


class Seen:
    """What a target was asked to score: kv_lens and nodes of every decode, rows of prompts."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decodes: list[tuple[list[int], int]] = []
        self.prompt_rows = 0
        score = engine.target.score

        def watched(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
            for batch, tree in zip(batches, trees, strict=True):
                if batch.prompt is None:
                    self.decodes.append((batch.kv_lens.tolist(), int(tree.real().sum()) // len(batch.seqs)))
                else:
                    self.prompt_rows += sum(batch.prompt.lengths)
            return score(batches, trees)

        monkeypatch.setattr(engine.target, "score", watched)


# --- the engine's own steps


@pytest.mark.parametrize(
    "setting", [Setting(1, 96, 1), Setting(1, 96, 4), Setting(3, 40, 8), Setting(2, 41, 12)]
)
def test_what_is_timed_is_what_was_asked_for(
    steps: Steps, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(steps.engine, monkeypatch)
    timing = steps.time(setting)
    counted = seen.decodes[-timing.num_steps :]
    assert len(counted) == timing.num_steps == 2
    for kv_lens, nodes in counted:
        assert nodes == setting.nodes
        assert len(kv_lens) == setting.batch
        assert all(setting.context <= kv_len < setting.context + 40 for kv_len in kv_lens)
    # Nothing of the context was computed but its last page, which is not full.
    assert 0 < seen.prompt_rows <= setting.batch * (CONFIG.page_size + 1)
    assert timing.tokens >= 1
    assert min(timing.step_ms, timing.draft_ms, timing.verify_ms) > 0


def test_a_prompt_is_computed_whole(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(steps.engine, monkeypatch)
    assert steps.time_to_first_token(100, 2) > 0
    assert seen.prompt_rows == 200
    assert seen.decodes == []


def test_rows_that_nobody_wrote_are_random(steps: Steps) -> None:
    draft = steps.engine.draft
    assert isinstance(draft, FeatureDraft)
    for rows in (steps.target.pool.rows, draft.model.pool.rows):
        assert float(rows[-1, 0, 0, -CONFIG.page_size :].std()) == pytest.approx(1, abs=0.3)


def test_a_cache_that_is_too_small_is_said(steps: Steps) -> None:
    with pytest.raises(NoRoomError, match="400 x 96 tokens need"):
        steps.time(Setting(400, 96 - 100, 1))


def test_trees_that_are_not_as_asked_for_are_not_timed() -> None:
    """A head that does not follow so long a sequence drafts nothing."""
    short = dataclasses.replace(CONFIG, draft_max_model_len=30)
    engine = build_engine(published_target(NAME), (), published_head(NAME), short)
    with pytest.raises(EngineError, match="0 steps had such trees, expected 5"):
        Steps(engine, num_steps=2).time(Setting(1, 40, 4))
    assert_idle(engine)


def test_logits_that_are_no_numbers_end_the_run() -> None:
    engine = tiny_engine()
    bench = Steps(engine, num_steps=1)
    bench.target.norm.fill_(math.nan)
    with pytest.raises(EngineError, match="hold no number"):
        bench.time(Setting(1, 40, 1))
    with pytest.raises(EngineError, match="a prompt of 20 tokens: .* hold no number"):
        bench.time_to_first_token(20, 1)


# --- what is chosen


def test_distinct_experts_are_those_of_the_routers(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token chooses as many as a token chooses; many choose about as many as independent ones."""
    assert steps.experts(Setting(1, 40, 1)) == 2
    found = steps.experts(Setting(3, 40, 8))
    assert found is not None
    assert 6 < found <= 8
    kept: list[list[Tensor]] = []

    @contextmanager
    def kept_routing() -> Iterator[list[Tensor]]:
        with recorded_routing() as chosen:
            kept.append(chosen)
            yield chosen

    monkeypatch.setattr("perf.steps.recorded_routing", kept_routing)
    for setting in (Setting(1, 40, 2), Setting(2, 40, 2), Setting(1, 40, 3), Setting(2, 40, 3)):
        counted = steps.experts(setting)
        chosen = kept[-1]
        assert [ids.shape for ids in chosen] == [(setting.batch * setting.nodes, 2)] * 2
        assert counted == sum(len(set(ids.flatten().tolist())) for ids in chosen) / 2


def test_alike_texts_choose_alike(steps: Steps) -> None:
    again = Steps(steps.engine, num_steps=2, seed=7)  # whatever ran before

    def mean_experts(share: float) -> float:
        again.make_alike(share)
        assert float(again.target.embedding.std()) == pytest.approx(1, abs=0.2)
        counts = [again.experts(Setting(1, 40, 4)) for _ in range(8)]
        return sum(count or 0 for count in counts) / len(counts)

    independent = mean_experts(0.0)
    assert independent == pytest.approx(8 * (1 - 0.75**4), abs=0.8)
    assert mean_experts(1.0) < independent - 2
    share = again.share_for(0.5, 40)
    assert 0 < share < 1
    assert routing_overlap(8, 2, 4, mean_experts(share)) == pytest.approx(0.5, abs=0.35)
    again.make_alike(0.0)


# --- what it comes to


def floors() -> Floors:
    return Floors.of(published_target(NAME), published_head(NAME), CONFIG, LIMITS)


def test_floors_by_hand() -> None:
    at = floors()
    assert at.head is not None
    setting = Setting(2, 100, 4)
    num_bytes = (
        at.target.always + at.target.experts * 5 / 8 + 8 * at.target.token_row + 200 * at.target.kv_row
    )
    assert at.verify_ms(setting, 5.0) == pytest.approx(num_bytes / 1e6)
    assert at.draft_ms(setting) == pytest.approx(3 * step_bytes(at.head, 1, 2, 100) / 1e6)
    assert at.draft_ms(Setting(1, 100, 1)) == 0
    # 600 tokens run as 512 and 88
    chunks = step_bytes(at.target, 512, context=0) + step_bytes(at.target, 88, context=512)
    assert at.prompt_ms(600) == pytest.approx(chunks / 1e6)
    slow = Floors(at.checkpoint, at.target, at.head, Ceilings(1e9, 1e9, 1e9, ""), 512)
    assert slow.prompt_ms(600) > at.prompt_ms(600)


def row(nodes: int, step_ms: float, routing: str = UNIFORM, batch: int = 1) -> dict[str, Any]:
    return {"routing": routing, "batch": batch, "context": 9, "nodes": nodes, "step_ms": step_ms}


def test_assumed_acceptance_by_hand() -> None:
    """0.8, then 0.7 of that: 2.36 tokens in 5 ms, against one in 2.5."""
    assert emitted((0.8, 0.7, 0.6)) == pytest.approx(1 + 0.8 + 0.56 + 0.336)
    found = assumed([row(1, 2.5), row(3, 5.0), row(8, 6.0), row(2, 3.0, batch=4), row(2, 1.0, ALIKE)])
    assert [(one["assumed_acceptance"], one["levels"], one["routing"]) for one in found] == [
        ("high", 2, UNIFORM),
        ("middle", 2, UNIFORM),
    ]
    assert found[0]["tokens_per_step"] == pytest.approx(2.36)
    assert found[0]["tok_s"] == pytest.approx(472)
    assert found[0]["speedup"] == pytest.approx(1.18)


def test_memory_is_what_tensors_hold(steps: Steps) -> None:
    found = memory(steps)
    draft = steps.engine.draft
    assert isinstance(draft, FeatureDraft)
    assert found["kv_pools"] == steps.target.pool.rows.nbytes + draft.model.pool.rows.nbytes
    reads = floors()
    assert reads.head is not None
    # The target's output is the head's too; its embedding, as large, is not read whole by either.
    read = reads.target.always + reads.target.experts + reads.head.always
    assert found["weights"] == pytest.approx(read, rel=0.1)
    assert found["allocated"] is None


class Ticking:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_time_is_kept_and_what_is_missing_is_named(steps: Steps) -> None:
    wanted = Wanted(
        nodes=(1, 2), batches=(1, 2, 300), contexts=(40, 48), prompts=(9, 10, 11), num_steps=2, seconds=7
    )
    costs = Costs(steps, floors(), wanted, Ticking())
    tried = list(costs.measure(0.0))
    assert tried == [
        "uniform: 1 x 40, 1 nodes", "uniform: 1 x 40, 2 nodes", "prompt of 9", "prompt of 10",
        "alike: how much texts have in common", "alike: 1 x 40, 1 nodes", "alike: 1 x 40, 2 nodes",
    ]  # fmt: skip
    assert [(one["routing"], one["nodes"]) for one in costs.rows] == [
        (UNIFORM, 1), (UNIFORM, 2), (ALIKE, 1), (ALIKE, 2),
    ]  # fmt: skip
    left = [one["what"] for one in costs.left_out]
    assert left == [
        "uniform again", "uniform: 1 x 48, 1 nodes", "uniform: 2 x 40, 1 nodes", "uniform: 300 x 40, 1 nodes",
        "prompt of 11", "uniform: 2 x 48, 1 nodes", "uniform: 300 x 48, 1 nodes",
    ]  # fmt: skip
    assert {one["why"] for one in costs.left_out} == {"7 s had passed"}
    steps.make_alike(0.0)


def test_steps_are_timed_with_dependent_launches_and_without(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where graphs hold launches, which here they only claim to."""
    wanted = Wanted(nodes=(1, 4), batches=(1,), contexts=(40,), prompts=(9,), num_steps=2, seconds=99)
    graphs, asked = steps.engine.graphs, list[bool]()
    start_over = graphs.start_over

    def told(pdl: bool) -> None:
        asked.append(pdl)
        start_over(pdl)

    monkeypatch.setattr(Graphs, "are_on", True)
    monkeypatch.setattr(graphs, "start_over", told)
    for able in (False, True):
        monkeypatch.setattr("perf.step_costs.can_be_dependent", lambda device, able=able: able)
        costs = Costs(steps, floors(), wanted, Ticking())
        list(costs.measure(0.0))
        assert [one["what"] for one in costs.left_out] == ([] if able else ["dependent launches"])
    assert [(one["nodes"], one["pdl"]) for one in costs.launches] == [
        (1, True),
        (1, False),
        (4, True),
        (4, False),
    ]
    assert asked == [True, False, False, False] * 2, "each time as asked for, and then as it was"
    assert len(costs.rows) == 4, "and they are not among the other figures"
    steps.make_alike(0.0)


def test_without_room_the_rest_goes_on(steps: Steps) -> None:
    wanted = Wanted(nodes=(1,), batches=(1, 300), contexts=(40,), prompts=(9,), num_steps=2, seconds=99)
    costs = Costs(steps, floors(), wanted, Ticking())
    assert len(list(costs.measure(0.0))) == 6
    (left,) = costs.left_out
    assert left["what"] == "uniform: 300 x 40, 1 nodes"
    assert "pages of the KV cache, which has" in left["why"]
    assert [one["batch"] for one in costs.rows] == [1, 1]
    assert [one["tokens"] for one in costs.prompts] == [9]
    steps.make_alike(0.0)


# --- the command line


def bench(*words: object) -> int:
    common = ("--load-format", "dummy", "--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "8MiB")
    return main(["bench", "latency", *map(str, words), *common])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    words = ["--model", NAME, "--quantization", "nvfp4", "--num-hidden-layers", 1, "--contexts", 40]
    words += ["--prompt-lens", 9, "--batches", 2, "--nodes", 2, 4, "--steps", 1, "--json", out]
    assert bench(*words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert (result["benchmark"], result["num_layers"], result["quantization"]) == ("steps", 1, "nvfp4")
    figures = [(one["routing"], one["batch"], one["nodes"]) for one in result["steps"]]
    assert figures == [
        (UNIFORM, 1, 1), (UNIFORM, 1, 2), (UNIFORM, 1, 4), (ALIKE, 1, 1), (ALIKE, 1, 2), (ALIKE, 1, 4),
        (UNIFORM, 2, 1), (UNIFORM, 2, 4),
    ]  # fmt: skip
    assert [one["tokens"] for one in result["prompts"]] == [9]
    assert result["left_out"] == []
    for one in result["steps"]:
        assert one["floor_ms"] > 0
        assert ("draft_floor_ms" in one) == (one["nodes"] > 1)
    assert {one["assumed_acceptance"] for one in result["assumed"]} == {"high", "middle"}
    assert result["weights"] == "random"


def test_too_little_memory_is_told_as_at_any_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_engine(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ..")

    monkeypatch.setattr("engine.cli.bench_steps.build_engine", build_engine)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 << 30, 80 << 30))
    assert bench("--model", NAME, "--contexts", 40, "--prompt-lens", 9, "--kv-cache-memory", "8MiB") == 1
    assert "out of memory at start: 3.00 GiB were asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", 0), "--nodes is 0, expected at least 1"),
        (("--nodes", 17), "--nodes is 17, expected at most 16"),
        (("--batches", -1), "--batches is -1, expected at least 1"),
        (("--steps", 0), "--steps is 0, expected at least 1"),
        (("--seconds", 0), "--seconds is 0.0, expected more than 0"),
        (("--routing-overlap", 1), "--routing-overlap is 1.0, expected more than 0 and less than 1"),
        (("--contexts", 500), "was made for at most 512 positions"),
        (("--prompt-lens", 512), "was made for at most 512 positions"),
        (("--num-hidden-layers", 3), "has 2 layers, found 3 asked for, expected 1 to 2"),
        (("--quantization", "int4"), "--quantization is 'int4', expected fp8, nvfp4"),
        (("--spec-method", "eagle3"), "the method asked for is 'eagle3', but the head is one of 'eagle'"),
        (("--max-tokens", 5), "found --max-tokens 5 (flag), which is for answers"),
        (("--max-model-len", 99), "found --max-model-len 99 (flag), which --contexts"),
        (("--json", "/no/such/place/x.json"), "the directory does not exist"),
    ],
)
def test_mistakes_are_told_before_anything_is_filled(
    words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = () if words[0] in ("--contexts", "--prompt-lens") else ("--contexts", 40, "--prompt-lens", 9)
    assert bench(NAME, *words, *few) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_steps_are_for_dummies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", NAME, "--nodes", "2", "--device", "cpu"]) == 1
    assert "found --nodes 2 (flag), expected --load-format dummy with it" in capsys.readouterr().err
