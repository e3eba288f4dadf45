"""The bandwidth bound: expected experts against a simulation, bytes against sums by hand, shares of it."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from engine.checkpoint.native import read_mistral_head
from engine.checkpoint.synthetic import write_head, write_target
from engine.checkpoint.synthetic_config import TINY, head_config
from engine.cli.roofline import GPUS, Reads, distinct_experts, floor_seconds, routing_overlap, step_bytes
from engine.errors import ConfigError
from perf.roofline import bandwidth_share, gpu_named, main

READS = Reads(always=1000, experts=640, num_experts=8, num_experts_per_token=2, token_row=10, kv_row=3)


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8])
def test_distinct_experts_are_those_of_a_simulation(num_tokens: int) -> None:
    generator, trials = random.Random(num_tokens), 4000
    total = 0
    for _ in range(trials):
        total += len({expert for _ in range(num_tokens) for expert in generator.sample(range(16), 3)})
    assert distinct_experts(16, 3, num_tokens) == pytest.approx(total / trials, rel=0.02)


def test_distinct_experts_of_small_4() -> None:
    """Four a token, all 128 for a prompt; none where there are none."""
    assert distinct_experts(128, 4, 1) == pytest.approx(4)
    assert distinct_experts(128, 4, 8) == pytest.approx(28.710415, rel=1e-6)
    assert distinct_experts(128, 4, 1000) == pytest.approx(128)
    assert distinct_experts(0, 0, 8) == 0


def test_step_bytes_by_hand() -> None:
    assert step_bytes(READS, 1, context=0) == 1000 + 640 * 2 / 8 + 10
    # two tokens: 2 + 6/8 * 2 = 3.5 experts of 80 bytes
    assert step_bytes(READS, 2, context=100) == pytest.approx(1000 + 3.5 * 80 + 20 + 300)
    # a batch shares experts as nodes do, and rows of the cache with nobody
    assert step_bytes(READS, 1, batch=2, context=100) == pytest.approx(1000 + 3.5 * 80 + 20 + 600)
    # experts that were counted are not expected
    assert step_bytes(READS, 2, context=0, distinct=3) == 1000 + 3 * 80 + 20
    dense = dataclasses.replace(READS, experts=0, num_experts=0, num_experts_per_token=0)
    assert step_bytes(dense, 4, context=0) == 1040


def test_overlap_is_what_turns_tokens_into_fewer() -> None:
    """At an overlap of a half, four tokens choose as many experts as two and a half independent ones."""
    assert routing_overlap(128, 4, 4, distinct_experts(128, 4, 4)) == pytest.approx(0)
    assert routing_overlap(128, 4, 4, 9.77) == pytest.approx(0.5, abs=0.005)
    assert routing_overlap(128, 4, 16, 4) == pytest.approx(1)
    assert routing_overlap(8, 4, 2, 8) < 0  # fewer shared than by chance


def test_gpus_have_what_their_names_say() -> None:
    """nvidia-smi's total lies within 7 % of the name's gigabytes, counted in one of the two ways."""
    assert len({gpu.name for gpu in GPUS}) == len(GPUS) >= 6
    for gpu in GPUS:
        gigabytes = int(gpu.name.split()[-1].removesuffix("GB"))
        assert 0.93 * gigabytes * 2**30 < gpu.memory_bytes <= gigabytes * 2**30, gpu
        assert str(gigabytes) in gpu.source.replace("1,440 GB", "180")
    assert floor_seconds(3.35e12, gpu_named("h100")) == 1


def test_bandwidth_share() -> None:
    assert bandwidth_share(2.4e9, 1e-3, gpu_named("H200")) == pytest.approx(0.5)
    for name in ("H", "V100", ""):
        with pytest.raises(ConfigError, match=f"--gpu is '{name}', expected one of L40S 48GB, A100"):
            gpu_named(name)


def test_roofline_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_target(tmp_path / "tiny", TINY, "native-bf16")
    words = [str(target), "--nodes", "2", "4", "--batch", "3", "--context", "100", "--step-ms", "0.001"]
    assert main([*words, "--gpu", "B200"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["model"], result["gpu"], result["batch"]) == ("tiny", "B200 180GB", 3)
    first, second = result["rows"]
    assert first["experts_per_layer"] == pytest.approx(8 * (1 - 0.75**6), abs=0.01)
    assert second["floor_ms"] >= first["floor_ms"] > 0
    assert first["bandwidth_share"] == pytest.approx(first["gigabytes"] / 8 / 1e-3, rel=0.1)
    assert "bandwidth_share" not in second


def test_roofline_of_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the file holds, kv_b in bfloat16, and the output, whose vocabulary is too small to cut."""
    target = write_target(tmp_path / "tiny", TINY, "native-bf16")
    head = write_head(tmp_path / "head", head_config(TINY))
    assert (
        main([str(target), "--spec-model", str(head), "--gpu", "H200", "--context", "7", "--batch", "2"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = read_mistral_head(head).stored.values()
    held = sum(one.num_elements * (1 if one.dtype == "F8_E4M3" else 2) for one in stored if one.shape)
    kv_b = 2 * 4 * (16 + 32) * 16
    read = held + kv_b + 512 * 64 * 2 + 2 * 7 * 2 * (16 + 16) * 2
    rows_and_scales = 2 * 64 * 2 + 4 * sum(not one.shape for one in stored)
    assert result["draft_level_bytes"] == pytest.approx(read, abs=rows_and_scales)
    assert result["draft_level_floor_ms"] == pytest.approx(1e3 * read / 4.8e12, abs=1e-4)
    assert main([str(target), "--spec-model", "nowhere"]) == 1
    assert "nowhere: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nowhere"], ["x", "--batch", "0"], ["x", "--step-ms", "-1"]])
def test_mistakes_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("roofline: error: ")
    assert len(said.err.splitlines()) == 1
