"""Where a step's time goes, measured on a tiny pair: which figures there are, not how large they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import step_profile
from tests.perf.pair import write_pair

ON_CPU = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "256")


def test_a_tiny_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, head = write_pair(tmp_path)
    out = tmp_path / "result.json"
    tree = ("--spec-plan", "fixed", "--spec-nodes", "6", "--spec-depth", "3", "--spec-top-k", "2")
    words = ("--spec-model", str(head), *tree, "--max-tokens", "40", "--json", str(out))
    assert step_profile.main([str(target), *words, *ON_CPU]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert {"benchmark", "model", "draft", "commit", "device", "command"} <= result.keys()
    assert result["modes"].keys() == {"plain", "speculative"}
    for mode in result["modes"].values():
        ms, shares = mode["ms"], mode["share_of_profiled_time"]
        assert 0 < ms["verify"] < ms["total"]
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
        assert shares["copy"] > 0
    assert result["modes"]["plain"]["ms"]["tokens_per_step"] == 1.0
    assert result["modes"]["speculative"]["ms"]["tokens_per_step"] > 1.0


def test_answers_too_short_to_measure_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, _ = write_pair(tmp_path)
    assert step_profile.main([str(target), "--max-tokens", "3", *ON_CPU]) == 1
    assert "step_profile: error: --max-tokens 3 took 2 steps, expected over 3" in capsys.readouterr().err
    assert step_profile.main([str(tmp_path / "none"), *ON_CPU]) == 1
    assert "none" in capsys.readouterr().err
