"""``haast bench latency`` from the command line to its last line, on a tiny model with a head from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import main
from perf import replay
from tests.perf.pair import write_pair

PROMISED = {
    "plain_tok_s",
    "spec_tok_s",
    "speedup",
    "acceptance_length",
    "ttft_ms_p50",
    "step_ms_p50",
    "draft_ms_p50",
    "verify_ms_p50",
    "texts_equal_share",
    "device",
    "commit",
    "cpu",
    "cpu_flags",
    "threads",
    "torch",
    "dtype",
    "command",
    "prompt_set_sha256",
    "kinds",
    "load_before",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and an EAGLE-3 head on disk."""
    return write_pair(tmp_path_factory.mktemp("pair"))


def bench(*words: object) -> int:
    return main(
        [
            "bench",
            "latency",
            *map(str, words),
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--max-tokens",
            "12",
            "--num-prompts",
            "2",
        ]
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bench_latency(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], temperature: float
) -> None:
    target, head = pair
    log, out = tmp_path / "steps.jsonl", tmp_path / "result.json"
    words = ("--spec-log", log, "--json", out, "--temperature", temperature, "--repeats", 2)
    # Fixed: on a busy machine the planner may well decide to draft nothing at all.
    drafting = ("--spec-model", head, "--spec-nodes", 16, "--spec-plan", "fixed")
    assert bench(target, *words, *drafting) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() >= PROMISED
    assert result["texts_equal_share"] == 1.0
    assert result["prefix_caching"] is False  # or the first tokens would not be those of new prompts
    assert result["kinds"].keys() == {"prose", "facts"}
    assert len(result["speedup_by_repeat"]) == 2
    assert result["spec_tokens"] == result["plain_tokens"] > 0
    written = json.loads(out.read_text())
    assert len(written.pop("prompts")) == 4
    assert written == result
    steps, plain_steps = replay.read_log(log)
    assert plain_steps > 0
    assert replay.report(steps, plain_steps)["acceptance_length"] >= 1


def test_bench_latency_with_a_peer(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert bench(pair[0], "--spec-model", "ngram", "--peer", "transformers", "--peer-dtype", "float32") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["transformers_texts_equal_share"] == 1.0
    assert result["plain_vs_transformers"] > 0
    assert result["peer"].startswith("transformers ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--repeats", 0), "--repeats is 0, expected at least 1"),
        (("--temperature", -1), "--temperature is -1"),
        (("--json", "/no/such/place/x.json"), "the directory does not exist"),
        (("--prompts", "/no/such/file"), "cannot be read"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("/no/such/model", *words) == 1
    assert message in capsys.readouterr().err


def test_threads_are_set(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(pair[0], "--spec-model", "none", "--threads", 1) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["threads"], result["acceptance_length"]) == (1, 1.0)
