"""The command line: dispatch and suggestions, shared flags, chat and generate, and the demo's comparison."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.cli import chat, client, demo, driver, generate, main, options, serve
from engine.cli.local import LocalEngine
from engine.cli.progress import LoadingBar
from engine.core import Request, SamplingParams, Speculation
from engine.errors import ConfigError
from engine.text.output_parser import TextDelta
from tests.server import mistral
from tests.server.fakes import FakeEngine, script, serve_fake, server
from tests.text.tekken import tekken_tokenizer


def parse(verb: Any, *words: str) -> argparse.Namespace:
    parser = main.Parser()
    verb.add_arguments(parser)
    return parser.parse_args(words)


def test_help_does_not_import_torch() -> None:
    code = "import sys, engine.cli.main as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in main.VERBS:
        assert f"  {verb} " in done.stdout


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    assert main.main(["srve"]) == 2
    assert "did you mean serve?" in capsys.readouterr().err
    for words, hint in ((["--spec-node", "3"], "--spec-nodes"), (["--max-sequences=3"], "--max-num-seqs")):
        with pytest.raises(SystemExit) as caught:
            main.main(["serve", *words])
        assert caught.value.code == 2
        assert f"did you mean {hint}?" in capsys.readouterr().err
    assert main.main(["serve", "--spec-nodes", "99"]) == 1
    assert "--spec-nodes is 99, expected 1 to 64" in capsys.readouterr().err


def test_engine_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = Speculation(lookup=8), Speculation(4, 3, 2, lookup=8)
    for is_fast, dtype, tree in ((True, torch.bfloat16, large), (False, torch.float32, small)):
        monkeypatch.setattr(options, "has_fast_bfloat16", lambda is_fast=is_fast: is_fast)
        config = options.engine_config(parse(serve, "--device", "cpu", "--spec-plan", "fixed"))
        assert (config.dtype, config.speculation, config.max_model_len) == (dtype, tree, 2048)
        assert not config.planned
        config = options.engine_config(parse(serve, "--device", "cpu"))
        assert config.planned
        assert config.speculation == Speculation(12, 5, 4, lookup=8)
        assert config.half_weights == (not is_fast)
        assert config.dtype_name == ("bfloat16" if is_fast else "w16a32")
    args = parse(
        serve,
        "a.gguf",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--spec-nodes",
        "4",
        "--spec-depth",
        "3",
        "--spec-top-k",
        "2",
        "--kv-cache-memory",
        "1.5GiB",
        "--page-size",
        "8",
        "--spec-log",
        "log",
        "--canary",
        "0.25",
    )
    config = options.engine_config(args)
    assert (config.dtype, config.half_weights, config.device) == (torch.float32, False, "cpu")
    assert (config.page_size, config.spec_log, config.canary) == (8, "log", 0.25)
    assert config.kv_cache_memory == 3 << 29
    assert (config.draft_vocab_size, config.draft_max_model_len) == (32768, 16384)
    some = options.engine_config(parse(serve, "--spec-draft-vocab", "0", "--spec-max-model-len", "9"))
    assert (some.draft_vocab_size, some.draft_max_model_len) == (0, 9)
    for wrong in (("--spec-draft-vocab", "-1"), ("--spec-max-model-len", "0")):
        with pytest.raises(ConfigError, match="draft_vocab_size is .* expected 0 or more and 1 or more"):
            options.engine_config(parse(serve, *wrong))
    assert config.speculation == Speculation(4, 3, 2, lookup=8)
    assert options.model_name(args) == "a.gguf"
    assert options.model_name(parse(serve, "--model-path", "b")) == "b"
    assert options.engine_config(parse(serve)).canary == 0
    for share in ("-0.1", "1.5", "nan"):
        with pytest.raises(ConfigError, match=f"--canary is {share}, expected a share of all steps, 0 to 1"):
            options.engine_config(parse(serve, "--canary", share))
    assert options.model_name(parse(serve)) is None
    with pytest.raises(ConfigError, match="--device is 'tpu'"):
        options.engine_config(parse(serve, "--device", "tpu"))


@pytest.mark.parametrize(
    ("text", "size"), [("1024", 1024), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1k", 1000)]
)
def test_num_bytes(text: str, size: int) -> None:
    assert options.num_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "5TB", "GiB", "1e9", "9" * 400])
def test_num_bytes_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        options.num_bytes(text)


def test_server_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_API_KEY", "from-env")
    assert serve.server_options(parse(serve)).api_keys == ("from-env",)
    args = parse(serve, "--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y", "--port", "0")
    found = serve.server_options(args)
    assert (found.api_keys, found.served_names, found.port) == (("a", "b"), ("x", "y"), 0)
    for words in (
        ("--port", "70000"),
        ("--shutdown-timeout", "-1"),
        ("--shutdown-timeout", "nan"),
        ("--api-key", ""),
        ("--watchdog-timeout", "-1"),
        ("--max-num-queued-tokens", "-1"),
        ("--cors-origin", "page.example"),
        ("--cors-origin", "https://page.example/path"),
        ("--cors-origin", "https://user@page.example"),
    ):
        with pytest.raises(ConfigError, match=words[0]):
            serve.server_options(parse(serve, *words))
    origins = ("--cors-origin", "*", "--cors-origin", "https://a.example:8443", "--allowed-host", "Box.LAN")
    found = serve.server_options(parse(serve, *origins, "--watchdog-timeout", "9"))
    assert found.cors_origins == ("*", "https://a.example:8443")
    assert (found.allowed_hosts, found.stalled_after) == (("box.lan",), 9.0)


def test_env_shows_versions_and_no_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HAAST_API_KEY", "hunter2")
    assert main.main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].startswith(torch.__version__)
    assert lines["variables set"] == "HAAST_API_KEY"
    assert {"haast", "Python", "CPU", "GPU driver", "aiohttp"} <= set(lines)
    assert "hunter2" not in str(lines)


def test_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(driver, "_FILE", file)
    assert driver.driver_version() is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert driver.driver_version() == "580.95.05"


def test_loading_bar_without_a_terminal() -> None:
    lines: list[str] = []
    with LoadingBar(lines.append) as bar:
        for done in range(0, 101, 5):
            bar.update(done * 10**6, 10**8)
    assert len(lines) == 11
    assert lines[-1].startswith("Loading weights: 100% of 100 MB")


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
    assert list(engine.added[1].prompt) == mistral.spell(
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


def answer(text: str, tpot: float) -> client.StreamedAnswer:
    return client.StreamedAnswer(text, "stop", 0.1, 0.1 + tpot * 10, {"completion_tokens": 11})


@pytest.mark.parametrize(("plain_text", "code"), [("same", 0), ("sane", 1)])
def test_demo_compares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plain_text: str, code: int
) -> None:
    async def measured(http: object, body: object, speculation: str) -> client.StreamedAnswer:
        return answer("same", 0.01) if speculation == "auto" else answer(plain_text, 0.02)

    with background_server() as url:
        monkeypatch.setattr(demo, "_server", lambda args: _Given(url))
        monkeypatch.setattr(demo, "_measure", measured)
        assert main.main(["demo", "--device", "cpu"]) == code
    out, err = capsys.readouterr()
    assert "speed-up (TPOT): 2.00x" in out
    assert f"texts equal: {'no' if code else 'yes'}" in out
    assert ("differ from character 2" in err) == bool(code)


def test_demo_says_why_the_server_died(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.main(["demo", "/no/such/model", "--device", "cpu"]) == 1
    err = capfd.readouterr().err
    assert "/no/such/model" in err
    assert "the server ended with exit code 1 before it was ready" in err


def test_demo_passes_its_flags_on() -> None:
    args = parse(demo, "m.gguf", "--spec-model", "ngram", "--kv-cache-memory", "1GiB", "--spec-nodes", "3",
                 "--load-format", "dummy", "--no-enable-prefix-caching")  # fmt: skip
    passed = parse(serve, *demo._serve_flags(args))
    assert options.engine_config(passed) == options.engine_config(args)
    assert options.model_name(passed) == "m.gguf"
    assert (passed.spec_model, passed.port) == ("ngram", 0)
    assert passed.exit_with_parent
    assert not parse(serve).exit_with_parent
    parser = argparse.ArgumentParser()
    options.add_engine_arguments(parser)
    dests = {action.dest for action in parser._actions} - {"help", "model", "model_flag"}
    assert dests == set(demo._PASSED_ON)


def test_the_demos_server_has_flags_from_the_demo_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_LOG_LEVEL", "error")  # would hide the address that the demo waits for
    monkeypatch.setenv("HAAST_CONFIG", "/no/such/file")
    monkeypatch.setenv("HAAST_CPU_KERNELS", "0")  # no flag
    found = demo._environment()
    assert {name for name in found if name.startswith("HAAST_")} == {"HAAST_CPU_KERNELS"}
    assert found["PATH"] == os.environ["PATH"]


def test_a_server_ends_when_its_stdin_closes() -> None:
    """As for the demo's server when the demo is killed: it loads, and the pipe is all that tells it."""
    code = (
        "import os, signal, sys, time, engine.build, engine.cli.serve as verb\n"
        "from engine.cli.main import main\n"
        "verb.open_engine = lambda args: time.sleep(60)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--device", "cpu", "--exit-with-parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            assert any("Listening on" in line for line in process.stderr)
            assert process.poll() is None
            process.stdin.close()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_unknown_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "open_engine", lambda args: serve_fake(FakeEngine()))
    source = tmp_path / "in"
    source.write_text("a")
    with pytest.raises(ConfigError, match="cannot write --output"):
        generate.run(parse(generate, "-i", str(source), "-o", str(tmp_path / "no" / "out")))


class _Given:
    """An asynchronous context that yields what it was given."""

    def __init__(self, value: str) -> None:
        self._value = value

    async def __aenter__(self) -> str:
        return self._value

    async def __aexit__(self, *exc_info: object) -> None:
        return None


@contextmanager
def background_server(engine: FakeEngine | None = None, tokenizer: Any = None) -> Iterator[str]:
    """The fake server on a thread with a loop of its own."""
    ready, stop = threading.Event(), threading.Event()
    urls: list[str] = []

    async def scenario() -> None:
        async with server(engine or FakeEngine(script(b"He", b"llo")), tokenizer=tokenizer) as api:
            urls.append(api.url)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(scenario()))
    thread.start()
    assert ready.wait(10)
    try:
        yield urls[0]
    finally:
        stop.set()
        thread.join(10)
