"""The replay against logs small enough to check by hand."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from perf import replay, token_cost

# The tree of every record here; ranks in brackets. By value the best four are 0 1 2 3, by raw score 0 1 2 4.
#     0 -> 1 [0] -> 3 [0]
#          1     -> 4 [1]
#     0 -> 2 [1]
TREE: dict[str, Any] = {
    "step": 0,
    "request": 1,
    "context_len": 9,
    "batch_size": 1,
    "temperature": 0.0,
    "tokens": [9, 8, 7, 6, 5],
    "parents": [-1, 0, 0, 1, 1],
    "depth": [0, 1, 1, 2, 2],
    "rank": [0, 0, 1, 0, 1],
    "raw": [1.0, 0.6, 0.4, 0.1, 0.5],
    "value": [1.0, 0.8, 0.2, 0.4, 0.12],
    "draft_ms": 1.0,
    "verify_ms": 2.0,
}


def write_log(path: Path, *accepted: list[int], **changes: Any) -> Path:
    path.write_text("".join(json.dumps(TREE | {"accepted": nodes} | changes) + "\n" for nodes in accepted))
    return path


def test_sub_trees_and_what_they_emit(tmp_path: Path) -> None:
    steps, undrafted = replay.read_log(write_log(tmp_path / "log", [1, 4], [2], [1, 3], []))
    assert undrafted == 0
    three = replay.compare(steps, 3)
    assert three is not None
    # the calibrated tree is the chain 0 1 3, with 2 + 1 + 3 + 1 tokens; the raw tree is 0 1 2: 2 + 2 + 2 + 1
    assert three.observed == {"chain": 1.75, "raw": 1.75, "calibrated": 1.75}
    assert three.expected == {"chain": 2.2, "raw": 2.0, "calibrated": 2.2}
    assert three.expected_raw == {"chain": 1.66, "raw": 2.0, "calibrated": 1.66}
    assert (three.num_steps, three.share) == (4, 1.0)
    assert replay.best_by(steps[0], 4, steps[0].value.__getitem__) == [0, 1, 3, 2]
    assert replay.best_by(steps[0], 4, steps[0].raw_value) == [0, 1, 2, 4]
    assert replay.chain(steps[0], 4) is None
    assert replay.compare(steps, 4) is None  # no chain of four was drafted


def test_a_step_that_cannot_answer_is_left_out_whatever_came_of_it(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [1, 3])
    shallow = TREE | {"parents": [-1, 0, 0], "rank": [0, 0, 1], "raw": [1, 0.5, 0.5], "value": [1, 0.5, 0.5]}
    with log.open("a") as file:
        file.write(json.dumps(shallow | {"accepted": []}) + "\n")
        file.write(json.dumps({"parents": [-1], "accepted": []}) + "\n")
    steps, undrafted = replay.read_log(log)
    assert (len(steps), undrafted) == (2, 1)
    three = replay.compare(steps, 3)
    assert three is not None
    assert (three.num_steps, three.share, three.observed["chain"]) == (1, 0.5, 3.0)


def test_reliability_counts_nodes_with_an_accepted_parent_only(tmp_path: Path) -> None:
    steps, _ = replay.read_log(write_log(tmp_path / "log", [1, 4], [2]))
    buckets, error = replay.reliability(steps, calibrated=False)
    # step 1 has nodes 1 2 3 4, step 2 only 1 and 2: scores .6 .4 .1 .5 .6 .4, accepted 1 0 0 1 0 1
    assert [(b.low, b.count, b.acceptance) for b in buckets] == [
        (0.1, 1, 0.0),
        (0.4, 2, 0.5),
        (0.5, 1, 1.0),
        (0.6, 2, 0.5),
    ]
    assert error == pytest.approx((0.1 * 1 + 0.1 * 2 + 0.5 * 1 + 0.1 * 2) / 6, abs=1e-4)
    calibrated, _ = replay.reliability(steps, calibrated=True)
    assert [(b.low, b.count) for b in calibrated] == [(0.1, 1), (0.2, 2), (0.5, 1), (0.8, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_the_calibrated_tree_promises_no_less_than_the_chain_of_its_size(seed: int) -> None:
    """On simulated trees of any form, at every size; the raw-score tree promises no less by raw scores."""
    chance = random.Random(seed)
    steps = []
    for _ in range(10):
        parents, rank, raw, value = [-1], [0], [1.0], [1.0]
        for node in range(1, 64):
            # odd nodes are the chain, as long as the largest size needs; even ones hang anywhere else
            parent = max(0, node - 2) if node % 2 else chance.randrange(node - 1)
            rank.append(parents.count(parent))
            parents.append(parent)
            raw.append(chance.uniform(0.05, 1))
            value.append(value[parent] * chance.uniform(0.1, 1))
        accepted = {node for node in (1,) if chance.random() < 0.5}
        steps.append(
            replay.Step(
                tuple(parents), tuple(rank), tuple(raw), tuple(value), frozenset(accepted), greedy=True
            )
        )
    for size in range(1, 33):
        found = replay.compare(steps, size)
        assert found is not None
        assert found.num_steps == 10
        assert found.expected["calibrated"] >= found.expected["chain"] - 1e-9
        assert found.expected["calibrated"] >= found.expected["raw"] - 1e-9
        assert found.expected_raw["raw"] >= found.expected_raw["chain"] - 1e-9


def test_time_per_token_is_a_steps_time_over_all_its_requests(tmp_path: Path) -> None:
    def line(step: int, accepted: list[int], **changes: Any) -> str:
        return json.dumps(TREE | {"step": step, "accepted": accepted} | changes) + "\n"

    log = tmp_path / "log"
    plain = {"parents": [-1], "draft_ms": 0.0, "verify_ms": 2.0, "value": [1.0]}
    log.write_text(
        line(0, [1, 4])
        + line(0, [])  # two requests, ten nodes: 3 + 1 tokens in 3 ms
        + line(1, [2])
        + line(1, [1], verify_ms=2.0)  # 2 + 2 tokens in 3 ms
        + line(2, [], **plain)
        + line(0, [], **plain | {"verify_ms": 4.0})  # the log of a second run
    )
    costs = token_cost.read_costs(log)
    assert [(cost.nodes, cost.num_seqs, cost.emitted) for cost in costs] == [
        (10, 2, 4),
        (10, 2, 4),
        (1, 1, 1),
        (1, 1, 1),
    ]
    one, many = token_cost.time_per_token(costs)
    assert (one["nodes_up_to"], one["num_steps"], one["measured_ms"], one["predicted_ms"]) == (1, 2, 3.0, 3.0)
    # values of 0.8 + 0.2 + 0.4 + 0.12 beside the target's own token, of two requests: 5.04 tokens in 3 ms
    assert (many["nodes_up_to"], many["tokens_promised"], many["tokens_emitted"]) == (12, 5.04, 4)
    assert (many["measured_ms"], many["predicted_ms"]) == (0.75, round(3 / 5.04, 4))


def test_a_record_without_times_names_its_line(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [1])
    with log.open("a") as file:
        file.write(json.dumps({"step": 1, "parents": [-1], "accepted": []}) + "\n")
    with pytest.raises(ConfigError, match="line 2: not a step record.*draft_ms"):
        token_cost.read_costs(log)


def test_the_diagram_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = write_log(tmp_path / "log", [1, 4], [2])
    assert replay.main([str(log), "--plot", str(tmp_path / "d.png")]) == 0
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_a_diagram_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = write_log(tmp_path / "log", [1, 4], [2])
    assert replay.main([str(log), "--plot", str(tmp_path / "d.png")]) == 1
    assert "--plot needs matplotlib: pip install 'haast[perf]'" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()


def test_the_last_line_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(write_log(tmp_path / "log", [1, 4], [2], temperature=0.7))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["acceptance_length"] == 2.5
    assert [row["nodes"] for row in result["sizes"]] == [1, 2, 3]
    assert result["time_per_token"][0]["measured_ms"] == 0.6  # one step of 3 ms, 3 + 2 tokens
    assert "reliability_sampled_raw" in result
    assert "reliability_greedy_raw" not in result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": [-1, 0, 2, 1, 1]}, "not a tree"),
        ({"accepted": [4]}, "not a path"),
        ({"rank": [0]}, "length"),
    ],
)
def test_a_broken_record_names_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    log = write_log(tmp_path / "log", [1])
    with log.open("a") as file:
        file.write(json.dumps(TREE | {"accepted": []} | change) + "\n")
    with pytest.raises(ConfigError, match=f"line 2.*{message}"):
        replay.read_log(log)


def test_a_log_without_drafts_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text(json.dumps({"parents": [-1], "accepted": []}) + "\n")
    assert replay.main([str(log)]) == 1
    assert "no step drafted anything (1 plain steps)" in capsys.readouterr().err
