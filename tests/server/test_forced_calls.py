"""Calls of a real engine over HTTP: a random model, held by a grammar alone, calls what it must."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import jsonschema
import pytest

from engine.pages import PagePool
from engine.step import Engine
from tests.engine.rig import make_engine, random_model
from tests.server.calls import allowed, assembled, deltas, named, reasons
from tests.server.fakes import FakeEngine, Server, server
from tests.text.hermes import compiler, hermes_tokenizer

CHAT = "/v1/chat/completions"
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 99}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "set_unit": {
        "type": "object",
        "properties": {"unit": {"type": "string", "pattern": "^[CF]{1,4}$"}, "round": {"type": "boolean"}},
        "required": ["unit", "round"],
        "additionalProperties": False,
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "tools": TOOLS,
    "parallel_tool_calls": False,
    "max_tokens": 600,
}


def engine(draft: str) -> FakeEngine:
    """A tiny random model with the vocabulary of the tests' template, which draws its answers from noise."""
    tokenizer = hermes_tokenizer()
    model = random_model(vocab_size=tokenizer.vocab_size, draft_vocab_size=150, max_position_embeddings=2048)
    made = make_engine(model, draft, num_pages=500, max_model_len=1500, max_num_batched_tokens=512)
    pages = PagePool(500, 4)
    eos = tokenizer.eos_token_ids
    found = Engine(made.config, made.target, made.draft, pages, eos, grammar_compiler=compiler(tokenizer))
    return cast(FakeEngine, found)


async def calls(api: Server, **fields: Any) -> list[tuple[str, str]]:
    """Names and arguments of the calls of an answer, which is complete."""
    status, reply, _ = await api.post(CHAT, {**ASKED, **fields})
    assert status == 200, reply
    [choice] = reply["choices"]
    assert choice["finish_reason"] == "tool_calls", reply
    assert choice["message"]["content"] is None
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]


@pytest.mark.parametrize("draft", ["eagle3", "ngram"])
def test_forced_calls_obey_their_schemas_and_speculation_changes_nothing(draft: str) -> None:
    async def scenario() -> None:
        async with server(engine(draft), tokenizer=hermes_tokenizer()) as api:
            for choice, names in (
                ("required", {"weather", "set_unit"}),
                (named("weather"), {"weather"}),
                (allowed("required", "set_unit"), {"set_unit"}),
            ):
                for seed in range(3):
                    fields = {"tool_choice": choice, "temperature": min(seed, 1), "seed": seed}
                    found = await calls(api, **fields)
                    [(name, arguments)] = found
                    assert name in names
                    jsonschema.validate(json.loads(arguments), SCHEMAS[name])
                    assert await calls(api, **fields, speculation="off") == found

    asyncio.run(scenario())


def test_parallel_calls_stream_what_they_are_whole() -> None:
    async def scenario() -> None:
        async with server(engine("eagle3"), tokenizer=hermes_tokenizer()) as api:
            most = 0
            for seed in range(4):
                fields = {"tool_choice": "required", "parallel_tool_calls": True, "seed": seed}
                fields["logit_bias"] = {ord("\n"): 1}  # a line break begins the next call
                whole = await calls(api, **fields)
                for name, arguments in whole:
                    jsonschema.validate(json.loads(arguments), SCHEMAS[name])
                events = await api.stream({**ASKED, **fields})
                streamed = [call["function"] for call in assembled(deltas(events))["tool_calls"]]
                assert [(call["name"], call["arguments"]) for call in streamed] == whole
                assert reasons(events)[-1] == "tool_calls"
                most = max(most, len(whole))
            assert most > 1

    asyncio.run(scenario())


def test_a_strict_function_holds_what_the_model_may_leave() -> None:
    async def scenario() -> None:
        strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
        async with server(engine("eagle3"), tokenizer=hermes_tokenizer()) as api:
            fields = {**ASKED, "tools": strict, "max_tokens": 40, "temperature": 1, "seed": 1}
            whole = (await api.post(CHAT, fields))[1]
            plain = (await api.post(CHAT, {**fields, "speculation": "off"}))[1]
            assert whole["choices"] == plain["choices"]  # free text: a random model does not find the tag
            assert whole["choices"][0]["message"]["content"]

    asyncio.run(scenario())
