"""Grammars compiled for a vocabulary: what they match, what they refuse, and that no client can make it cost
much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from engine.core import Grammar
from engine.errors import RequestError
from engine.text import grammar as module
from engine.text.compile_guard import CompileGuard
from engine.text.conversation import AnyTokenizer
from engine.text.grammar import MAX_GRAMMAR_BYTES, MAX_REGEX_LEN, MAX_SCHEMA_DEPTH, GrammarCompiler
from engine.text.mistral import MistralTokenizer
from tests.text.tekken import tekken_data
from tests.text.toy import CONTROL, toy_tokenizer

TOY = toy_tokenizer()
GUARD = CompileGuard(most_seconds=0.5)
COMPILER = GrammarCompiler(TOY, GUARD)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
FREE = {"whitespace_flexible": True, "item_separator": ",", "key_separator": ":"}


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def nested(count: int) -> dict[str, Any]:
    """2 * count + 1 objects inside one another."""
    inner: dict[str, Any] = {}
    for _ in range(count):
        inner = {"properties": {"a": inner}}
    return inner


def matches(grammar: Grammar, text: str) -> bool:
    """Whether a text matches from its first byte to its last."""
    matcher, ids = COMPILER.matcher(grammar), TOY.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


def allowed(matcher: LLMatcher, tokenizer: AnyTokenizer) -> set[int]:
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    fill_next_token_bitmask(matcher, mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (schema(PERSON), '{"name": "ann", "age": 12}', '{"age": 12}'),
        (schema(PERSON), '{"name": "ann"}', '{"name":"ann"}'),
        (schema(PERSON | {"x-guidance": FREE}), '{ "name":"ann" }', '{"age":1}'),
        (schema({}), "[1, null, {}]", "[1 ,null]"),
        (schema(nested(MAX_SCHEMA_DEPTH // 2 - 1)), '{"a": {}}', "1 2"),
        (Grammar("json_object", ""), '{"a": [true, 1.5]}', "[1]"),
        (Grammar("regex", "[ab]+|c"), "abba", "abc"),
        (Grammar("regex", r"^\d{2}$"), "12", "123"),
        (Grammar("choice", '["yes", "no", "a \\"b\\" \\\\ c"]'), 'a "b" \\ c', "ye"),
        (Grammar("lark", 'start: "a" b\nb: /[0-9]/'), "a1", "ab"),
        (Grammar("lark", 'root ::= "a" b\nb ::= [0-9]'), "a1", "ab"),
    ],
)
def test_what_a_grammar_matches(grammar: Grammar, good: str, bad: str) -> None:
    assert matches(grammar, good)
    assert not matches(grammar, bad)


def small_tekken(directory: Path) -> MistralTokenizer:
    file = directory / "tekken.json"
    file.write_text(json.dumps(tekken_data(2000)), encoding="utf-8")
    return MistralTokenizer.from_file(file)


@pytest.mark.parametrize("kind", ["tokenizers", "tekken"])
def test_control_tokens_match_by_name_alone(kind: str, tmp_path: Path) -> None:
    tokenizer: AnyTokenizer = TOY if kind == "tokenizers" else small_tekken(tmp_path)
    compiler = GrammarCompiler(tokenizer, GUARD)
    control = set(tokenizer.special_tokens.values()) - set(tokenizer.eos_token_ids)
    assert control
    anything = allowed(compiler.matcher(Grammar("regex", "(?s:.*)")), tokenizer)
    assert len(anything) > 40
    assert not anything & control
    name = CONTROL if kind == "tokenizers" else "[TOOL_CALLS]"
    by_name = Grammar("lark", f"start: <{name[1:-1]}>")
    assert allowed(compiler.matcher(by_name), tokenizer) == {tokenizer.special_tokens[name]}


def test_the_name_of_a_control_token_in_a_text_is_text() -> None:
    """An answer must not end because a schema has the text of an end token in it."""
    matcher = COMPILER.matcher(schema({"const": "</s>"}))
    matcher.consume_tokens(TOY.encode('"'))
    assert TOY.eos_token_ids[0] not in allowed(matcher, TOY)
    (token,) = allowed(matcher, TOY)
    assert TOY.token_bytes(token) == b"<"


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("json_schema", "{"), "cannot be compiled"),
        (Grammar("json_schema", '{"type": "nope"}'), "nope"),
        (Grammar("json_schema", "false"), "found a JSON bool"),
        (Grammar("json_schema", "12"), "found a JSON int"),
        (schema({"$ref": "#/$defs/missing"}), "missing"),
        (schema({"$ref": "http://localhost/schema"}), "localhost"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (schema({"type": "object", "dependentSchemas": {"a": {}}}), "dependentSchemas"),
        (Grammar("json_schema", '{"items":' * 65 + "true" + "}" * 65), "65 levels"),
        (Grammar("json_schema", '{"items":' * 100_000 + "true" + "}" * 100_000), "at most 262144"),
        (Grammar("json_schema", '{"items":' * 20_000 + "true" + "}" * 20_000), "recursion"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", "a" * (MAX_REGEX_LEN + 1)), str(MAX_REGEX_LEN)),
        (Grammar("regex", "\ud800"), "surrogate"),
        (schema(nested(MAX_SCHEMA_DEPTH // 2)), f"{MAX_SCHEMA_DEPTH + 1} levels"),
        (Grammar("choice", '{"a": 1}'), "list of strings"),
        (Grammar("choice", "[1]"), "list of strings"),
        (Grammar("choice", "[]"), "found 0 choices"),
        (Grammar("lark", "start: foo"), "foo"),
        (Grammar("lark", ""), "GBNF"),
        (Grammar("lark", 'root ::= "a'), "GBNF"),
        (Grammar("lark", "x" * (MAX_GRAMMAR_BYTES + 1)), str(MAX_GRAMMAR_BYTES)),
    ],
)
def test_a_malformed_grammar_is_refused_with_its_field_and_the_reason(grammar: Grammar, said: str) -> None:
    with pytest.raises(RequestError, match=f"(?s){said}") as caught:
        COMPILER.matcher(grammar, "structured_outputs.x")
    assert caught.value.param == "structured_outputs.x"
    assert len(str(caught.value)) < 400


def test_cve_2025_48943_a_pattern_that_explodes_is_refused_and_the_next_grammar_compiles() -> None:
    """llguidance's own limits do not bound this one: without the guard it runs for ever."""
    bomb = schema({"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b.*"} for n in range(30)]})
    with pytest.raises(RequestError, match=r"more than 0\.5 s of processor time"):
        COMPILER.matcher(bomb)
    assert matches(Grammar("regex", "ab"), "ab")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
        Grammar("regex", "(a|b)*a(a|b){200}"),
        schema(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(4)]} for i in range(12)
                ]
            }
        ),
        schema({"type": "array", "minItems": 10**6, "maxItems": 10**6, "items": {"type": "integer"}}),
        Grammar(
            "lark", "\n".join(["start: a0", *(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)), 'a40: "x"'])
        ),
    ],
)
def test_what_would_explode_costs_a_step_no_more_than_its_limits(grammar: Grammar) -> None:
    """It is refused, or every step on it ends, with an error if need be."""
    try:
        matcher = COMPILER.matcher(grammar)
    except RequestError:
        return
    for _ in range(20):
        following = allowed(matcher, TOY) - set(TOY.eos_token_ids)
        if not following or not matcher.consume_token(min(following)):
            assert matcher.is_error() or matcher.is_stopped()
            return


class CountingGuard(CompileGuard):
    """How often a grammar was tried out."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def complaint(self, source: str) -> str:
        self.num_asked += 1
        return super().complaint(source)


def test_cve_2025_29770_what_is_compiled_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 3)
    monkeypatch.setattr(module, "_MOST_KEPT_BYTES", 100)
    guard = CountingGuard()
    compiler = GrammarCompiler(TOY, guard)
    for text in ("a", "b", "c", "a", "d", "a", "c"):
        compiler.matcher(Grammar("regex", text))
    assert guard.num_asked == 4, "b made room for d"
    compiler.matcher(Grammar("regex", "e" * 99))
    assert list(compiler._kept) == [Grammar("regex", "c"), Grammar("regex", "e" * 99)]
    compiler.matcher(Grammar("regex", "f" * 200))
    assert list(compiler._kept) == [Grammar("regex", "f" * 200)]


def test_a_refusal_is_kept_too() -> None:
    guard = CountingGuard()
    compiler = GrammarCompiler(TOY, guard)
    for _ in range(2):
        with pytest.raises(RequestError, match="unclosed"):
            compiler.matcher(Grammar("regex", "("))
    assert guard.num_asked == 1


def test_matchers_of_one_grammar_do_not_know_of_each_other() -> None:
    one, other = (COMPILER.matcher(Grammar("regex", "ab")) for _ in range(2))
    assert one.consume_tokens(TOY.encode("ab"))
    assert one.is_stopped()
    assert other.consume_tokens(TOY.encode("a"))
