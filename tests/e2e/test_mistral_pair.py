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
from tests.server.test_launch_line import WITH_HEAD, words_of, write_long_pair

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
    wholes = [
        server.chat(**asked, speculation=speculation)
        for speculation in ("off", "auto", {"nodes": 4, "depth": 3, "top_k": 1})
    ]
    answers = [whole["choices"][0] for whole in wholes]
    for answer in answers:  # call ids are the response's own
        for call in answer["message"].get("tool_calls") or ():
            call.pop("id")
    assert answers[0] == answers[1] == answers[2]
    assert all(whole["usage"]["completion_tokens"] == 48 for whole in wholes)
    _, planned, chain = [whole["metrics"]["speculative_decoding"] for whole in wholes]
    assert sum(planned["reasons"].values()) > 0
    assert chain["num_draft_tokens"] > 0


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


def test_the_published_launch_line_serves(tmp_path: Path) -> None:
    """vLLM's recipe with the program's name changed, on one GPU fewer; what is behind it suits the test."""
    words = words_of(WITH_HEAD, write_long_pair(tmp_path, "native-fp8"))
    running = Server(*words, "--device", "cpu", "--kv-cache-memory", "128MiB")
    try:
        running.wait()
        answer = running.chat(prompt="Hi", temperature=0, ignore_eos=True, tools=[TOOL])
        with running.open("/v1/models") as response:
            [card] = json.load(response)["data"]
    finally:
        assert running.stop() == 0
    assert card["max_model_len"] == 262144
    assert answer["usage"]["completion_tokens"] == 48
    assert answer["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3
    log = "".join(running.lines)
    for said in (
        "--max-model-len 262144 (flag)",
        "--attention-backend FLASH_ATTN_MLA: no effect",
        "--gpu-memory-utilization 0.8: no effect on a CPU; the KV cache may take 0.12 GiB",
        "Model loading took 0.00 GiB and ",
        "Available KV cache memory: 0.12 GiB; KV cache size: ",
        "speculation: eagle (head), planned, at most 4 nodes, depth 3, top-k ",
        ", max position 65536",
    ):
        assert said in log, log
