"""Answers of a real engine as the openai client gets them: n, log-probabilities, biases, bad words."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, cast

import pytest
import torch

from engine.core import TokenLogprob
from engine.server.logprobs import ScoredToken, TextSpeller, token_name
from tests.engine.rig import Model, assert_idle, make_engine, random_model
from tests.oracles.llama import forward
from tests.server.fakes import EOS, ByteTokenizer, FakeEngine, server

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Hi"}]
PROMPT = list(b"u:Hi;")  # as the template writes it


@cache
def model() -> Model:
    return random_model(5, vocab_size=257)


@asynccontextmanager
async def serving(draft: str = "eagle3", **options: Any) -> AsyncIterator[Any]:
    """A client of a server of a tiny model."""
    engine = make_engine(model(), draft, eos=(EOS,), page_size=4, **options)
    engine.hold = threading.Event()  # type: ignore[attr-defined]
    async with (
        server(cast(FakeEngine, engine)) as api,
        openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client
    assert_idle(engine)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def raw_logprobs(prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[len(answer), V]"""
    logits = forward(model().config, model().weights, [*prompt, *answer]).logits
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_logprobs_of_chat_whole_and_streamed() -> None:
    async def scenario() -> None:
        async with serving() as client:
            asked: dict[str, Any] = {
                "model": "fake",
                "messages": MESSAGES,
                "temperature": 0.7,
                "seed": 3,
                "max_tokens": 12,
                "logprobs": True,
                "top_logprobs": 3,
            }
            reply = await client.chat.completions.create(**asked)
            found = reply.choices[0].logprobs.content
            assert reply.choices[0].logprobs.refusal is None
            tokens = [EOS if entry.bytes is None else entry.bytes[0] for entry in found]
            assert len(tokens) == reply.usage.completion_tokens
            assert bytes(token for token in tokens if token < 256).decode(errors="replace") == (
                reply.choices[0].message.content
            )
            for entry, token, expected in zip(found, tokens, raw_logprobs(PROMPT, tokens), strict=True):
                assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-4)
                best = expected.topk(3)
                assert [each.logprob for each in entry.top_logprobs] == pytest.approx(
                    best.values.tolist(), abs=1e-4
                )
                names = [token_name(cast(Any, ByteTokenizer()), int(each)) for each in best.indices]
                assert [each.token for each in entry.top_logprobs] == names
            stream = await client.chat.completions.create(**asked, stream=True)
            parts = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices]
            assert [entry for part in parts if part is not None for entry in part.content] == found
            plain = await client.chat.completions.create(**(asked | {"logprobs": False, "top_logprobs": 0}))
            assert plain.choices[0].logprobs is None
            assert plain.choices[0].message.content == reply.choices[0].message.content

    run(scenario)


def test_logprobs_of_completions() -> None:
    async def scenario() -> None:
        async with serving() as client:
            asked: dict[str, Any] = {"model": "fake", "prompt": "Hi", "temperature": 0, "max_tokens": 9}
            reply = await client.completions.create(**asked, logprobs=2)
            found = reply.choices[0].logprobs
            assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 9
            for name, logprob, top in zip(
                found.tokens, found.token_logprobs, found.top_logprobs, strict=True
            ):
                assert top[name] == logprob == max(top.values()), "greedy"
                assert len(top) == 2
            stream = await client.completions.create(**asked, logprobs=2, stream=True)
            parts = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices]
            for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                joined = [each for part in parts if part is not None for each in getattr(part, field)]
                assert joined == getattr(found, field)

    run(scenario)


def test_offsets_count_characters_and_names_are_unique() -> None:
    """A character of three tokens begins where its first token does."""
    nothing = TokenLogprob(float("-inf"), ())
    spell = TextSpeller(cast(Any, ByteTokenizer()))
    tokens = [ScoredToken(byte, nothing) for byte in "a\u20acb".encode()]
    first, second = spell(tokens[:3]), spell(tokens[3:])
    assert first.text_offset + second.text_offset == [0, 1, 1, 1, 2]
    assert first.tokens + second.tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert first.top_logprobs[0] == {"a": -9999.0}, "JSON has no infinity"


def test_several_answers_to_one_prompt() -> None:
    """Each is what its seed gives alone; the first is the answer without n; the prompt counts once."""

    async def scenario() -> None:
        async with serving() as client:
            asked: dict[str, Any] = {
                "model": "fake",
                "messages": MESSAGES,
                "temperature": 1.0,
                "seed": 11,
                "max_tokens": 10,
            }
            reply = await client.chat.completions.create(**asked, n=4)
            texts = [choice.message.content for choice in reply.choices]
            assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
            assert len(set(texts)) == 4
            alone = await client.chat.completions.create(**asked)
            assert texts[0] == alone.choices[0].message.content
            assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
            assert reply.usage.completion_tokens > 2 * alone.usage.completion_tokens
            again: dict[int, str] = {}
            stream = await client.chat.completions.create(**asked, n=4, stream=True)
            async for chunk in stream:
                for choice in chunk.choices:
                    text = choice.delta.content or ""
                    again[choice.index] = again.get(choice.index, "") + text
            assert [again[index] for index in range(4)] == texts
            two = await client.completions.create(
                model="fake", prompt=["ab", "cd"], n=2, seed=1, max_tokens=4
            )
            assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
            assert two.usage.prompt_tokens == 4
            with pytest.raises(openai.BadRequestError, match="greedy") as caught:
                await client.chat.completions.create(**(asked | {"temperature": 0}), n=2)
            assert caught.value.param == "n"
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**asked, n=9)

    run(scenario)


def test_biases_bad_words_and_stop_tokens_reach_the_engine() -> None:
    async def scenario() -> None:
        async with serving() as client:

            async def text(**fields: Any) -> str:
                reply = await client.completions.create(
                    model="fake", prompt="Hi", temperature=0, max_tokens=6, **fields
                )
                return cast(str, reply.choices[0].text)

            assert await text(logit_bias={"120": 100}) == "xxxxxx"
            more: dict[str, Any] = {"logit_bias": {"120": 60, "121": 30}}
            assert await text(**more, extra_body={"bad_words": ["xx"]}) == "xyxyxy"
            assert await text(**more, extra_body={"stop_token_ids": [120]}) == ""
            ended = {"stop_token_ids": [120], "min_tokens": 2, "include_stop_str_in_output": True}
            assert await text(**more, extra_body=ended) == "yyx"
            assert await text(**more, stop="xxx", extra_body={"include_stop_str_in_output": True}) == "xxx"
            assert (await text(**more, frequency_penalty=2.0, presence_penalty=2.0)) == "xxxxxx"
            for bias, param in (({"257": 1}, "logit_bias.257"), ({"x": 1}, "logit_bias")):
                with pytest.raises(openai.BadRequestError) as caught:
                    await text(logit_bias=bias)
                assert caught.value.param == param

    run(scenario)
