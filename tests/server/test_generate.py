"""``haast generate``: answers in the order of their prompts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.cli import generate, main
from engine.errors import ConfigError
from tests.server import mistral
from tests.server.command_line import parse
from tests.server.fakes import FakeEngine, script, serve_fake
from tests.text.tekken import tekken_tokenizer


def test_generate_keeps_the_order_and_reports_refusals() -> None:
    engine = FakeEngine(script(b"He", b"llo"))
    bodies: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"prompt": "x" * 70},
        {"messages": [{"role": "user", "content": "b"}]},
        {"prompt": "c", "n": 2},
        {"prompt": ["d", "e"]},
        *({"prompt": str(i)} for i in range(20)),
    ]
    found = list(generate.answers(serve_fake(engine), bodies))
    assert [answer.index for answer in found] == list(range(25))
    assert {index for index, answer in enumerate(found) if answer.error} == {1, 3, 4}
    assert [found[1].error.code, found[3].error.param] == [  # type: ignore[union-attr]
        "context_length_exceeded",
        "n",
    ]
    assert all(answer.text == "Hello" for answer in found if not answer.error)
    assert [bytes(request.prompt) for request in engine.added[:2]] == [b"a", b"u:b;"]


def test_generate_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "open_engine", lambda args: serve_fake(FakeEngine(script(b"He", b"llo"))))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "stop": "l"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert main.main(["generate", "-i", str(source), "-o", str(target), "--seed", "1"]) == 0
    first, second = map(msgspec.json.decode, target.read_text().splitlines())
    assert (first["text"], first["finish_reason"], second["text"]) == ("He", "stop", "Hello")
    assert second["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    assert "error" not in second
    source.write_text("plain\nlines\n")
    assert main.main(["generate", "-i", str(source), "-o", str(target), "--chat"]) == 0
    assert len(target.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\nplain', "line 2 .* not a JSON object"),
        ('{"text": "a"}', "line 1 .* needs either 'prompt' or 'messages', found 'text'"),
    ],
)
def test_generate_bad_input(tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "in"
    source.write_text(text)
    with pytest.raises(ConfigError, match=message):
        generate.run(parse(generate, "-i", str(source)))
    with pytest.raises(ConfigError, match="cannot read --input"):
        generate.run(parse(generate, "-i", str(tmp_path / "none")))


def test_generate_reports_thoughts_and_calls() -> None:
    engine = mistral.engine(*mistral.TWO_CALLS)
    bodies = [mistral.QUESTION | {"tools": [mistral.WEATHER]}, mistral.QUESTION, {"prompt": "Hi"}]
    calling, thinking, plain = generate.answers(serve_fake(engine, tokenizer=tekken_tokenizer()), bodies)
    assert (calling.text, calling.reasoning_content, calling.finish_reason) == ("", "Two.", "tool_calls")
    assert [call.function.arguments for call in calling.tool_calls or ()] == [
        '{"city": "Rome"}',
        '{"city": "Oslo"}',
    ]
    text = 'weather{"city": "Rome"}weather{"city": "Oslo"}'
    assert (thinking.text, thinking.reasoning_content, thinking.tool_calls) == (text, "Two.", None)
    assert (plain.text, plain.reasoning_content, plain.finish_reason) == ("Two." + text, None, "stop")


def test_unknown_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "open_engine", lambda args: serve_fake(FakeEngine()))
    source = tmp_path / "in"
    source.write_text("a")
    with pytest.raises(ConfigError, match="cannot write --output"):
        generate.run(parse(generate, "-i", str(source), "-o", str(tmp_path / "no" / "out")))
