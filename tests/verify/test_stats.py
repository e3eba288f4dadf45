"""The per-step log: one record for each request and decode step, complete enough to replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.core import Request, SamplingParams, Speculation
from engine.errors import ConfigError
from tests.engine.rig import PLAIN, echo_model, make_engine, prompts_of
from verify.stats import StepLog, StepTimes


def test_times_add_up() -> None:
    assert StepTimes(1.0, 2.0, 4.0).total_s == 7.0


def test_an_unwritable_log_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--spec-log .*missing.*No such file"):
        StepLog(str(tmp_path / "missing" / "log.jsonl"))


@pytest.mark.parametrize("draft", ["eagle3", "ngram"])
def test_the_log_retells_the_run(tmp_path: Path, draft: str) -> None:
    """Accepted nodes and bonuses rebuild every request's answer; scores have one entry for each node."""
    log = StepLog(str(tmp_path / "log.jsonl"))
    engine = make_engine(echo_model(2), draft)
    engine.step_log = log
    prompts = prompts_of([4, 9, 3])
    specs: list[Speculation | None] = [None, PLAIN, Speculation(4, 3, 1)]
    for i, (prompt, spec) in enumerate(zip(prompts, specs, strict=True)):
        engine.add(
            Request(i, tuple(prompt), SamplingParams(temperature=0.5 * i, seed=i, max_tokens=12), spec)
        )
    emitted: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while engine.has_work:
        for delta in engine.step():
            emitted[delta.request_id] += delta.token_ids
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for i, prompt in enumerate(prompts):
        mine = [record for record in records if record["request"] == i]
        whole = prompt + emitted[i]
        steps = [record["step"] for record in mine]
        assert steps == sorted(set(steps))
        for record in mine:
            length = len(record["tokens"])
            assert record["tokens"][0] == whole[record["context_len"] - 1]
            assert len(record["parents"]) == len(record["depth"]) == length
            assert record["temperature"] == 0.5 * i
            assert record["speculation"] == ("on" if length > 1 else "off")
            if i == 1:
                assert record["reason"] == "request said off"
            elif length > 1:
                assert record["reason"] == "as asked"
            else:
                assert record["reason"] in ("as asked: nothing was proposed", "request said off")
            assert record["draft_ms"] >= 0 < record["verify_ms"]
            if "raw" in record:
                assert len(record["raw"]) == len(record["value"]) == len(record["rank"]) == length
                assert record["raw"][0] == record["value"][0] == 1
            accepted = [record["tokens"][node] for node in record["accepted"]]
            assert accepted == whole[record["context_len"] : record["context_len"] + len(accepted)]
        contexts = [record["context_len"] + len(record["accepted"]) + 1 for record in mine]
        assert contexts[:-1] == [record["context_len"] for record in mine[1:]]
    assert any("raw" in record for record in records) == (draft == "eagle3")
