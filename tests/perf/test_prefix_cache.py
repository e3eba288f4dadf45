"""The measurement of the prefix cache, on a tiny model, and that what is wrong is not passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import prefix_cache
from perf.latency import Run
from perf.prefix_cache import Round, summarise
from tests.checkpoint.files import write_hf, write_tokenizer
from tests.conftest import tiny_llama


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    config, weights = tiny_llama(5, vocab_size=300, max_position_embeddings=2048)
    directory = write_hf(tmp_path_factory.mktemp("tiny") / "target", config, weights)
    return str(write_tokenizer(directory, config.vocab_size))


def test_a_tiny_model(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    words = ["--prefix-tokens", "100", "--max-tokens", "5", "--rounds", "2", "--max-model-len", "256"]
    options = ["--spec-model", "ngram", "--dtype", "float32", "--device", "cpu", "--json", str(out)]
    assert prefix_cache.main([target, *words, *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert {"commit", "device", "torch", "command"} <= result.keys()
    for mode in ("plain", "spec"):
        figures = result["modes"][mode]
        assert figures["answers_equal"] is True
        assert figures["num_cached"] == 95  # six pages of 16, of whose tokens the last runs again
        assert len(figures["ttft_ratio_by_round"]) == 2
    assert result["holds"] is True


def test_without_the_cache_it_fails(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prefix-tokens", "40", "--max-tokens", "2", "--rounds", "1", "--dtype", "float32"]
    assert prefix_cache.main([target, *words, "--no-enable-prefix-caching"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["holds"] is False


def test_too_long_a_prefix_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prefix_cache.main([target, "--max-model-len", "64", "--dtype", "float32"]) == 1
    assert "more than 64" in capsys.readouterr().err
    assert prefix_cache.main([target, "--rounds", "0"]) == 1
    assert "expected at least 1" in capsys.readouterr().err


def test_summary() -> None:
    """Medians of three rounds; one answer that differs is enough."""

    def run(ttft_s: float, *token_ids: int) -> Run:
        return Run(token_ids=list(token_ids), ttft_s=ttft_s)

    rounds = [
        Round(run(first), run(second, 1), run(0.0, 1), 31) for first, second in ((2, 1), (8, 2), (9, 3))
    ]
    summary = summarise(rounds)
    assert summary["ttft_ratio"] == 4
    assert summary["ttft_ratio_by_round"] == [2, 4, 3]
    assert (summary["answers_equal"], summary["num_cached"]) == (True, 31)
    assert not summarise([*rounds, Round(run(1), run(1, 1), run(1, 2), 31)])["answers_equal"]
