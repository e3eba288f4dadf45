"""Timers on a made-up clock, the accounts they add up to, and a short run of the whole on a tiny pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.core import SamplingParams
from perf import host_cost
from perf.host_cost import GROUPS, accounts, by_context, engine_calls
from perf.stopwatch import LargestList, Stopwatch
from tests.engine.rig import assert_idle, echo_model, make_engine
from tests.perf.pair import write_pair


class Worker:
    """Every call takes what it says on a clock that only they move."""

    def __init__(self) -> None:
        self.now = 5.0

    def outer(self) -> str:
        self.now += 1.0
        self.inner()
        self.now += 2.0
        self.inner()
        return "done"

    def inner(self) -> None:
        self.now += 10.0

    def fails(self) -> None:
        self.now += 4.0
        raise ValueError("on purpose")


def test_an_inner_call_is_taken_off_the_outer_ones_account() -> None:
    worker = Worker()
    watch = Stopwatch(lambda: worker.now)
    with watch.on((worker, "outer", "out"), (worker, "inner", "in"), (Worker, "fails", "failed")):
        assert worker.outer() == "done"
        worker.now += 100.0  # nobody's time
        worker.inner()
        with pytest.raises(ValueError, match="on purpose"):
            worker.fails()
        worker.now += 100.0
    worker.outer()  # no longer timed
    assert watch.seconds == {"out": 3.0, "in": 30.0, "failed": 4.0}
    assert watch.calls == {"out": 1, "in": 3, "failed": 1}
    assert "inner" not in vars(worker)
    assert Worker.fails.__qualname__ == "Worker.fails"


def test_the_longest_list_is_found_either_way() -> None:
    lists = LargestList()
    with lists.watched():
        torch.zeros(2, 3).tolist()
        assert lists.most == 6
        assert torch.tensor([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
        torch.tensor(list(range(9)))
        assert lists.most == 9
    torch.zeros(50).tolist()
    assert lists.most == 9


def test_accounts_add_up_to_the_time_that_passed() -> None:
    spent = {
        "clock": 10.0,
        "loop cpu": 0.5,
        "steps": 100,
        "target": 6.0,
        "head": 1.0,
        "compact": 0.2,
        "sample": 0.8,
        "schedule": 0.3,
        "propose": 0.6,
        "observe": 0.1,
        "commit": 0.2,
        "rest of step": 0.4,
        "detokenise": 0.1,
        "build events": 0.15,
    }
    found = accounts(spent)
    assert (found["step_ms"], found["steps"]) == (100.0, 100)
    assert found["share"]["between steps"] == 0.04
    assert found["share"]["write events"] == 0.025
    assert found["ms_per_step"]["commit"] == 2.0
    shares = found["group_share"]
    assert shares == {"models": 0.72, "choosing": 0.08, "engine host": 0.2, "event loop": 0.05}
    assert sum(share for group, share in shares.items() if group != "event loop") == pytest.approx(1.0)
    assert found["host_share"] == 0.25
    assert found["host_and_choosing_share"] == 0.33


@pytest.mark.parametrize("draft", ["eagle3", "none"])
def test_all_phases_of_a_step_are_timed(draft: str) -> None:
    engine = make_engine(echo_model(), draft, max_model_len=190, num_pages=200)
    watch = Stopwatch()
    with watch.on(*engine_calls(engine)):
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=6))
    timed = {name for group in ("models", "choosing", "engine host") for name in GROUPS[group]} - {
        "between steps"
    }
    assert watch.calls.keys() == (timed if draft == "eagle3" else timed - {"head"})
    assert watch.calls["rest of step"] == watch.calls["target"] == watch.calls["commit"] > 1
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=6))
    assert watch.calls["commit"] == watch.calls["target"]


def test_the_engine_is_idle_after_every_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cost, "_CONTEXT_STEPS", 10)
    engine = make_engine(echo_model(), "eagle3", max_model_len=190, num_pages=200)
    found = by_context(engine, [20, 100], 2, 0.0)
    assert_idle(engine)
    assert [row["context"] for row in found] == [20, 100]
    for row in found:
        assert row["host_ms"] > 0
        assert {"schedule", "commit", "propose", "target"} <= row["ms_per_step"].keys()
        assert 0 < row["longest_list"] < engine.target.vocab_size  # no row of logits went through a list


def test_behind_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cost, "_WARM_UP", 0.1)
    monkeypatch.setattr(host_cost, "_CONTEXT_STEPS", 8)
    target, head = write_pair(tmp_path)
    words = ["--users", "3", "--seconds", "0.5", "--contexts", "20", "60", "--context-users", "2"]
    common = ["--dtype", "float32", "--device", "cpu", "--max-tokens", "40"]
    out = tmp_path / "result.json"
    assert host_cost.main([str(target), "--spec-model", str(head), *words, *common, "--json", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["users"] == 3
    assert result["steps"] > 3
    assert all(result["ms_per_step"][name] > 0 for names in GROUPS.values() for name in names)
    assert 0 < result["group_share"]["models"] < 1
    assert [row["context"] for row in result["contexts"]] == [20, 60]
    assert {"commit", "device", "threads", "command"} <= result.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--users", "99"), "--users is 99"),
        (("--seconds", "0"), "--seconds is 0.0"),
        (("--contexts", "200", "4000"), "--contexts is [200, 4000], expected 1 to"),
        (("--context-users", "0"), "--context-users is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host_cost.main(["/no/such/model", *words]) == 1
    assert message in capsys.readouterr().err
