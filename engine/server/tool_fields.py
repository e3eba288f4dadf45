"""The fields of a chat request that are about tools, in OpenAI's shapes.

    tool_choice    "none" | "auto" | "required"
                   {"type": "function", "function": {"name": "f"}}
                   {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function",
                    "function": {"name": "f"}}, ..]}}

Names are checked while they are decoded; ``engine.text.tools`` checks the schemas of the parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from engine.errors import RequestError
from engine.text.tools import ToolUse, tool_use

MAX_TOOLS = 128  # offered by a request, or called in one turn

FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class FunctionSpec(Struct, omit_defaults=True):
    """A function that the model may call. No ``parameters`` means that it takes none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Struct, kw_only=True):
    """An entry of ``tools``; its fields in the order in which models were trained to see them."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(Struct):
    """A function by its name."""

    name: str


class NamedTool(Struct, tag_field="type", tag="function"):
    """The one function that must be called."""

    function: NamedFunction


class AllowedTools(Struct):
    """The functions that may be called ("auto") or of which one must be ("required")."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Struct, tag_field="type", tag="allowed_tools"):
    """Some of the tools: the model sees all of them."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


def use_of(tools: list[ToolSpec] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """What a request says about tools, None if the model gets to see none.

    Raises RequestError: ``tool_choice`` if it demands or names what is not there, ``tools[i]...`` for a
    schema that cannot be held.
    """
    if choice == "none" or not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice asks for a call, but there are no tools", "tool_choice")
        return None
    allowed: list[str] | None = None
    must_call = choice == "required"
    match choice:
        case NamedTool(function):
            allowed, must_call = [function.name], True
        case AllowedToolsChoice(some):
            allowed, must_call = [tool.function.name for tool in some.tools], some.mode == "required"
    shown = msgspec.to_builtins(tools)
    return tool_use(shown, allowed=allowed, must_call=must_call, parallel=parallel is not False)
