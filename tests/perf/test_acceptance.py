"""Counting by depth and rank on trees small enough to check by hand, and what the cells share and do not."""

from __future__ import annotations

from typing import Any

import pytest

from draft.head import FeatureDraft
from engine.core import SPECULATION_OFF, Speculation
from engine.errors import ConfigError
from perf import acceptance
from perf.acceptance import Bench, Cell, NoiseSwitch, Walks, cells
from perf.latency import Prompt, Row, Run, interleave
from perf.shapes import shape, shapes
from tests.engine.rig import echo_model, make_engine, random_model

# 0 -> 1 [rank 0] -> 3 [rank 0]
#      1          -> 4 [rank 1]
# 0 -> 2 [rank 1] -> 5 (lookup) -> 6 (lookup)
TREE: dict[str, Any] = {
    "parents": [-1, 0, 0, 1, 1, 2, 5],
    "rank": [0, 0, 1, 0, 1, 0, 0],
    "raw": [1.0, 0.6, 0.4, 0.1, 0.5, 0.0, 0.0],
}


def walked(*accepted: list[int]) -> Walks:
    found = Walks()
    for path in accepted:
        found.add(TREE | {"accepted": path})
    return found


def test_a_walk_is_counted_as_far_as_it_was_judged() -> None:
    found = walked([1, 4], [2, 5], [], [1])
    found.add({"parents": [-1], "accepted": []})  # a plain step
    assert (found.num_steps, found.num_drafted, found.num_drafting_steps) == (5, 24, 4)
    rows = [(row["depth"], row["offered"], row["accepted"]) for row in found.by_depth()]
    # node 4 has no children: its walk was not judged at depth 3; node 5 has one, which was refused
    assert rows == [(1, 4, 3), (2, 3, 2), (3, 1, 0)]
    assert found.by_depth()[0]["acceptance"] == 0.75


def test_ranks_count_where_the_walk_came_by() -> None:
    found = walked([1, 4], [2, 5], [], [1])
    rows = {row["rank"]: (row["offered"], row["accepted"]) for row in found.by_rank()}
    # rank 0: node 1 four times (two taken), node 3 twice; rank 1: node 2 four times (one taken), node 4 twice
    assert rows == {"0": (6, 2), "1": (6, 2), "lookup": (2, 1)}
    assert list(rows) == ["0", "1", "lookup"]


def test_a_draft_without_scores_is_all_lookup() -> None:
    found = Walks()
    found.add({"parents": [-1, 0, 1], "accepted": [1]})
    assert found.by_rank() == [{"rank": "lookup", "offered": 2, "accepted": 1, "acceptance": 0.5}]


def run_of(tokens: int, seconds: float, steps: int, *accepted: list[int]) -> Run:
    records = [TREE | {"accepted": path} for path in accepted]
    times = ([seconds / steps] * steps, [0.001] * steps, [0.002] * steps)
    return Run(list(range(tokens + 1)), tokens, 1.0, seconds, seconds + 1.0, *times, records)


def test_a_cell_is_compared_with_plain_decoding_at_its_temperature() -> None:
    asked = cells(shapes(["4/3/1"]), [0.0, 1.0], [True, False])
    assert [cell.name for cell in asked] == [
        "plain at 0",
        "4/3/1 at 0",
        "plain at 1",
        "4/3/1 at 1, shared noise",
        "4/3/1 at 1, no shared noise",
    ]
    speeds = [10.0, 20.0, 5.0, 15.0, 10.0]
    rows = [
        Row(
            Prompt(kind, kind, "x"),
            0,
            {
                cell.name: run_of(30, 30 / speed / (2 if kind == "b" else 1), 15, [1], [])
                for cell, speed in zip(asked, speeds, strict=True)
            },
        )
        for kind in ("a", "b")
    ]
    found = acceptance.report(rows, asked)
    assert [cell["speedup"] for cell in found] == [1.0, 2.0, 1.0, 3.0, 2.0]
    assert found[0]["tok_s"] == pytest.approx(60 / 4.5, abs=1e-3)  # 30 tokens in 3 s and 30 in 1.5 s
    assert found[0]["kinds"]["b"]["tok_s"] == 20.0
    assert found[3]["acceptance_length"] == 2.0
    assert (found[3]["shared_noise"], found[4]["shared_noise"]) == (True, False)
    assert found[0]["kinds"]["a"]["by_depth"][0] == {
        "depth": 1,
        "offered": 2,
        "accepted": 1,
        "acceptance": 0.5,
    }


@pytest.mark.parametrize("draft", ["eagle3", "ngram"])
def test_every_cell_emits_what_plain_decoding_does(draft: str) -> None:
    """Seeds are the same in all cells, and change from one answer of a prompt to its next."""
    engine = make_engine(echo_model(), draft)
    noises = [True, False] if draft == "eagle3" else [True]
    asked = cells(shapes(["4/3/1", "8/4/3", "auto"]), [0.0, 1.0], noises)
    prompts = [Prompt(name, "k", name) for name in "ab"]
    tokens = {"a": (5, 9, 33, 2), "b": (7, 7, 8)}
    bench = Bench(engine, len(noises) > 1, lambda prompt: tokens[prompt.id], 24)
    rows = list(interleave(prompts, {cell.name: bench.mode(cell) for cell in asked}, 2))
    found = acceptance.report(rows, asked)
    assert {cell["texts_equal_share"] for cell in found} == {1.0}
    sampled = [row.runs["plain at 1"].token_ids for row in rows if row.prompt.id == "a"]
    assert sampled[0] != sampled[1]
    for row in rows:
        for run in row.runs.values():
            assert len(run.records) == len(run.step_s) > 0
            assert sum(1 + len(record["accepted"]) for record in run.records) >= run.decode_tokens
    trees = [cell for cell in found if cell["family"] == "tree"]
    if draft == "eagle3":
        assert all(cell["by_depth"][0]["accepted"] > 0 for cell in trees)
        assert all(cell["acceptance_length"] > 1 for cell in trees)


def test_noise_is_switched_together_with_what_was_learned_under_it() -> None:
    engine = make_engine(echo_model(), "eagle3")
    draft = engine.draft
    assert isinstance(draft, FeatureDraft)
    switch, shared = NoiseSwitch(engine), draft.calibration

    def state() -> tuple[bool, bool]:
        return draft.shared_noise, draft.calibration is shared

    switch.set(False)
    assert state() == (False, False)
    bench = Bench(engine, True, lambda prompt: (5, 9, 33, 2), 16)
    bench.mode(Cell(shape("8/4/3"), 1.0, False))(Prompt("a", "k", "x"))
    assert shared.trials.sum() == 0
    switch.set(True)
    assert state() == (True, True)


def test_a_draft_without_scores_has_no_noise_to_share() -> None:
    with pytest.raises(ConfigError, match="found the draft 'none'"):
        NoiseSwitch(make_engine(random_model(), "none"))


def test_shapes() -> None:
    assert shape("8/4/4+lookup8").speculation == Speculation(8, 4, 4, 8)
    assert shape("4/3/1").speculation == Speculation(4, 3, 1)
    assert shape("auto").speculation is None
    assert shape("1/0/1").speculation == shape("plain").speculation == SPECULATION_OFF
    found = shapes(["1/0/1", "4/3/1", "8/4/4", "4/3/1", "auto"])
    assert [(one.name, one.family) for one in found] == [
        ("plain", "plain"),
        ("4/3/1", "chain"),
        ("8/4/4", "tree"),
        ("auto", "auto"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8/4", "expected plain, auto or NODES/DEPTH/TOP_K"),
        ("8/4/4+lookup", "expected plain"),
        ("", "expected plain"),
        ("99/4/4", "expected nodes of 1 to 64"),
        ("8/4/0", "top_k of 1 to 16"),
    ],
)
def test_a_bad_shape_says_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(text)
