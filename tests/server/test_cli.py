"""The command line: dispatch and suggestions, and the flags that verbs share."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.cli import driver, main, options, serve
from engine.cli.progress import LoadingBar
from engine.core import Speculation
from engine.errors import ConfigError
from tests.server.command_line import parse


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
