"""``haast bench spec`` from the command line to its last line, on a tiny model with a head from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import main
from perf import replay
from tests.perf.pair import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and an EAGLE-3 head on disk."""
    return write_pair(tmp_path_factory.mktemp("pair"))


def bench(*words: object) -> int:
    common = ["--dtype", "float32", "--device", "cpu", "--max-tokens", "10", "--num-prompts", "2"]
    return main(["bench", "spec", *map(str, words), *common])


def test_bench_spec(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, head = pair
    out, log = tmp_path / "result.json", tmp_path / "steps.jsonl"
    words = ("--shapes", "4/3/1,8/4/4+lookup4", "--temperatures", "0,1", "--shared-noise", "on,off")
    assert bench(target, "--spec-model", head, *words, "--json", out, "--spec-log", log) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    settings = [(cell["shape"], cell["temperature"], cell["shared_noise"]) for cell in result["cells"]]
    assert settings == [
        ("plain", 0, None),
        ("4/3/1", 0, None),
        ("8/4/4+lookup4", 0, None),
        ("plain", 1, None),
        ("4/3/1", 1, True),
        ("4/3/1", 1, False),
        ("8/4/4+lookup4", 1, True),
        ("8/4/4+lookup4", 1, False),
    ]
    assert all(cell["texts_equal_share"] == 1.0 and cell["tok_s"] > 0 for cell in result["cells"])
    assert all(cell["kinds"].keys() == {"prose", "facts"} for cell in result["cells"])
    assert result["cells"][0]["by_depth"] == []
    assert result["cells"][1]["by_depth"][0]["offered"] > 0
    assert {"commit", "device", "threads", "command", "prompt_set_sha256"} <= result.keys()
    steps, plain_steps = replay.read_log(log)  # the log that was asked for is written as well
    assert steps
    assert plain_steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shapes", "8/4"), "the shape '8/4' is not one"),
        (("--temperatures", "0,warm"), "--temperatures is '0,warm'"),
        (("--temperatures", "-1"), "--temperatures is '-1'"),
        (("--shared-noise", "on,maybe"), "expected on, off or on,off"),
        (("--repeats", 0), "--repeats is 0, expected at least 1"),
        (("--json", "/no/such/place/x.json"), "the directory does not exist"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("/no/such/model", *words) == 1
    assert message in capsys.readouterr().err


def test_noise_needs_a_head(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--temperatures", "1", "--shared-noise", "on,off")
    assert bench(pair[0], "--spec-model", "ngram", *words) == 1
    assert "found the draft 'ngram'" in capsys.readouterr().err
