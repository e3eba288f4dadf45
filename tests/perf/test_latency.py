"""The arithmetic of the latency benchmark, on made-up clocks; nothing here measures time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engine.cli.bench_latency import spread
from engine.core import Delta, Request, SamplingParams
from engine.errors import ConfigError
from engine.step import Engine
from perf import latency, provenance
from perf.latency import Prompt, Run
from verify.stats import StepTimes


@dataclass
class ScriptedEngine:
    """Plays back deltas; every step takes one second of the fake clock below."""

    deltas: list[list[Delta]]
    now: float = 0.0
    last_times: StepTimes = field(default_factory=lambda: StepTimes(0.25, 0.5, 0.1))

    @property
    def has_work(self) -> bool:
        return bool(self.deltas)

    def add(self, request: Request) -> None:
        assert request.id == 7

    def step(self) -> list[Delta]:
        self.now += 1.0
        return self.deltas.pop(0)


def test_a_run_is_cut_at_its_first_token() -> None:
    engine = ScriptedEngine(
        [
            [Delta(7, (), None, is_decode=False)],
            [Delta(7, (5,), None, is_decode=False)],
            [Delta(7, (6, 7, 8), None)],
            [Delta(7, (9,), "length")],
        ]
    )
    run = latency.run_engine(cast(Engine, engine), Request(7, (1, 2), SamplingParams()), lambda: engine.now)
    assert (run.ttft_s, run.decode_s, run.total_s) == (2.0, 2.0, 4.0)
    assert (run.token_ids, run.decode_tokens) == ([5, 6, 7, 8, 9], 4)
    assert (run.step_s, run.draft_s, run.verify_s) == ([1.0, 1.0], [0.25] * 2, [0.5] * 2)


def run_of(tokens: int, seconds: float, steps: int) -> Run:
    return Run(
        list(range(tokens + 1)),
        tokens,
        1.0,
        seconds,
        seconds + 1.0,
        [seconds / steps] * steps,
        [0.001] * steps,
        [0.002] * steps,
    )


def test_rates_are_sums_over_sums() -> None:
    one, two = Prompt("a", "prose", "x"), Prompt("b", "code", "y")
    rows = [
        latency.Row(one, 0, {"plain": run_of(10, 10.0, 10), "spec": run_of(10, 2.0, 5)}),
        latency.Row(two, 0, {"plain": run_of(30, 10.0, 30), "spec": run_of(29, 18.0, 29)}),
    ]
    result = latency.report(rows)
    assert (result["plain_tok_s"], result["spec_tok_s"]) == (2.0, 1.95)
    assert result["speedup"] == 0.975
    assert result["acceptance_length"] == pytest.approx(39 / 34, abs=1e-4)
    assert result["texts_equal_share"] == 0.5
    assert result["kinds"]["prose"]["speedup"] == 5.0
    assert (result["ttft_ms_p50"], result["draft_ms_p50"]) == (1000.0, 1.0)
    assert [row["id"] for row in latency.per_prompt(rows)] == ["a", "b"]


def test_an_answer_of_one_token_has_no_rate() -> None:
    row = latency.Row(
        Prompt("a", "prose", "x"),
        0,
        {"plain": Run([4], 0, 1.0, 0.0, 1.0), "spec": Run([4], 0, 1.0, 0.0, 1.0)},
    )
    result = latency.report([row])
    assert result["plain_tok_s"] is None
    assert result["speedup"] is None
    assert result["step_ms_p50"] is None
    assert result["plain_e2e_tok_s"] == 1.0
    json.dumps(result)


def test_modes_take_turns_at_going_first() -> None:
    called: list[str] = []

    def mode(name: str) -> latency.Mode:
        return lambda prompt: called.append(name + prompt.id) or Run()  # type: ignore[func-returns-value]

    prompts = [Prompt(str(n), "k", "x") for n in range(2)]
    rows = list(latency.interleave(prompts, {"p": mode("p"), "s": mode("s")}, 2))
    assert called == ["p0", "s0", "s1", "p1", "s0", "p0", "p1", "s1"]
    assert [list(row.runs) for row in rows] == [["p", "s"]] * 4


def test_our_prompt_set() -> None:
    prompts = latency.read_prompts(latency.DEFAULT_PROMPTS)
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 24
    assert {prompt.kind for prompt in prompts} == {"prose", "facts", "code", "lists", "json"}
    few = [prompt.id for prompt in spread(prompts, 6)]
    assert few == ["prose-1", "facts-1", "code-1", "lists-1", "json-1", "prose-2"]
    assert spread(prompts, None) == prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompt found"),
        ("{", "line 1: not JSON"),
        ('{"id": "a", "kind": "b"}', "line 1: expected an object"),
        ('{"id": 1, "kind": "b", "prompt": "c"}', "line 1: expected"),
        ("[]", "line 1: expected"),
    ],
)
def test_a_bad_prompt_set_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        latency.read_prompts(tmp_path / "p.jsonl")


def test_provenance_names_code_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "driver_version", lambda: "580.95.05")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    on_gpu = provenance.provenance("cuda", "bfloat16")
    assert (on_gpu["device"], on_gpu["driver"]) == ("NVIDIA H200", "580.95.05")
    found: dict[str, Any] = provenance.provenance("cpu", "bfloat16")
    assert found["driver"] is None
    assert found["dtype"] == "bfloat16"
    assert found["device"]
    json.dumps(found)
    assert provenance.command(["/somewhere/bin/haast", "bench", "latency"]) == "haast bench latency"
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16x\n")
    assert provenance.cpu(info) == ("Some CPU @ 2GHz", ["avx2", "avx512_bf16"])
