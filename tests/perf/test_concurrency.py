"""Users on a scripted engine and a made-up clock; the arithmetic on traces that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest

from engine.core import Delta, Request, Speculation
from engine.step import Engine
from perf import closed_loop, concurrency
from perf.closed_loop import Answer, Load, Step, Trace, drive
from tests.engine.rig import assert_idle, echo_model, make_engine, prompts_of
from tests.perf.pair import write_pair
from verify.stats import StepTimes

TIMES = StepTimes(0.25, 0.5, 0.125)


@dataclass
class ScriptedEngine:
    """A step takes a second: the oldest request that waits gets its first token, then every other running one
    gets two, or what it may still have."""

    now: float = 100.0
    last_times: StepTimes = TIMES
    waiting: list[Request] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    asked: dict[int, Request] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.left)

    def add(self, request: Request) -> None:
        assert request.id not in self.asked
        self.waiting.append(request)
        self.asked[request.id] = request

    def abort(self, request_id: int) -> None:
        self.waiting = [request for request in self.waiting if request.id != request_id]
        self.left.pop(request_id, None)

    def step(self) -> list[Delta]:
        self.now += 1.0
        deltas = []
        for request_id, left in list(self.left.items()):
            count = min(2, left)
            deltas.append(self._delta(request_id, count, is_decode=True))
        if self.waiting:
            request = self.waiting.pop(0)
            self.left[request.id] = request.sampling.max_tokens
            deltas.append(self._delta(request.id, 1, is_decode=False))
        return deltas

    def _delta(self, request_id: int, count: int, is_decode: bool) -> Delta:
        self.left[request_id] -= count
        is_last = self.left[request_id] == 0
        if is_last:
            del self.left[request_id]
        return Delta(request_id, (request_id,) * count, "length" if is_last else None, is_decode=is_decode)


def run_script(num_users: int, seconds: float, max_tokens: int = 8) -> tuple[ScriptedEngine, Trace]:
    engine = ScriptedEngine()
    load = Load([(1, 2), (3,), (4, 5, 6)], num_users, 0.0, max_tokens, seed=3)
    trace = drive(cast(Engine, engine), Speculation(4, 3, 2), load, seconds, 50, lambda: engine.now)
    return engine, trace


def test_users_ask_on_until_the_window_closes() -> None:
    engine, trace = run_script(2, 20.0)
    assert (trace.started, trace.opened, trace.closed) == (100.0, 102.0, 120.0)
    assert not engine.has_work
    assert engine.now == trace.closed  # what still ran was aborted, not finished
    assert list(engine.asked) == list(range(50, 50 + len(trace.answers)))
    assert all(request.speculation == Speculation(4, 3, 2) for request in engine.asked.values())
    first = [engine.asked[50 + user].sampling.max_tokens for user in range(2)]
    assert first == [4, 8]  # user 0 begins in the middle of an answer, as it were
    assert {request.sampling.max_tokens for request in engine.asked.values() if request.id > 51} == {8}
    # user 0: first token at 101, last at 103 (1 + 2 + 1); asks at 103, 1 + 2 + 2 + 2 + 1 tokens, done at 108
    mine = [answer for answer in trace.answers if answer.user == 0]
    assert [answer.sent for answer in mine] == [100.0, 103.0, 108.0, 113.0, 118.0]
    assert mine[1].events == [(104.0, 1), (105.0, 2), (106.0, 2), (107.0, 2), (108.0, 1)]
    assert [answer.number for answer in mine] == [0, 1, 2, 3, 4]


def test_a_late_beginning_leaves_half_the_window() -> None:
    _, trace = run_script(12, 20.0)
    assert (trace.opened, trace.closed) == (112.0, 122.0)
    _, trace = run_script(12, 0.0)
    assert trace.closed == 112.0 + closed_loop.MIN_STEPS


def test_all_modes_are_asked_the_same() -> None:
    load = Load([(1, 2), (3,), (4, 5, 6)], 4, 0.7, 100, seed=1)
    mine = list(islice(load.requests(2), 7))
    assert mine == list(islice(load.requests(2), 7))
    assert mine != list(islice(load.requests(1), 7))
    assert sorted(prompt for prompt, _ in mine[:3]) == [(1, 2), (3,), (4, 5, 6)]
    assert [sampling.max_tokens for _, sampling in mine] == [75] + [100] * 6
    assert len({sampling.seed for _, sampling in mine}) == 7


def trace_of(*answers: Answer) -> Trace:
    steps = [Step(float(moment), TIMES, 2, 3) for moment in range(1, 12)]
    return Trace(0.0, 2.0, 10.0, list(answers), steps)


def test_figures_of_a_window() -> None:
    trace = trace_of(
        Answer(0, 0, 0.0, [1] * 13, [(2.0, 3), (4.0, 4), (6.0, 4), (8.0, 2)]),  # began with the window
        Answer(0, 1, 8.0, [1] * 13, [(9.0, 1), (10.0, 8), (11.0, 4)]),
        Answer(1, 0, 1.0, [1] * 2, [(3.0, 1), (5.0, 1)]),  # sent too early, and too short for a TPOT
        Answer(1, 1, 5.0, [1], [(11.0, 1)]),  # begun too late
    )
    found = closed_loop.figures(trace)
    # inside: 4 + 4 + 2 tokens of the first, 9 of the second, 2 of the third
    assert (found["seconds"], found["tokens"], found["tok_s"]) == (8.0, 21, 2.625)
    assert found["ttft_ms"] == [1000.0]
    assert found["tpot_ms"] == [125.0]  # the second answer's 8 tokens in 1 s; the first has 6 after its first
    assert (found["steps"], found["decoded_seqs"], found["decoded_tokens"]) == (8, 16, 24)
    assert (found["draft_share"], found["verify_share"], found["other_share"]) == (0.25, 0.5, 0.125)
    assert found["seconds_before"] == 2.0


def test_answers_are_compared_as_far_as_both_got() -> None:
    def answers(*tokens: list[int]) -> Trace:
        return trace_of(*(Answer(0, number, 0.0, list(ids)) for number, ids in enumerate(tokens)))

    one = answers([1, 2, 3], [4, 5], [6], [7], [])
    other = answers([1, 2], [4, 9, 9], [6, 7, 8], [])
    assert closed_loop.equal_answers(one, other) == (2, 3)
    assert closed_loop.equal_answers(other, one) == (2, 3)


def window(mode: str, number: int, tok_s: float, **changes: Any) -> Mapping[str, Any]:
    family = {"plain": "plain", "auto": "auto", "4/3/1": "chain"}.get(mode, "tree")
    base = {
        "round": number,
        "concurrency": 4,
        "temperature": 0.0,
        "mode": mode,
        "family": family,
        "tok_s": tok_s,
        "decoded_tokens": 30,
        "decoded_seqs": 20,
        "answers_equal": 3,
        "answers_compared": 4,
        "draft_share": 0.1,
        "verify_share": 0.8,
        "other_share": 0.1,
        "ttft_ms": [10.0, 30.0],
        "tpot_ms": [5.0],
    }
    return base | changes


def test_modes_are_compared_within_a_round() -> None:
    """The second round ran on a machine of half the speed; it must not matter."""
    speeds = {"plain": (10, 5, 10), "4/3/1": (16, 8, 16), "8/4/4": (12, 6, 12), "auto": (15, 7.8, 17)}
    windows = [
        window(mode, number, float(speed))
        for number in (2, 0, 1)
        for mode, found in speeds.items()
        for speed in [found[number]]
    ]
    windows += [window("plain", 0, 3.0, concurrency=8, ttft_ms=[], tpot_ms=[], decoded_seqs=0)]
    small, large = concurrency.summarise(windows)
    assert [mode["mode"] for mode in small["modes"]] == ["plain", "4/3/1", "8/4/4", "auto"]
    plain, chain, tree, auto = small["modes"]
    assert (chain["tok_s"], chain["vs_plain"], chain["best_other"]) == (16.0, 1.6, "auto")
    assert auto["best_other"] == "4/3/1"
    assert auto["vs_best_other_by_round"] == [0.9375, 0.975, 1.0625]
    assert auto["vs_best_other"] == 0.975
    assert (plain["vs_plain"], plain["vs_best_other"]) == (1.0, 0.625)  # of the rounds' 10/16, 5/8, 10/17
    assert tree["best_other"] == "4/3/1"
    assert small["best"] == {"plain": "plain", "chain": "4/3/1", "tree": "8/4/4", "auto": "auto"}
    assert (auto["acceptance_length"], auto["texts_equal_share"]) == (1.5, 0.75)
    assert (auto["num_ttft"], auto["ttft_ms_p50"], auto["ttft_ms_p99"]) == (6, 20.0, 30.0)
    [alone] = large["modes"]
    assert (alone["ttft_ms_p50"], alone["acceptance_length"], alone["vs_best_other"]) == (None, None, None)


def test_a_real_engine_is_left_idle_and_says_the_same_in_every_mode() -> None:
    engine = make_engine(echo_model(), "eagle3", max_model_len=64)
    load = Load([tuple(prompt) for prompt in prompts_of([3, 9, 5])], 4, 1.0, 24, seed=5)
    plain = drive(engine, Speculation(1, 0, 1), load, 0.0, 0)
    assert_idle(engine)
    trees = drive(engine, None, load, 0.0, len(plain.answers))
    assert_idle(engine)
    equal, compared = closed_loop.equal_answers(trees, plain)
    assert equal == compared >= 4
    found = closed_loop.figures(trees)
    assert found["decoded_tokens"] > found["decoded_seqs"] > 0
    assert 0 < found["draft_share"] + found["verify_share"] + found["other_share"] <= 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and an EAGLE-3 head on disk."""
    return write_pair(tmp_path_factory.mktemp("pair"))


def sweep(*words: object) -> int:
    common = ["--dtype", "float32", "--device", "cpu", "--minutes", "0.001", "--max-tokens", "12"]
    return concurrency.main([*map(str, words), *common])


def test_a_sweep(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, head = pair
    out = tmp_path / "result.json"
    words = ("--concurrency", 1, 3, "--temperatures", "0,1", "--shapes", "4/3/1,8/4/2", "--rounds", 2)
    assert sweep(target, "--spec-model", head, *words, "--json", out) == 0
    said = capsys.readouterr().out
    assert "32 windows: 2 rounds of 4 cells in 4 modes (plain, 4/3/1, 8/4/2, auto)" in said
    result = json.loads(said.splitlines()[-1])
    written = json.loads(out.read_text())
    windows = written.pop("windows")
    assert written == result
    assert result["cells"] == json.loads(json.dumps(concurrency.summarise(windows)))
    assert [(cell["temperature"], cell["concurrency"]) for cell in result["cells"]] == [
        (0, 1),
        (0, 3),
        (1, 1),
        (1, 3),
    ]
    assert {mode["texts_equal_share"] for cell in result["cells"] for mode in cell["modes"]} == {1.0}
    assert all(len(mode["tok_s_by_round"]) == 2 for cell in result["cells"] for mode in cell["modes"])
    orders = [[w["mode"] for w in windows[start : start + 4]] for start in range(0, 32, 4)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 2  # no mode is always first
    assert {"commit", "device", "command", "prompt_set_sha256", "load_before"} <= result.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concurrency", 40), "--concurrency is [40], expected 1 to --max-num-seqs, which is 32"),
        (("--concurrency", 0), "--concurrency is [0]"),
        (("--rounds", 0), "--rounds is 0"),
        (("--shapes", "x"), "the shape 'x' is not one"),
        (("--max-model-len", 64), "--max-model-len is 64, but the longest prompt"),
        (("--kv-cache-memory", "1MB"), "raise --kv-cache-memory"),
    ],
)
def test_what_cannot_be_measured_is_said(
    pair: tuple[Path, Path], words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(pair[0], *words) == 1
    assert message in capsys.readouterr().err
