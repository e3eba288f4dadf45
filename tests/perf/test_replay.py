"""The replay against logs small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from perf import replay

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


def test_the_last_line_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(write_log(tmp_path / "log", [1, 4], [2], temperature=0.7))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["acceptance_length"] == 2.5
    assert [row["nodes"] for row in result["sizes"]] == [1, 2, 3]
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
