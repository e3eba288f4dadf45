"""Which grammar holds an answer, which wishes do not go together, and what is refused before admission."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, cast

import msgspec
import pytest

from engine.config import EngineConfig
from engine.core import Grammar
from engine.errors import RequestError
from engine.server.held import rehearse
from engine.server.prepare import Preparer
from engine.server.protocol import decode_chat
from engine.text import mistral_grammar
from engine.text.conversation import AnyTokenizer
from engine.text.grammar import GrammarCompiler
from tests.server.fakes import ByteTokenizer
from tests.server.mistral import QUESTION, WEATHER
from tests.text.hermes import allows, compiler, hermes_tokenizer
from tests.text.tekken import spell, tekken_tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
MISTRAL_CALL = ("[TOOL_CALLS]", "weather", "[ARGS]", '{"city": "Rome"}')


@lru_cache(maxsize=2)
def preparer(tokenizer: Hashable) -> Preparer:
    return Preparer(cast(AnyTokenizer, tokenizer), EngineConfig(max_model_len=65536), compiler(tokenizer))


def grammar(tokenizer: AnyTokenizer, **fields: Any) -> Grammar | None:
    """What holds the answer to this request."""
    call = decode_chat(msgspec.json.encode({**QUESTION, **fields}))
    [request] = preparer(cast(Hashable, tokenizer)).chat(call)
    return request.sampling.grammar


def test_a_rehearsal_reads_mistrals_vocabulary_once_for_all() -> None:
    mistral_grammar._factory.cache_clear()
    compiler_ = GrammarCompiler(tekken_tokenizer())
    rehearse(tekken_tokenizer(), compiler_)
    assert "_vocabulary" in vars(compiler_)
    assert mistral_grammar._factory.cache_info().misses == 1
    assert grammar(tekken_tokenizer(), tools=[WEATHER], tool_choice="required") is not None
    assert mistral_grammar._factory.cache_info().misses == 1


def test_a_vocabulary_without_an_end_says_so_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a model is served all the same."""

    endless = ByteTokenizer()
    monkeypatch.setattr(endless, "eos_token_ids", ())
    rehearse(endless, GrammarCompiler(endless))
    with pytest.raises(RequestError, match="no token that ends an answer") as refused:
        grammar(endless, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"


def test_free_answers_are_held_by_nothing() -> None:
    for tokenizer in (hermes_tokenizer(), tekken_tokenizer()):
        for fields in (
            {},
            {"tools": [WEATHER]},
            {"tools": [WEATHER], "parallel_tool_calls": True, "response_format": {"type": "text"}},
            {"tools": [WEATHER], "tool_choice": "none"},
        ):
            assert grammar(tokenizer, **fields) is None


@pytest.mark.parametrize("response_format", [AS_SCHEMA, {"type": "json_object"}])
def test_json_and_calls_are_one_grammar(response_format: dict[str, Any]) -> None:
    thought = spell("[THINK]", "Hm.", "[/THINK]")
    for tokenizer, call, json, other in (
        (hermes_tokenizer(), hermes_tokenizer().encode(CALL), list(b'{"a": 1}'), list(b"[1]")),
        (tekken_tokenizer(), spell(*MISTRAL_CALL), thought + spell('{"a": 1}'), thought + spell("{1}")),
    ):
        for tools, calls in ((None, False), ([WEATHER], True)):
            found = grammar(tokenizer, tools=tools, response_format=response_format)
            assert found is not None
            if found.kind == "lark":  # else it is the schema alone
                assert allows(tokenizer, found.text, call) is calls
                assert allows(tokenizer, found.text, json)
                assert not allows(tokenizer, found.text, other)
            assert (found.kind == "lark") is (calls or tokenizer is tekken_tokenizer())


def test_a_forced_call_is_no_json_answer() -> None:
    found = grammar(hermes_tokenizer(), tools=[WEATHER], tool_choice="required", response_format=AS_SCHEMA)
    assert found is not None
    assert allows(hermes_tokenizer(), found.text, hermes_tokenizer().encode(CALL))
    assert not allows(hermes_tokenizer(), found.text, list(b'{"a": 1}'))


def test_other_grammars_leave_no_room_for_calls() -> None:
    outputs = {"structured_outputs": {"regex": "[ab]+"}}
    assert grammar(hermes_tokenizer(), **outputs) == Grammar("regex", "[ab]+")
    not_offered = {**outputs, "tools": [WEATHER], "tool_choice": "none"}
    assert grammar(hermes_tokenizer(), **not_offered) == Grammar("regex", "[ab]+")
    with pytest.raises(RequestError, match="leaves no room for calls") as caught:
        grammar(hermes_tokenizer(), **outputs, tools=[WEATHER])
    assert caught.value.param == "structured_outputs.regex"


ONE_STRICT = {"strict": True, "parameters": {"type": "object", "not": {}}}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"parameters": {"properties": 5}}, "properties must be an object"),
        ({"parameters": {"properties": {"a": {"type": "strng"}}}}, "strng"),
        ({"parameters": {"properties": {"a": {"type": "string", "pattern": "("}}}}, "unclosed group"),
        ({"parameters": {"properties": {"a": {"$ref": "#/nope"}}}}, "nope"),
        ({"parameters": {"properties": {"a": {"$ref": "http://example.org/a"}}}}, "does not fetch"),
        (ONE_STRICT, "Unimplemented keys"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_cve_2025_48944_tools_are_compiled_before_admission(
    function: dict[str, Any], message: str, choice: str
) -> None:
    tools = [WEATHER, {"type": "function", "function": {"name": "f", **function}}]
    for tokenizer in (hermes_tokenizer(), tekken_tokenizer()):
        with pytest.raises(RequestError, match=message) as caught:
            grammar(tokenizer, tools=tools, tool_choice=choice)
        assert caught.value.param == "tools[1].function.parameters"
        assert len(str(caught.value)) < 600, caught.value


def test_many_tools_are_within_the_limits() -> None:
    tools = [{"function": {**WEATHER["function"], "name": f"weather_{number}"}} for number in range(128)]
    for tokenizer in (hermes_tokenizer(), tekken_tokenizer()):
        assert grammar(tokenizer, tools=tools) is None
        assert grammar(tokenizer, tools=tools, tool_choice="required") is not None
