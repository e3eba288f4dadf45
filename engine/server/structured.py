"""Structured output as clients ask for it: OpenAI's ``response_format`` and vLLM's ``structured_outputs``.

Both become one core.Grammar. What cannot be compiled is found out later (``engine.text.grammar``), so the
name of the field that said it travels along. Older names of the same wishes are refused with the new one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from engine.core import Grammar
from engine.errors import RequestError
from engine.text.grammar import MAX_CHOICES

# Fields of earlier vLLM and of SGLang, and what says the same today.
RENAMED: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


class JsonSchema(Struct):
    """``strict`` or not, an answer matches the whole schema, or the request is refused."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's; one of these. ``json`` is a schema or the text of one, ``grammar`` is in Lark's or GBNF's
    notation."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A grammar, and the field of the request that asks for it."""

    grammar: Grammar
    param: str


def wanted(response_format: ResponseFormat | None, outputs: StructuredOutputs | None) -> Wanted | None:
    """What an answer must match, None for anything. Raises RequestError for two wishes at a time."""
    found = [*_of_format(response_format), *_of_outputs(outputs)]
    if len(found) > 1:
        names = ", ".join(one.param for one in found)
        raise RequestError(f"an answer can match one grammar, found {names}", found[1].param)
    return found[0] if found else None


def _of_format(given: ResponseFormat | None) -> list[Wanted]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [Wanted(Grammar("json_object", ""), "response_format")]
    if given.json_schema is None:
        raise RequestError(
            "a response_format of type 'json_schema' needs json_schema", "response_format.json_schema"
        )
    text = json.dumps(given.json_schema.schema)
    return [Wanted(Grammar("json_schema", text), "response_format.json_schema.schema")]


def _of_outputs(given: StructuredOutputs | None) -> list[Wanted]:
    if given is None:
        return []
    grammars = {
        "json": None if given.json is None else Grammar("json_schema", _text(given.json)),
        "regex": None if given.regex is None else Grammar("regex", given.regex),
        "choice": None if given.choice is None else Grammar("choice", json.dumps(given.choice)),
        "grammar": None if given.grammar is None else Grammar("lark", given.grammar),
        "json_object": Grammar("json_object", "") if given.json_object else None,
    }
    return [Wanted(grammar, f"structured_outputs.{name}") for name, grammar in grammars.items() if grammar]


def _text(schema: dict[str, Any] | str) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def refuse_renamed(fields: dict[str, Any]) -> None:
    """Raises RequestError for a value under an older name. fields: of a request, by name."""
    for name, value in fields.items():
        if value is not None:
            raise RequestError(
                f"{name} is not supported; send structured_outputs with the field {RENAMED[name]!r}",
                name,
                "unsupported_parameter",
            )
