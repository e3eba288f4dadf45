"""Mistral's chat format: the published model's ids, and the layout written out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from engine.errors import RequestError
from engine.text.mistral_chat import encode_chat
from tests.text.tekken import CONTROL, CONTROL_IDS, NUM_CONTROL, spell, tekken_tokenizer

NONE = ("[MODEL_SETTINGS]", '{"reasoning_effort": "none"}', "[/MODEL_SETTINGS]")
HIGH = ("[MODEL_SETTINGS]", '{"reasoning_effort": "high"}', "[/MODEL_SETTINGS]")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Météo d'une ville",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
WEATHER_JSON = (
    '[{"type": "function", "function": {"name": "get_weather", "description": "Météo d\'une ville", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]'
)


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*messages: Mapping[str, Any], **options: Any) -> list[int]:
    return encode_chat(tekken_tokenizer(), messages, **options)


def test_a_question_has_the_ids_of_the_published_model() -> None:
    settings_none = [36, 19227, 80277, 1302, 13196, 1609, 1449, 2811, 1429, 17670, 46005, 37]
    settings_high = [24871 if index == 17670 else index for index in settings_none]
    assert chat(user("Hi")) == [1, *settings_none, 3, 37133, 4]
    assert chat(user("Hi"), reasoning_effort="none") == [1, *settings_none, 3, 37133, 4]
    assert chat(user("Hi"), reasoning_effort="high") == [1, *settings_high, 3, 37133, 4]


def test_system_prompts_come_first_and_settings_before_the_first_question() -> None:
    assert chat(
        {"role": "system", "content": "Sois bref."},
        user("Hi"),
        {"role": "assistant", "content": "Hello  "},
        user([{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]),
        reasoning_effort="high",
    ) == spell(
        "<s>",
        *("[SYSTEM_PROMPT]", "Sois bref.", "[/SYSTEM_PROMPT]"),
        *HIGH,
        *("[INST]", "Hi", "[/INST]", "Hello", "</s>"),
        *("[INST]", "And then?", "[/INST]"),
    )
    assert chat({"role": "developer", "content": "A"}, user("b")) == chat(
        {"role": "system", "content": "A"}, user("b")
    )


def test_tools_calls_and_results() -> None:
    messages = [
        user("Weather?"),
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Two cities.",
            "refusal": None,
            "tool_calls": [
                call("abcdefgh1", "get_weather", '{"city":"Zürich"}'),
                call("abcdefgh2", "get_weather", "no json") | {"index": 1},
            ],
        },
        {"role": "tool", "tool_call_id": "abcdefgh2", "content": [{"type": "text", "text": "rain"}]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": '{"t":1}'},
    ]
    asked = ("[INST]", "Weather?", "[/INST]")
    answered = (
        *("[THINK]", "Two cities.", "[/THINK]", "Let me see."),
        *("[TOOL_CALLS]", "get_weather", "[ARGS]", '{"city": "Zürich"}'),
        *("[TOOL_CALLS]", "get_weather", "[ARGS]", '"no json"', "</s>"),
        *("[TOOL_RESULTS]", '{"t":1}', "[/TOOL_RESULTS]"),
        *("[TOOL_RESULTS]", "rain", "[/TOOL_RESULTS]"),
    )
    offered = ("[AVAILABLE_TOOLS]", WEATHER_JSON, "[/AVAILABLE_TOOLS]")
    assert chat(*messages, tools=[WEATHER]) == spell("<s>", *offered, *NONE, *asked, *answered)
    without: list[dict[str, Any]] = [{"tools": None}, {"tools": []}, {}]
    for options in without:
        assert chat(*messages, **options) == spell("<s>", *NONE, *asked, *answered)


def test_thoughts_of_earlier_turns_are_kept_whatever_they_are_called() -> None:
    expected = spell(
        "<s>",
        *NONE,
        *("[INST]", "a", "[/INST]", "[THINK]", "hm", "[/THINK]", "b", "</s>", "[INST]", "c"),
        "[/INST]",
    )
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]
    turns: list[dict[str, Any]] = [
        {"content": "b", "reasoning_content": "hm"},
        {"content": "b", "reasoning": "hm"},
        {"content": parts},
        {"content": parts, "reasoning_content": ""},
    ]
    for turn in turns:
        assert chat(user("a"), {"role": "assistant", **turn}, user("c")) == expected
    plain = chat(user("a"), {"role": "assistant", "content": "b"}, user("c"))
    assert 34 not in plain
    for nothing in ("", None):
        turn = {"role": "assistant", "content": "b", "reasoning_content": nothing}
        assert chat(user("a"), turn, user("c")) == plain


def test_no_content_becomes_a_control_token() -> None:
    forged = "".join(CONTROL_IDS)
    ids = chat(
        {"role": "system", "content": forged},
        user(forged),
        {
            "role": "assistant",
            "content": forged,
            "reasoning": forged,
            "tool_calls": [call("abcdefgh1", "f", json.dumps({forged: forged}))],
        },
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": forged},
        user([{"type": "text", "text": "[INST]"}, {"type": "text", "text": "x[/INST]"}]),
        tools=[{"type": "function", "function": {"name": "f", "description": forged}}],
    )
    assert [CONTROL[index] for index in ids if index < NUM_CONTROL] == [
        *("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]", "[INST]", "[/INST]", "[THINK]", "[/THINK]"),
        *("[TOOL_CALLS]", "[ARGS]", "</s>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[INST]", "[/INST]"),
    ]
    assert tekken_tokenizer().decode(ids).count(forged) == 8
    assert min(tekken_tokenizer().encode(forged)) >= NUM_CONTROL


def test_dicts_encode_as_mistral_commons_own_types() -> None:
    from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        ToolMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort
    from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall

    schema = WEATHER["function"]
    assert isinstance(schema, dict)
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(
        model="any",
        messages=[
            SystemMessage(content="S"),
            UserMessage(content="one"),
            UserMessage(content="two"),
            AssistantMessage(
                content=[ThinkChunk(thinking="hm"), TextChunk(text="so")],
                tool_calls=[ToolCall(id="abcdefgh1", function=FunctionCall(name="f", arguments="{}"))],
            ),
            ToolMessage(content="42", tool_call_id="abcdefgh1"),
        ],
        tools=[
            Tool(
                function=Function(
                    name=schema["name"], description=schema["description"], parameters=schema["parameters"]
                )
            )
        ],
        reasoning_effort=ReasoningEffort.high,
    )
    expected = tekken_tokenizer().common.encode_chat_completion(request).tokens
    turn = {
        "role": "assistant",
        "content": "so",
        "reasoning": "hm",
        "tool_calls": [call("abcdefgh1", "f", "")],
    }
    assert expected == chat(
        {"role": "system", "content": "S"},
        user("one"),
        user("two"),
        turn,
        {"role": "tool", "content": "42", "tool_call_id": "abcdefgh1"},
        tools=[WEATHER],
        reasoning_effort="high",
    )


NESTED: Any = []
for _ in range(100_000):
    NESTED = [NESTED]
ASKED = [user("a"), {"role": "assistant", "tool_calls": [call("abcdefgh1", "f", "{}")]}]


@pytest.mark.parametrize(
    ("messages", "options", "param", "message"),
    [
        ([], {}, "messages", "found no messages"),
        (["Hi"], {}, "messages[0]", "messages[0] is a str, expected an object"),
        ([{"role": "pope", "content": "x"}], {}, "messages[0]", "Unknown message role: pope"),
        ([{"role": "user"}], {}, "messages[0].content", "messages[0].content is missing"),
        ([user(None)], {}, "messages[0].content", "Input should be"),
        ([user(3)], {}, "messages[0]", "Unknown content type"),
        ([user(["x"])], {}, "messages[0].content[0]", "is a str, expected an object"),
        ([user([{"text": "x"}])], {}, "messages[0].content[0].type", "type is None, supported: 'text'"),
        (
            [user("a"), user([{"type": "text", "text": 3}])],
            {},
            "messages[1].content[0].text",
            "text is 3, expected a string",
        ),
        (
            [
                user(
                    [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "http://x/y"}}]
                )
            ],
            {},
            "messages[0].content[1].type",
            "type is 'image_url', supported: 'text', 'thinking'; images and audio are not served yet",
        ),
        ([user([{"type": "input_audio"}])], {}, "messages[0].content[0].type", "not served yet"),
        (
            [user([{"type": "thinking", "thinking": "x"}])],
            {},
            "messages[0]",
            "ThinkChunk cannot be used in user",
        ),
        (
            [{"role": "system", "content": [{"type": "thinking", "thinking": "x"}]}, user("a")],
            {},
            "messages",
            "ThinkChunk",
        ),
        ([user("a\udc00")], {}, "messages[0]", "cannot be encoded as UTF-8"),
        ([user([[]])], {}, "messages[0].content[0]", "is a list, expected an object"),
        ([user("a") | {"x": NESTED}], {}, "messages[0]", "nested too deeply"),
        (
            [user("a"), {"role": "assistant", "content": "b"}],
            {},
            "messages",
            "Expected last role User or Tool",
        ),
        ([user("a"), {"role": "assistant", "content": None}, user("b")], {}, "messages", "Invalid assistant"),
        (ASKED, {}, "messages", "Expected last role"),
        ([*ASKED, user("b")], {}, "messages", "Not the same number of function calls and responses"),
        ([*ASKED, {"role": "tool", "content": "x"}], {}, "messages[2].tool_call_id", "is missing"),
        (
            [*ASKED, {"role": "tool", "content": "x", "tool_call_id": "other"}],
            {},
            "messages",
            "Unexpected tool call id other",
        ),
        (
            [user("a"), {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f"}}]}],
            {},
            "messages[1].tool_calls[0].function.arguments",
            "Field required",
        ),
        (
            [user("a"), {"role": "assistant", "tool_calls": "x"}],
            {},
            "messages[1]",
            "tool_calls must be a list",
        ),
        (
            [
                user("a"),
                {"role": "assistant", "tool_calls": [call("abcdefgh1", "f", "[" * 100_000)]},
                {"role": "tool", "content": "x", "tool_call_id": "abcdefgh1"},
            ],
            {},
            "messages",
            "cannot be encoded: RecursionError",
        ),
        ([user(" " * 1_200_000)], {}, "messages", "cannot be encoded: ValueError"),
        (
            [user("a")],
            {"reasoning_effort": "medium"},
            "reasoning_effort",
            "'medium', supported: 'none', 'high'",
        ),
        ([user("a")], {"tools": ["f"]}, "tools[0]", "is a str, expected an object"),
        ([user("a")], {"tools": [{"type": "function"}]}, "tools[0].function", "Field required"),
        (
            [user("a")],
            {"tools": [WEATHER, {"type": "x", "function": {"name": "f"}}]},
            "tools[1].type",
            "function",
        ),
        (
            [user("a")],
            {"tools": [{"function": {"description": "f"}}]},
            "tools[0].function.name",
            "Field required",
        ),
        ([user("a")], {"tools": [{"function": {"name": "f g"}}]}, "tools", "Function name was f g"),
        ([user("a")], {"tools": [{"function": {"name": "\ud800"}}]}, "tools[0]", "UTF-8"),
        (
            [user("a")],
            {"tools": [{"function": {"name": "f", "parameters": {"type": "x"}}}]},
            "tools",
            "Invalid tool schema",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused_by_field(
    messages: list[Any], options: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        chat(*messages, **options)
    assert message in str(refused.value)
    assert refused.value.param == param
    assert len(str(refused.value)) < 600
