"""What a client lets the model call, and what it demands of the calls.

A request's ``tools``, ``tool_choice`` and ``parallel_tool_calls`` say three different things: what the model
gets to see, which functions it may call, and whether it must. ``ToolUse`` holds the answers, whatever the
format a model writes its calls in.

A grammar is needed where the model could disobey: a call that must come, a choice among fewer functions than
the model sees, no second call, arguments that are promised to fit (``strict``). With none of these the model
is free, and pays for no masks. Where there is a grammar it holds names and parameters of all functions,
because a call that cannot be executed helps nobody. Of a strict function every keyword of its schema counts;
of the others' what the compiler does not know is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import RequestError

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# One way to write a value, the one that models were trained on (json.dumps): nothing to choose between
# tokens, and no model can lose itself in white space.
JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_SCHEMA_BYTES = 1 << 16  # of one function's parameters


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called. ``strict``: its arguments must fit ``parameters`` (JSON schema) exactly.
    ``param``: the field that said which, for errors."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    param: str

    def arguments_schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments as a grammar holds it, with llguidance's settings inside."""
        guidance = {**JSON_STYLE, "lenient": not self.strict}
        return {"type": "object", **(self.parameters or _NO_PARAMETERS), "x-guidance": guidance}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools. ``tools`` are shown to the model, in OpenAI's shape."""

    tools: tuple[Mapping[str, Any], ...]
    functions: tuple[Function, ...]  # which it may call
    must_call: bool
    parallel: bool  # may call several at once

    @property
    def needs_grammar(self) -> bool:
        """Whether the model, left alone, could do what the client ruled out."""
        is_free = not self.must_call and self.parallel and len(self.functions) == len(self.tools)
        return not is_free or any(function.strict for function in self.functions)


def tool_use(
    tools: Sequence[Mapping[str, Any]],
    *,
    allowed: Sequence[str] | None = None,
    must_call: bool = False,
    parallel: bool = True,
) -> ToolUse:
    """Check what a client offers.

    tools: {"type": "function", "function": {"name", "parameters", "strict", ...}}, at least one; names and
    types are checked by whoever decoded them. allowed: names of those that may be called, None for all.

    Raises RequestError: ``tools[i].function.parameters`` for what cannot be the schema of an object (more is
    found out by compiling it); ``tool_choice`` for a name that no tool has.
    """
    functions = [_function(tool["function"], f"tools[{index}].function") for index, tool in enumerate(tools)]
    if allowed is not None:
        known = {function.name for function in functions}
        for name in allowed:
            if name not in known:
                raise RequestError(
                    f"tool_choice names the function {name!r:.80}, expected one of the tools: "
                    f"{', '.join(sorted(known)):.200}",
                    "tool_choice",
                )
        functions = [function for function in functions if function.name in allowed]
    return ToolUse(tuple(tools), tuple(functions), must_call, parallel)


def _function(spec: Mapping[str, Any], where: str) -> Function:
    parameters, param = spec.get("parameters") or {}, f"{where}.parameters"
    kind = parameters.get("type", "object")
    if kind != "object":
        raise RequestError(f"{param}.type is {kind!r:.40}, expected 'object'", f"{param}.type")
    try:
        size = len(msgspec.json.encode(parameters))
    except (RecursionError, UnicodeEncodeError) as error:
        raise RequestError(f"{param} cannot be written as JSON: {error}", param) from error
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(f"{param} has {size} bytes, at most {MAX_SCHEMA_BYTES} are allowed", param)
    return Function(spec["name"], parameters, bool(spec.get("strict")), param)
