"""One way from messages to token ids for both kinds of tokenizer, and what templates have no place for."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import RequestError
from engine.text.chat import render_chat
from engine.text.conversation import AnyTokenizer, conversation_ids, conversation_size
from engine.text.mistral_chat import encode_chat
from engine.text.tokenizer import Tokenizer, byte_alphabet
from tests.text.tekken import tekken_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "f"}}]
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = [{"role": "user", "content": "Hé"}]
CALLED: list[dict[str, Any]] = [
    *ASKED,
    {"role": "assistant", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]},
]


def templated() -> Tokenizer:
    """A byte-level vocabulary without merges."""
    alphabet = {char: index for index, char in enumerate(byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, chat_template=TEMPLATE)


def test_templates_get_roles_and_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": []},
    ]
    ours = templated()
    ids = conversation_ids(ours, messages)
    assert ours.decode(ids) == "system:be brief;user:a\nb;assistant:c;"
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
    ]
    assert ids == render_chat(ours, plain)
    assert conversation_size(ours, messages) == len("be briefa\nbc")


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        (ASKED, {"tools": TOOLS}, "tools"),
        (ASKED, {"reasoning_effort": "high"}, "reasoning_effort"),
        (CALLED, {}, "messages[1].tool_calls"),
        (CALLED[2:], {}, "messages[0].role"),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}],
            {},
            "messages[0].content[0].type",
        ),
        ([{"role": "assistant", "reasoning_content": "hm"}], {}, "messages[0].content"),
    ],
)
def test_templates_refuse_by_field(
    messages: list[dict[str, Any]], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError, match="this model") as caught:
        conversation_ids(templated(), messages, **options)
    assert caught.value.param == param
    if "tools" in options:
        with pytest.raises(RequestError, match="this model's chat template"):
            conversation_size(templated(), messages, TOOLS)


def test_mistrals_format_takes_all_of_it() -> None:
    ours: AnyTokenizer = tekken_tokenizer()
    for options in ({}, {"tools": TOOLS}):
        found = conversation_ids(ours, CALLED, reasoning_effort="high", **options)
        assert found == encode_chat(tekken_tokenizer(), CALLED, reasoning_effort="high", **options)
    with pytest.raises(RequestError, match="supported: 'none', 'high'"):
        conversation_ids(ours, ASKED, reasoning_effort="low")


def test_size_counts_every_text_and_nothing_twice() -> None:
    thinking = {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}], "reasoning": "hm"}
    size = len("Hé".encode()) + len("hm") + len("f{}") + len("rain")
    assert conversation_size(tekken_tokenizer(), CALLED) == size
    in_json = b'[{"type":"function","function":{"name":"f","description":"f"}}]'
    assert conversation_size(tekken_tokenizer(), CALLED, TOOLS) == size + len(in_json)
    assert conversation_size(tekken_tokenizer(), [thinking]) == 4
    assert conversation_size(tekken_tokenizer(), [{"role": "user", "content": "abc"}]) == 3
