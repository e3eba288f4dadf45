"""The table and the picture of step times, from results that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perf import step_plot


def row(nodes: int, verify_ms: float, **changes: Any) -> dict[str, Any]:
    made_up = {
        "routing": "uniform", "batch": 1, "context": 1024, "nodes": nodes, "step_ms": verify_ms + 1,
        "verify_ms": verify_ms, "draft_ms": 0.25 * nodes, "floor_ms": verify_ms / 2, "floor_share": 0.5,
    }  # fmt: skip
    return made_up | changes


def result(device: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "steps", "device": device, "quantization": "fp8", "dtype": "bfloat16", "num_layers": 36,
        "steps": rows,
    }  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first = [
        row(4, 20.0), row(1, 10.0), row(4, 15.0, routing="alike"), row(1, 99.0, batch=2),
        row(1, 98.0, context=32768),
    ]  # fmt: skip
    for name, rows in (("a", first), ("b", [row(1, 5.0)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(f"GPU {name}", rows)))
    return [tmp_path / "a.json", tmp_path / "b.json"]


def test_the_table(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert step_plot.main([str(file) for file in files]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    columns = ("step ms", "verify ms (share of the floor)", "draft ms")
    assert (
        title
        == "| nodes | "
        + " | ".join(f"GPU {name}, fp8, 36 layers: {column}" for name in "ab" for column in columns)
        + " |"
    )
    assert lines == [
        "|---|---|---|---|---|---|---|",
        "| 1 | 11.00 | 10.00 (50%) |  | 6.00 | 5.00 (50%) |  |",
        "| 4 | 21.00 | 20.00 (50%) | 1.00 |  |  |  |",
    ]


def test_the_picture(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "steps.png"
    assert step_plot.main([*map(str, files), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    first, second = step_plot.draw([step_plot.read_result(file) for file in files]).axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in first.get_lines()}
    assert lines == {
        "uniform": [(1, 10.0), (4, 20.0)], "uniform, floor": [(1, 5.0), (4, 10.0)], "alike": [(4, 15.0)],
        "alike, floor": [(4, 7.5)],
    }  # fmt: skip
    assert len(second.get_lines()) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "latency"}'])
def test_other_files_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert step_plot.main([str(tmp_path / "x.json")]) == 1
    said = capsys.readouterr()
    assert "x.json: " in said.err
    assert said.out == ""
