"""A tiny pair of Mistral Small 4 and its Eagle head, from files in Mistral's format to an answer over HTTP.

The weights are random, so answers are noise; what is looked at is that the whole path from params.json to the
stream works, and that speculation changes nothing in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served import Server, events
from tests.engine.test_build_mistral import write_pair

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    target, head = write_pair(tmp_path_factory.mktemp("pair"), "native-fp8")
    limits = ("--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory", "16MiB")
    running = Server(target, "--spec-model", head, "--dtype", "float32", *limits)
    try:
        running.wait()
        yield running
    finally:
        assert running.stop() == 0


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}])
def test_speculative_answers_equal_plain_answers(server: Server, sampling: dict[str, Any]) -> None:
    asked = {"prompt": "Hi", "reasoning_effort": "high", "tools": [TOOL], "ignore_eos": True, **sampling}
    answers = [
        server.chat(**asked, speculation=speculation)["choices"][0]
        for speculation in ("off", "auto", {"nodes": 4, "depth": 3, "top_k": 1})
    ]
    for answer in answers:  # call ids are the response's own
        for call in answer["message"].get("tool_calls") or ():
            call.pop("id")
    assert answers[0] == answers[1] == answers[2]
    fast = server.chat(**asked)
    assert fast["usage"]["completion_tokens"] == 48
    assert fast["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


def test_a_stream_says_what_the_answer_says(server: Server) -> None:
    body = {"prompt": [1, 36, 37, 3, 1200, 4], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with server.post("/v1/completions", body) as response:
        whole = json.load(response)["choices"][0]["text"]
    with server.post("/v1/completions", {**body, "stream": True}) as response:
        found = events(response)
    assert found[-1] == "[DONE]"
    pieces = [choice["text"] for event in found[:-1] for choice in event["choices"]]
    assert "".join(pieces) == whole


def test_the_model_says_what_it_is(server: Server) -> None:
    with server.open("/v1/models") as response:
        [card] = json.load(response)["data"]
    assert (card["id"], card["max_model_len"]) == ("target", 256)
    assert Path(card["root"]).name == "target"
    assert any("eagle (head)" in line for line in server.lines), server.lines
