"""``--speculative-config`` and the flags that say the same: what they mean and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli import loading, options, speculative
from engine.cli.speculative import Asked, asked, check_method, from_json
from engine.core import Speculation
from engine.errors import ConfigError
from tests.engine.test_build_mistral import write_pair
from tests.server.test_launch_line import parse

DEFAULT = Speculation(8, 4, 4)


def config(**keys: Any) -> Asked:
    return from_json(json.dumps(keys))


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({}, DEFAULT),
        ({"num_speculative_tokens": 3}, Speculation(4, 3, 4)),
        ({"num_speculative_tokens": 3, "top_k": 1}, Speculation(4, 3, 1)),
        ({"lookup": 12}, Speculation(8, 4, 4, lookup=12)),
        ({"num_speculative_tokens": 3, "tree": 8}, Speculation(8, 3, 4)),
        ({"num_speculative_tokens": 16, "depth": 16}, Speculation(17, 16, 4)),
        ({"tree": 64, "depth": 0, "top_k": 16}, Speculation(64, 0, 16)),
        ({"depth": 2, "num_speculative_tokens": None}, Speculation(8, 2, 4)),
    ],
)
def test_sizes(keys: dict[str, Any], size: Speculation) -> None:
    assert config(**keys).size(DEFAULT) == size
    with_lookup = dataclasses.replace(DEFAULT, lookup=6)
    most = keys.get("num_speculative_tokens") or 6  # no more than a step may accept
    expected = dataclasses.replace(size, lookup=keys.get("lookup", min(6, most)))
    assert config(**keys).size(with_lookup) == expected


@pytest.mark.parametrize(
    ("keys", "head", "method", "max_model_len"),
    [
        ({"model": "a/b", "max_model_len": "16384"}, "a/b", None, 16384),
        ({"model": "a/b", "method": "eagle", "max_model_len": 9}, "a/b", "eagle", 9),
        ({"model": "a/b", "method": "eagle3", "draft_tensor_parallel_size": 1}, "a/b", "eagle3", None),
        ({"method": "ngram"}, "ngram", "ngram", None),
        ({"model": "ngram", "method": "ngram"}, "ngram", "ngram", None),
        ({"model": "ngram"}, "ngram", None, None),
        ({"method": "none"}, "none", "none", None),
    ],
)
def test_heads(keys: dict[str, Any], head: str, method: str | None, max_model_len: int | None) -> None:
    found = config(**keys)
    assert (found.head, found.method, found.max_model_len) == (head, method, max_model_len)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is '', expected a JSON object"),
        ("{", "is '{', expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"tree": NaN}', "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"tree": ' * 100_000, "expected a JSON object"),
        ("\udcff", "expected a JSON object"),
        ('{"num_spec_tokens": 3}', "unknown key 'num_spec_tokens'; did you mean 'num_speculative_tokens'?"),
        ('{"zzz": 3}', "unknown key 'zzz'; known: model, method, num_speculative_tokens, tree"),
        (
            '{"num_speculative_tokens": 0}',
            "num_speculative_tokens is 0, expected a whole number from 1 to 16",
        ),
        ('{"num_speculative_tokens": "3"}', "num_speculative_tokens is '3', expected a whole number"),
        ('{"num_speculative_tokens": true}', "num_speculative_tokens is True, expected a whole number"),
        ('{"num_speculative_tokens": 3.0}', "num_speculative_tokens is 3.0, expected a whole number"),
        ('{"max_model_len": "16k"}', "max_model_len is '16k', expected a whole number"),
        ('{"max_model_len": "99999999999999999999"}', "max_model_len is '9999.*, expected a whole number"),
        ('{"max_model_len": 0}', "max_model_len is 0, expected a whole number from 1"),
        ('{"tree": 65}', "tree is 65, expected a whole number from 1 to 64"),
        ('{"depth": -1}', "depth is -1, expected a whole number from 0 to 16"),
        ('{"top_k": 17}', "top_k is 17, expected a whole number from 1 to 16"),
        ('{"draft_tensor_parallel_size": 2}', "draft_tensor_parallel_size is 2, expected .* from 1 to 1"),
        ('{"model": 3}', "model is 3, expected a string"),
        ('{"method": "mtp"}', "method is 'mtp', expected 'eagle', 'eagle3', 'ngram' or 'none'"),
        ('{"method": "ngram", "model": "x"}', "method is 'ngram' and .*model is 'x', expected one of them"),
        ('{"method": "eagle", "model": "none"}', "method is 'eagle' and .*model is 'none', expected a draft"),
        (
            '{"num_speculative_tokens": 3, "depth": 2}',
            "num_speculative_tokens is 3 and .*depth is 2, expected one of them",
        ),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--speculative-config.*{message}"):
        from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.dictionaries(st.sampled_from(speculative.KEYS), JSON).map(json.dumps)))
def test_junk_is_a_config_error_or_a_size(text: str) -> None:
    try:
        size = from_json(text).size(DEFAULT)
    except ConfigError:
        return
    assert 1 <= size.nodes <= 64
    assert 0 <= size.depth <= 16
    assert 1 <= size.top_k <= 16
    assert 0 <= size.lookup <= 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--spec-tokens", "3"], Asked(num_tokens=3)),
        (["--spec-method", "ngram"], Asked("ngram", "ngram")),
        (["--speculative-algorithm", "NGRAM", "--spec-tokens", "5"], Asked("ngram", "ngram", 5)),
        (["--spec-model", "h", "--spec-method", "EAGLE3", "--spec-max-model-len", "7"], Asked(
            "h", "eagle3", max_model_len=7)),
        (["-sc", '{"model": "h", "tree": 6}'], Asked("h", nodes=6)),
    ],
)  # fmt: skip
def test_flags_say_the_same(words: list[str], expected: Asked) -> None:
    assert asked(parse("model", *words)) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spec-tokens", "0"], "--spec-tokens is 0, expected 1 to 16"),
        (["--spec-tokens", "3", "--spec-depth", "2"], "--spec-tokens is 3 and --spec-depth is 2"),
        (["--spec-method", "none", "--spec-model", "h"], "--spec-method is 'none' and --spec-model is 'h'"),
        (["-sc", "{}"], "required key 'model' is missing"),
        (["-sc", "{}", "--spec-nodes", "4"], "found --speculative-config and --spec-nodes, expected one"),
        (["-sc", "{}", "--spec-model", "h"], "found --speculative-config and --spec-model, expected one"),
        (["-sc", "{}", "--spec-method", "none"], "found --speculative-config and --spec-method, expected"),
        (["-sc", "{}", "--spec-max-model-len", "4"], "and --spec-max-model-len, expected one"),
        (["-sc", "{}", "--speculative-num-steps", "4"], "and --spec-depth, expected one"),
    ],
)
def test_what_does_not_fit_together(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.engine_config(parse("model", *words))


def test_a_clash_says_where_the_other_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_SPEC_TOP_K", "2")
    with pytest.raises(ConfigError, match=r"and --spec-top-k \(from HAAST_SPEC_TOP_K\), expected one"):
        asked(parse("-sc", "{}"))


def test_the_method_is_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, head = write_pair(tmp_path, "native-fp8")
    check_method(Asked(head, "eagle"))
    check_method(Asked(None, "eagle3"))  # the shipped head
    check_method(Asked("nowhere"))
    built: list[Any] = []
    monkeypatch.setattr(loading, "build", lambda *args: built.append(args))
    for words, message in (
        (
            (target, "--spec-model", head, "--spec-method", "eagle3"),
            "is 'eagle3', but .* is a head of 'eagle'",
        ),
        (("--spec-method", "eagle"), "is 'eagle', but .* is a head of 'eagle3'"),
        (
            (target, "--spec-method", "eagle"),
            "--spec-method is 'eagle', expected a draft head as --spec-model",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            loading.open_engine(parse(*words))
    assert not built
