"""What the tests of tools share: which calls a client allows, and what it makes of answers that have some."""

from __future__ import annotations

from typing import Any


def deltas(events: list[Any]) -> list[Any]:
    """The deltas of a stream's events, without the end mark."""
    assert events[-1] == "data: [DONE]"
    return [event["choices"][0]["delta"] for event in events[:-1]]


def reasons(events: list[Any]) -> list[Any]:
    return [event["choices"][0]["finish_reason"] for event in events[:-1]]


def assembled(pieces: list[Any]) -> dict[str, Any]:
    """What a client makes of deltas: every field added up on its own, calls by their index."""
    calls: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {"content": "", "reasoning_content": ""}
    for piece in pieces:
        for name in whole:
            whole[name] += piece.get(name, "")
        for part in piece.get("tool_calls", ()):
            function = part["function"]
            if part["index"] in calls:
                assert part.keys() == {"index", "function"}
                assert function.keys() == {"arguments"}
                calls[part["index"]]["function"]["arguments"] += function["arguments"]
            else:
                assert part.keys() == {"index", "id", "type", "function"}
                assert part["index"] == len(calls)
                calls[part["index"]] = part
    return whole | {"tool_calls": list(calls.values())}


def named(name: str) -> dict[str, Any]:
    """A tool_choice: this function and no other."""
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """A tool_choice: some of the functions."""
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]},
    }


def with_results(messages: list[Any], answer: dict[str, Any]) -> list[Any]:
    """A conversation that goes on: the answer's calls, and what each of them gave."""
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in answer["tool_calls"]
    ]
    return [*messages, answer, *results]
