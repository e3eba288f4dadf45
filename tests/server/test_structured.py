"""Structured output over HTTP: a real engine with a toy model, asked as clients ask."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import jsonschema
import pytest

from engine.build import Served
from engine.text.compile_guard import CompileGuard
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from tests.engine.rig import echo_model, make_engine
from tests.server import fakes
from tests.server.fakes import Server, server
from tests.text.toy import toy_tokenizer

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "name"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "a": {"enum": [1, 12]}},
    "required": ["name", "a"],
    "additionalProperties": False,
}
BOMB = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b.*"} for n in range(30)]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def with_template() -> Tokenizer:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }},{% endfor %}"
    return tokenizer


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ``server`` serve the toy model with an EAGLE-3 head."""
    tokenizer = with_template()
    compiler = GrammarCompiler(tokenizer, CompileGuard(most_seconds=0.5))

    def served(*_: Any) -> Served:
        engine = make_engine(
            echo_model(3), "eagle3", eos=tokenizer.eos_token_ids, grammar_compiler=compiler, num_pages=400
        )
        return Served(engine, tokenizer, "toy", "/models/toy", "head", compiler)

    monkeypatch.setattr(fakes, "serve_fake", served)
    return None


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": 60, "seed": 1} | fields


@pytest.mark.usefixtures("toy")
def test_answers_match_what_was_asked_for() -> None:
    async def content(api: Server, **fields: Any) -> str:
        status, reply, _ = await api.post("/v1/chat/completions", body(**fields))
        assert status == 200, reply
        assert reply["choices"][0]["finish_reason"] == "stop"
        return cast(str, reply["choices"][0]["message"]["content"])

    async def scenario() -> None:
        async with server() as api:
            for fields in ({"response_format": FORMAT}, {"structured_outputs": {"json": SCHEMA}}):
                jsonschema.validate(json.loads(await content(api, **fields)), SCHEMA)
            assert await content(api, structured_outputs={"choice": ["true", "null"]}) in ("true", "null")
            found = await content(api, structured_outputs={"regex": "[0-9]{4}"})
            assert found.isdecimal()
            assert len(found) == 4
            assert await content(api, structured_outputs={"grammar": 'root ::= "ab" | "cd"'}) in ("ab", "cd")
            events = await api.stream(body(response_format=FORMAT))
            pieces = [event["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
            jsonschema.validate(json.loads("".join(pieces)), SCHEMA)
            speculating = await content(api, response_format=FORMAT)
            plain = await content(api, response_format=FORMAT, speculation="off")
            assert speculating == plain

    asyncio.run(scenario())


@pytest.mark.usefixtures("toy")
def test_the_openai_client_asks_for_a_schema() -> None:
    async def scenario() -> None:
        async with (
            server() as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            reply = await client.chat.completions.create(
                model="toy", messages=MESSAGES, response_format=FORMAT, seed=2, max_tokens=60
            )
            jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)
            wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
            with pytest.raises(openai.BadRequestError, match="nope") as caught:
                await client.chat.completions.create(model="toy", messages=MESSAGES, response_format=wrong)
            assert caught.value.param == "response_format.json_schema.schema"

    asyncio.run(scenario())


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", "foo"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "cannot be compiled"),
        ({"structured_outputs": {"json": BOMB}}, "structured_outputs.json", "processor time"),
    ],
)
def test_cve_2025_48942_a_bad_grammar_is_400_and_the_server_goes_on(
    fields: dict[str, Any], param: str, said: str
) -> None:
    async def scenario() -> None:
        async with server() as api:
            good = asyncio.create_task(api.post("/v1/chat/completions", body(max_tokens=3)))
            status, reply, _ = await api.post("/v1/chat/completions", body(**fields))
            assert status == 400
            assert reply["error"]["param"] == param
            assert said in reply["error"]["message"]
            assert (await good)[0] == 200
            assert (await api.post("/v1/chat/completions", body(structured_outputs={"regex": "ab"})))[
                0
            ] == 200

    asyncio.run(scenario())
