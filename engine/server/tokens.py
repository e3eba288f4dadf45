"""Text to tokens and back, for clients: /tokenize and /detokenize with vLLM's fields."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from engine.errors import RequestError
from engine.server import protocol
from engine.server.prepare import Preparer
from engine.server.tool_fields import MAX_TOOLS, ToolSpec

MAX_TOKEN_IDS = 1 << 20  # of one call of /detokenize


class TokenizeRequest(Struct, kw_only=True):
    """Body of POST /tokenize: a text, or a conversation as chat completions take it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[protocol.Message], Meta(min_length=1)] | None = None
    tools: Annotated[list[ToolSpec], Meta(max_length=MAX_TOOLS)] | None = None
    return_token_strs: bool = False


class TokenizeReply(Struct):
    """Tokens of a text, and with ``return_token_strs`` what each is as text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | UnsetType = UNSET


class DetokenizeRequest(Struct, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], Meta(max_length=MAX_TOKEN_IDS)]


class DetokenizeReply(Struct):
    """The text of some tokens, U+FFFD for what is no UTF-8."""

    prompt: str


def tokenize(preparer: Preparer, call: TokenizeRequest) -> TokenizeReply:
    """The answer of /tokenize. Raises RequestError."""
    if (call.prompt is None) == (call.messages is None):
        found = "neither" if call.prompt is None else "both"
        raise RequestError(f"found {found} of prompt and messages, expected one", "prompt")
    if call.messages is not None:
        chat = protocol.checked_chat(protocol.ChatRequest(messages=call.messages, tools=call.tools))
        tokens = list(preparer.chat(chat)[0].prompt)
    else:
        tokens = preparer.text_ids(call.prompt or "", add_bos=call.add_special_tokens)
    tokenizer = preparer.tokenizer
    texts = [tokenizer.token_text(token) for token in tokens] if call.return_token_strs else UNSET
    return TokenizeReply(len(tokens), preparer.config.max_model_len, tokens, texts)


def detokenize(preparer: Preparer, call: DetokenizeRequest) -> DetokenizeReply:
    """The answer of /detokenize. Raises RequestError."""
    preparer.check_ids(call.tokens, "tokens")
    return DetokenizeReply(preparer.tokenizer.decode(call.tokens))
