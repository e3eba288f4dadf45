"""Prompts: read from files of several forms, made of words, chosen by kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from perf import workload
from perf.workload import DEFAULT_PROMPTS, Ask


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def test_our_own_prompts() -> None:
    asks = workload.read_custom(DEFAULT_PROMPTS)
    assert Counter(ask.kind for ask in asks) == dict.fromkeys(("prose", "facts", "code", "lists", "json"), 6)


def test_custom(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "one"},
        {"prompt": "zw\u00f6lf\u2028 lines", "kind": "k", "output_tokens": 3},
    )
    assert workload.read_custom(path) == [Ask("one", "custom"), Ask("zw\u00f6lf\u2028 lines", "k", 3)]


def test_sharegpt(tmp_path: Path) -> None:
    def turns(*values: str, first: str = "human") -> dict[str, object]:
        return {"conversations": [{"from": first, "value": value} for value in values]}

    conversations = [turns("ask", "answer", "more"), turns("alone"), turns("system", "x", first="system")]
    wanted = [Ask("ask", "sharegpt")]
    lines = write(tmp_path / "a.jsonl", *conversations)
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps(conversations, indent=1))
    assert workload.read_sharegpt(lines) == workload.read_sharegpt(whole) == wanted


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            "custom",
            '{"prompt": "a"}\n{"text": "b"}',
            'line 2: found {"text": "b"}, expected a text as prompt',
        ),
        ("custom", '{"prompt": ""}', "expected a text as prompt"),
        ("custom", '{"prompt": "a", "kind": 5}', "kind is 5, expected a text"),
        (
            "custom",
            '{"prompt": "a", "output_tokens": 0}',
            "output_tokens is 0, expected a number of at least",
        ),
        ("custom", "oops", "line 1: not JSON"),
        ("custom", "5", "found 5, expected an object"),
        ("custom", " \n", "no prompt found"),
        ("sharegpt", '[{"id": 1}]', "expected a list as conversations"),
        ("sharegpt", '[{"conversations": []}]', "no prompt found"),
        ("sharegpt", "[5]", "found 5, expected an object"),
    ],
)
def test_files_that_are_none(read: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        {"custom": workload.read_custom, "sharegpt": workload.read_sharegpt}[read](path)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        workload.read_custom(tmp_path / "missing")


def test_random_prompts() -> None:
    asks = workload.generated(200, 40, rng(), range_ratio=0.25)
    lengths = [len(ask.prompt.split()) for ask in asks]
    assert (min(lengths), max(lengths)) == (30, 50)
    assert len({ask.prompt for ask in asks}) == 200
    assert workload.generated(200, 40, rng(), range_ratio=0.25) == asks
    assert workload.generated(200, 40, rng(1), range_ratio=0.25) != asks
    assert {len(ask.prompt.split()) for ask in workload.generated(9, 7, rng())} == {7}


def test_prompts_with_beginnings_in_common() -> None:
    asks = workload.generated(9, 5, rng(), prefix_len=30, num_prefixes=4, kind="prefix_repetition")
    beginnings = Counter(" ".join(ask.prompt.split()[:30]) for ask in asks)
    assert sorted(beginnings.values()) == [2, 2, 2, 3]
    assert len({ask.prompt for ask in asks}) == 9
    assert {len(ask.prompt.split()) for ask in asks} == {35}


def test_a_choice_has_every_kind_equally_often() -> None:
    asks = [Ask(f"{kind} {number}", kind) for kind in "abc" for number in range(6)]
    for chosen in (workload.pick(asks, 9, rng()), workload.pick(asks, 9, None)):
        assert Counter(ask.kind for ask in chosen) == {"a": 3, "b": 3, "c": 3}
        assert len(set(chosen)) == 9
    assert workload.pick(asks, None, None) == asks
    shuffled = workload.pick(asks, None, rng())
    assert shuffled != asks
    assert set(shuffled) == set(asks)
    assert workload.pick(asks, 18, rng()) == shuffled == workload.pick(asks, None, rng())
    assert workload.pick(asks, 20, rng()) == shuffled + shuffled[:2]


def test_lengths_of_answers() -> None:
    asks = [Ask("a", "k"), Ask("b", "k", 3)]
    assert [ask.output_len for ask in workload.with_lengths(asks, 7)] == [7, 3]
