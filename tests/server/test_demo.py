"""``haast demo``: its comparison, and the server that it starts."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

from engine.cli import client, demo, main, options, serve
from tests.server.command_line import background_server, parse


def answer(text: str, tpot: float) -> client.StreamedAnswer:
    return client.StreamedAnswer(text, "stop", 0.1, 0.1 + tpot * 10, {"completion_tokens": 11})


class _Given:
    """An asynchronous context that yields what it was given."""

    def __init__(self, value: str) -> None:
        self._value = value

    async def __aenter__(self) -> str:
        return self._value

    async def __aexit__(self, *exc_info: object) -> None:
        return None


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
