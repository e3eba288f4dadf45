"""The load evidence: a quick run of everything against real servers, and every judge seen to complain."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from engine.cli.client import ServerError, session
from engine.server import faults, framing
from perf.hardship import nonsense
from perf.hardship.__main__ import main
from perf.hardship.census import Observer
from perf.hardship.client import completion
from perf.hardship.process import ServerProcess, serving
from perf.hardship.questions import KINDS, questions
from perf.hardship.stage import QUICK, Findings, Stage, Users
from perf.hardship.trials import Trial, bad_requests, fuzzing, overload, slow_reader, vanishing
from tests.perf.pair import write_pair
from tests.server.fakes import FakeEngine, Server, script, server, until

ANSWER = script(b"one ", b"two ", b"three", finish="length")


@asynccontextmanager
async def staged(
    engine: FakeEngine | None = None, max_num_queued_reqs: int = QUICK.num_queued
) -> AsyncIterator[tuple[Stage, Server]]:
    """A stage before a server in this process, whose answers are all the same."""
    engine = engine or FakeEngine(ANSWER, step_time=0.002)
    async with (
        server(engine, max_num_queued_reqs=max_num_queued_reqs) as api,
        Observer(api.url, os.getpid()) as observer,
        session(api.url) as http,
    ):
        process = ServerProcess(api.url, cast(Any, SimpleNamespace(pid=os.getpid())))
        stage = Stage(process, observer, QUICK, 0, questions(QUICK.num_questions, 10, 0))
        stage.http = http
        findings = Findings()
        await stage.learn_truth(findings)
        assert not findings.problems
        yield stage, api


def found_by(trial: Trial, stage: Stage) -> Coroutine[Any, Any, Findings]:
    """What a trial finds."""

    async def run() -> Findings:
        findings = Findings()
        await trial(stage, findings)
        return findings

    return run()


# --- the whole way


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real servers around a tiny pair; nothing of it may be wrong."""
    target, head = write_pair(tmp_path)
    out = tmp_path / "result.json"
    code = main(["--quick", "--json", str(out), "--", str(target), "--spec-model", str(head)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["problems"] for row in result["trials"]] == [[]] * len(result["trials"])
    assert (code, result["holds"]) == (0, True)
    assert result == json.loads(out.read_text())
    assert {"commit", "command", "cpu", "device", "model"} <= result.keys()
    figures = {row["trial"]: row["figures"] for row in result["trials"]}
    assert figures["fuzzing"]["accepted"] > 0
    assert figures["overload"]["refused"] > 0
    assert figures["broken step"]["health"] == 200
    assert figures["dead engine"]["exit_code"] == 1


def test_a_server_that_does_not_start() -> None:
    async def scenario() -> None:
        async with serving([], module=("perf.hardship.nowhere",)):
            pass

    with pytest.raises(ServerError, match="ended before it was ready: .*No module named"):
        asyncio.run(scenario())


# --- who judges


@pytest.mark.parametrize("trial", [fuzzing, overload, vanishing, slow_reader, bad_requests])
def test_a_good_server_gives_no_cause(trial: Trial) -> None:
    async def scenario() -> None:
        async with staged() as (stage, _):
            assert (await found_by(trial, stage)).problems == []
            await stage.observer.at_rest(5)

    asyncio.run(scenario())


@pytest.mark.parametrize("trial", [fuzzing, overload, vanishing])
def test_an_answer_that_differs_is_found(trial: Trial) -> None:
    async def scenario() -> None:
        async with staged() as (stage, _):
            for answers in stage.truth:
                answers[0].token_ids[-1] += 1
            findings = await found_by(trial, stage)
            assert findings.num_problems
            assert "differs from its lone run" in findings.problems[0]

    asyncio.run(scenario())


def test_an_answer_that_breaks_off_is_found() -> None:
    """An error in the middle of a stream, and a stream without an end mark."""

    async def scenario() -> None:
        async with staged() as (stage, api):
            failed = [*ANSWER[:-1], replace(ANSWER[-1], finish_reason="error", error="no number")]
            api.engine.answer = failed
            findings = Findings()
            stage.judge(0, await stage.ask(0), findings)
            assert "not complete: status 200, code request_failed" in findings.problems[0]
            outcome = await stage.ask(1)
            outcome.code, outcome.has_ended = None, False
            stage.judge(1, outcome, findings)
            assert findings.num_problems == 2

    asyncio.run(scenario())


def test_a_refusal_without_retry_after_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with staged() as (stage, _):
            respond = faults.response_of

            def without(error: Any) -> web.Response:
                response = respond(error)
                response.headers.popall("Retry-After", None)
                return response

            monkeypatch.setattr(faults, "response_of", without)
            findings = await found_by(overload, stage)
            assert "Retry-After None" in findings.problems[0]

    asyncio.run(scenario())


def test_a_queue_without_an_end_is_found() -> None:
    async def scenario() -> None:
        async with staged(max_num_queued_reqs=10_000) as (stage, _):
            assert "nobody was refused, so it was no overload" in (await found_by(overload, stage)).problems

    asyncio.run(scenario())


def test_users_wait_out_refusals() -> None:
    async def scenario() -> None:
        async with staged(max_num_queued_reqs=0) as (stage, _):
            findings = Findings()
            async with Users(stage, 6, "many", findings) as users:
                await until(lambda: users.num_refused and users.num_answered)
            assert findings.problems == []

    asyncio.run(scenario())


# --- the census


def test_what_is_left_over_is_found() -> None:
    """An open stream is a place, a task and a descriptor; once it is gone, so are they."""

    async def scenario() -> None:
        engine = FakeEngine(ANSWER)
        async with staged(engine) as (stage, api):
            await stage.http.close()
            before = await stage.observer.at_rest(5)
            engine.hold.set()
            async with aiohttp.ClientSession(api.url) as leaver:
                asking = asyncio.create_task(leaver.post("/v1/completions", json={"prompt": "a"}))
                await until(lambda: engine.has_work)
                leftovers = (await stage.observer.settled(before, 0.2)).leftovers(before)
                assert {"places", "tasks", "descriptors", "running"} <= leftovers.keys()
                assert leftovers["places"][1] == 1
                asking.cancel()
            after = await stage.observer.settled(before, 5)
            assert after.leftovers(before) == {}
            assert after.memory > 10 << 20

    asyncio.run(scenario())


# --- questions and nonsense


def test_questions_are_a_seeds_and_of_every_kind() -> None:
    asked = questions(30, 24, 5)
    assert asked == questions(30, 24, 5) != questions(30, 24, 6)
    assert [question.kinds for question in asked[: len(KINDS)]] == [(kind,) for kind in KINDS]
    assert any(len(question.kinds) > 2 for question in asked)
    assert all("speculation" in question.body for question in asked)


def answered(seed: int = 0) -> list[str]:
    """What is wrong with the answers to every sort of nonsense."""

    async def scenario() -> list[str]:
        async with server(FakeEngine(script(b"a", finish="length"))) as api:
            host, port = api.url.removeprefix("http://").split(":")
            problems = []
            for what in nonsense.nonsense(40, seed):
                found = await nonsense.send(host, int(port), what)
                problems.append(nonsense.problem(what, found))
            return [problem for problem in problems if problem is not None]

    return asyncio.run(scenario())


@pytest.mark.parametrize("seed", [0, 1])
def test_nonsense_is_refused_in_one_shape(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert answered(seed) == []
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_server_that_echoes_nonsense_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing._Connection, "handle_error", web.RequestHandler.handle_error)
    problems = answered()
    assert any("bytes, expected at most 1024" in problem for problem in problems)
    assert any("without OpenAI's shape" in problem for problem in problems)


def test_a_status_that_is_not_expected_is_a_problem() -> None:
    what = nonsense.Nonsense("a name", b"", frozenset({400}))
    problem = nonsense.problem(what, nonsense.Answered(500, b"oh"))
    assert problem == "a name: found status 500, expected 400: b'oh'"


def test_a_completion_is_asked_as_it_is_altered() -> None:
    question = completion("x", seed=1)
    assert question.altered(seed=2).body == {"prompt": "x", "seed": 2}
    assert question.body["seed"] == 1
