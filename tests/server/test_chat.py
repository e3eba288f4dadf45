"""``haast chat`` and ``haast complete``, in process and through a server."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import msgspec
import pytest

from engine.cli import chat, client, main
from engine.cli.local import LocalEngine
from engine.core import Request, SamplingParams
from engine.text.output_parser import TextDelta
from tests.server import mistral
from tests.server.command_line import background_server
from tests.server.fakes import FakeEngine, script, serve_fake, server
from tests.text.tekken import spell, tekken_tokenizer


def test_chat_question_in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(script(b"He", b"llo"))
    monkeypatch.setattr(chat, "open_engine", lambda args: serve_fake(engine))
    assert main.main(["chat", "-q", "Hi", "--system", "S", "--stats", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert "acceptance length 3.00" in err
    assert bytes(engine.added[0].prompt) == b"s:S;u:Hi;"


def test_chat_remembers_resets_and_survives_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(script(b"He", b"llo"))
    monkeypatch.setattr(chat, "open_engine", lambda args: serve_fake(engine))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n" + "x" * 70 + "\n/reset\nthree\n/quit\nfour\n"))
    assert main.main(["chat"]) == 0
    assert [bytes(request.prompt) for request in engine.added] == [
        b"u:one;",
        b"u:one;a:Hello;u:two;",
        b"u:three;",
    ]
    out, err = capsys.readouterr()
    assert out == "Hello\n" * 3
    assert "error: the prompt has" in err


def test_chat_shows_thoughts_and_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = mistral.engine(*mistral.THOUGHTFUL)
    monkeypatch.setattr(chat, "open_engine", lambda args: serve_fake(engine, tokenizer=tekken_tokenizer()))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main.main(["chat", "--reasoning-effort", "high"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n" * 2
    assert err.endswith("Let me see.\n" * 2)
    assert list(engine.added[1].prompt) == spell(
        *("<s>", "[MODEL_SETTINGS]", '{"reasoning_effort": "high"}', "[/MODEL_SETTINGS]"),
        *("[INST]", "one", "[/INST]", "[THINK]", "Let me see.", "[/THINK]", "Hello there", "</s>"),
        *("[INST]", "two", "[/INST]"),
    )
    engine = mistral.engine(*mistral.TWO_CALLS)
    tools = tmp_path / "tools.json"
    tools.write_bytes(msgspec.json.encode([mistral.WEATHER]))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main.main(["chat", "--tools", str(tools)]) == 0
    out, err = capsys.readouterr()
    assert out == 'weather({"city": "Rome"})\nweather({"city": "Oslo"})\n' * 2
    assert "\x1b[2mTwo.\x1b[0m\n" in err
    assert "this turn is forgotten" in err
    first, second = (tekken_tokenizer().decode(request.prompt) for request in engine.added)
    assert first.endswith('"none"}one')
    assert second == first.removesuffix("one") + "two"
    engine = mistral.engine(("",))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\none\n"))
    assert main.main(["chat"]) == 0
    assert "the answer is empty; this turn is forgotten" in capsys.readouterr().err
    assert engine.added[0].prompt == engine.added[1].prompt
    for words, message in (
        (["--url", "x"], "cannot be read as a JSON list"),
        ([], "cannot be read as a JSON list"),
    ):
        tools.write_text("{}")
        assert main.main(["chat", "--tools", str(tools), *words]) == 1
        assert message in capsys.readouterr().err


def test_abandoned_local_answer_is_aborted() -> None:
    engine = FakeEngine(script(*[b"tick"] * 50))
    local = LocalEngine(serve_fake(engine))
    stream = local.stream(Request(0, (1,), SamplingParams()))
    assert next(stream).events == [TextDelta("tick")]
    stream.close()  # type: ignore[attr-defined]
    assert engine.aborted == [1]
    assert not engine.has_work
    assert local.num_active == 0


def test_chat_through_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with background_server() as url:
        assert main.main(["chat", "--url", url, "-q", "Hi"]) == 0
        assert capsys.readouterr().out == "Hello\n"
        assert main.main(["chat", "--url", url + "/v1/", "-q", "x" * 70]) == 1
        assert "the server answered 400: the prompt has" in capsys.readouterr().err
    assert main.main(["chat", "--url", url, "-q", "Hi"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_chat_shows_what_a_server_thinks_and_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_bytes(msgspec.json.encode([mistral.WEATHER]))
    with background_server(mistral.engine(*mistral.TWO_CALLS), tekken_tokenizer()) as url:
        assert main.main(["chat", "--url", url, "-q", "Hi", "--tools", str(tools)]) == 0
    out, err = capsys.readouterr()
    assert out == 'weather({"city": "Rome"})\nweather({"city": "Oslo"})\n'
    assert err.endswith("Two.\n")


def test_complete_through_a_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(script(b"He", b"llo"))
    with background_server(engine) as url:
        assert main.main(["complete", "Hi", "--url", url, "--max-tokens", "9", "--stats"]) == 0
        out, err = capsys.readouterr()
        assert out == "Hello\n"
        assert "acceptance length 3.00" in err
        monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
        assert main.main(["complete", "--url", url, "--model", "fake"]) == 0
        assert main.main(["complete", "x", "--url", url, "--model", "other"]) == 1
        assert "not served here" in capsys.readouterr().err
        assert main.main(["complete", "", "--url", url]) == 1
        assert "there is no text" in capsys.readouterr().err
    assert [bytes(request.prompt) for request in engine.added] == [b"Hi", b"from stdin"]
    assert engine.added[0].sampling.max_tokens == 9


def test_client_reports_errors_inside_a_stream() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(*[b"tick"] * 50), fail_at=3, step_time=0.02)
        async with server(engine) as api, client.session(api.url) as http:
            with pytest.raises(client.ServerError, match="the server failed: the request failed"):
                await client.stream_chat(
                    http, {"messages": [{"role": "user", "content": "x"}]}, lambda piece: None
                )

    asyncio.run(scenario())
