"""The memory measurement: what it reads, what it counts, and that a broken promise is not passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.synthetic import write_target
from engine.checkpoint.synthetic_config import TINY, TINY_VISION
from engine.errors import ConfigError
from engine.nn.weight import Fp8Weight, Nvfp4Weight
from perf import load_memory

STATUS = "Name:\tpython\nVmHWM:\t    2048 kB\nRssAnon:\t      12 kB\nRssFile:\t 3 kB\nThreads:\t1\n"


def test_a_tiny_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, in a fresh process."""
    target = write_target(tmp_path / "tiny", TINY, "native-fp8", vision=TINY_VISION, num_shards=2)
    out = tmp_path / "result.json"
    assert load_memory.main([str(target), "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert {"commit", "device", "torch", "command"} <= result.keys()
    [row] = result["rows"]
    sizes = [file.stat().st_size for file in target.glob("*.safetensors")]
    assert (row["checkpoint"], row["format"], row["num_files"]) == ("tiny", "NativeCheckpoint", 2)
    assert (row["file_bytes"], row["largest_file_bytes"]) == (sum(sizes), max(sizes))
    assert row["bound_bytes"] == max(sizes) + 10**9
    assert 100_000 < row["weight_bytes"] < sum(sizes)  # vision is not loaded
    assert row["besides_weights_bytes"] == row["peak_bytes"] - row["weight_bytes"]
    assert row["peak_bytes"] >= row["before_bytes"] > 50e6  # torch alone is more
    assert row["peak_bytes"] >= row["peak_anonymous_bytes"] > row["weight_bytes"]
    assert row["num_samples"] >= 1
    assert row["holds"] is True


def test_a_broken_promise_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def row(directory: str, dtype: str, device: str) -> dict[str, Any]:
        keys = ("file", "weight", "peak", "besides_weights", "bound")
        sizes = {f"{key}_bytes": 10**9 for key in keys}
        return {"checkpoint": directory, "holds": directory == "a", "seconds": 1.0, "gb_per_s": 1.0} | sizes

    monkeypatch.setattr(load_memory, "in_fresh_process", row)
    assert load_memory.main(["a", "a", "--device", "cpu"]) == 0
    assert load_memory.main(["a", "b", "--device", "cpu"]) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 2


def test_memory_that_the_result_does_not_explain_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak minus result against largest file plus 1 GB, on either side of the edge."""
    target = write_target(tmp_path / "tiny", TINY, "native-bf16")
    [file] = target.glob("*.safetensors")
    weights = load_memory.measure(str(target), "bfloat16", "cpu")["weight_bytes"]
    real = load_memory.memory
    for spare, holds in ((0, True), (1, False)):
        peak = weights + file.stat().st_size + 10**9 + spare
        monkeypatch.setattr(load_memory, "memory", lambda status, peak=peak: real(status) | {"VmHWM": peak})
        assert load_memory.measure(str(target), "bfloat16", "cpu")["holds"] == holds


def test_bytes_of_weights() -> None:
    codes = torch.zeros(2, 4, 8, dtype=torch.uint8)
    scale = torch.zeros(2)
    assert load_memory.weight_bytes([torch.zeros(3, dtype=torch.bfloat16), torch.zeros(1)]) == 10
    assert load_memory.weight_bytes([Fp8Weight(codes, scale, None)]) == 64 + 8
    assert load_memory.weight_bytes([Fp8Weight(codes, scale, scale), Nvfp4Weight(codes, codes, scale)]) == 216


def test_status_is_read_in_bytes() -> None:
    assert load_memory.memory(STATUS) == {"VmHWM": 2 << 20, "RssAnon": 12 << 10, "RssFile": 3 << 10}
    with pytest.raises(ConfigError, match="has no RssFile; memory is measured on Linux only"):
        load_memory.memory(STATUS.replace("RssFile", "RssShmem"))


def test_what_cannot_be_loaded_is_the_readers_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_memory.main([str(tmp_path), "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "no config.json in this directory, found nothing" in said.err
