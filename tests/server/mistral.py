"""A served model with Mistral's tokenizer, whose answers are scripted as text and control tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from engine.config import EngineConfig
from engine.core import Delta
from tests.server.fakes import FakeEngine
from tests.text.tekken import spell

EOS = 2
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
THOUGHTFUL = (("[THINK]", "Let me"), (" see.", "[/THINK]", "Hel"), ("lo",), (" there",))
TWO_CALLS = (
    ("[THINK]", "Two.", "[/THINK]"),
    ("[TOOL_CALLS]", "wea"),
    ("ther", "[ARGS]"),
    ('{"city":',),
    (' "Rome"}', "[TOOL_CALLS]", "weather", "[ARGS]", '{"city": '),
    ('"Oslo"}',),
)


def script(*steps: tuple[str, ...], finish: str = "stop") -> list[Delta]:
    """One delta per step, the first from prefill. An answer that ends by 'stop' ends with the EOS token."""
    deltas = [
        Delta(0, tuple(spell(*step)), None, num_draft_tokens=3 * (number > 0), is_decode=number > 0)
        for number, step in enumerate(steps)
    ]
    ids = (*deltas[-1].token_ids, EOS) if finish == "stop" else deltas[-1].token_ids
    return [*deltas[:-1], replace(deltas[-1], token_ids=ids, finish_reason=cast(Any, finish))]


def engine(*steps: tuple[str, ...], finish: str = "stop", step_time: float = 0.0) -> FakeEngine:
    """An engine that gives this answer to everybody. With time between the steps a stream keeps up."""
    config = EngineConfig(max_model_len=512, max_num_seqs=2)
    return FakeEngine(script(*steps, finish=finish), config=config, step_time=step_time)
