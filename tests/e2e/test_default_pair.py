"""The main job on real weights: the default pair behind the real server, driven over a real socket.

The server runs in float32, where speculative output must equal plain output token for token, at any
temperature. The parity of the target's logits with transformers, on the same weights, is here too: everything
that needs the 94 MB file is in this module.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from draft.none import NoDraft
from engine.build import DEFAULT_MODEL, build_engine, default_model_path
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.core import Batch, DraftTree, Verdict
from engine.roles import Draft
from engine.step import Engine
from engine.text.chat import render_chat
from tests.e2e.served import Server, events

PROMPT = "Explain in three sentences why the sky is blue."


@pytest.fixture(scope="module")
def spec_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "steps.jsonl"


@pytest.fixture(scope="module")
def server(spec_log: Path) -> Iterator[Server]:
    running = Server("--dtype", "float32", "--max-num-seqs", "4", "--spec-log", str(spec_log))
    try:
        running.wait()
        yield running
    finally:
        assert running.stop() == 0


def test_streams_one_event_per_step_and_then_says_what_speculation_saved(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 48,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculation": {"nodes": 4, "depth": 3, "top_k": 2},  # always drafts, whatever a step costs here
    }
    with server.post("/v1/chat/completions", body) as response:
        found = events(response)
    assert found[-1] == "[DONE]"
    usage = found[-2]
    assert usage["choices"] == []
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in found[:-2])
    assert text == server.chat(prompt=PROMPT, temperature=0)["choices"][0]["message"]["content"]
    speculation = usage["metrics"]["speculative_decoding"]
    num_tokens = usage["usage"]["completion_tokens"]
    # The prefill emits the first token, every decode step one more than it accepted. A last step that may
    # emit one token only drafts nothing.
    plain_steps = num_tokens - 1 - speculation["num_spec_steps"] - speculation["num_accepted_draft_tokens"]
    assert plain_steps in (0, 1)
    assert speculation["mean_acceptance_length"] > 1.2, "the shipped head accepts next to nothing"
    assert len(found) <= speculation["num_spec_steps"] + plain_steps + 4


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0.7, "seed": 11},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_speculative_text_equals_plain_text(server: Server, sampling: dict[str, Any]) -> None:
    for prompt in (PROMPT, "Write a Python function that reverses a string."):
        fast = server.chat(prompt=prompt, **sampling)
        plain = server.chat(prompt=prompt, speculation="off", **sampling)
        chain = server.chat(prompt=prompt, speculation={"nodes": 5, "depth": 4, "top_k": 1}, **sampling)
        assert fast["choices"] == plain["choices"] == chain["choices"]
        assert plain["metrics"]["speculative_decoding"] is None
        assert sum(fast["metrics"]["speculative_decoding"]["reasons"].values()) > 0
        assert chain["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


def test_concurrent_answers_equal_lone_answers(server: Server) -> None:
    prompts = [
        "Name three rivers.",
        "What is a prime number?",
        PROMPT,
        "Write a JSON object with a name and an age.",
        "Say hello in five languages.",
    ]
    alone = [server.chat(prompt=prompt, temperature=0)["choices"] for prompt in prompts]
    together: list[Any] = [None] * len(prompts)

    def ask(index: int) -> None:
        together[index] = server.chat(prompt=prompts[index], temperature=0)["choices"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_client_that_leaves_is_aborted(server: Server, spec_log: Path) -> None:
    body = {
        "messages": [{"role": "user", "content": "Count from one to one thousand."}],
        "max_tokens": 1500,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    response = server.post("/v1/chat/completions", body)
    response.readline()
    response.close()
    before = len(spec_log.read_text().splitlines())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the log grows by a line a step for as long as somebody is served
        time.sleep(1.0)
        now = len(spec_log.read_text().splitlines())
        if now == before:
            break
        before = now
    else:
        pytest.fail("the engine went on for a client that had left")
    assert server.chat(prompt=PROMPT, temperature=0)["choices"][0]["finish_reason"] in ("stop", "length")


def test_models_and_errors(server: Server) -> None:
    with urllib.request.urlopen(server.url + "/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]
    assert model["id"] == DEFAULT_MODEL
    assert model["max_model_len"] == 2048
    assert model["root"].endswith(".gguf")
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.chat(prompt="word " * 4000)
    error = json.load(caught.value)["error"]
    caught.value.close()
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    assert re.search(r"\b40\d\d tokens", error["message"])


class _Scorer(NoDraft):
    """Keeps nothing; the engine is only driven for its logits."""

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: torch.Tensor) -> None:
        pass


def test_logits_equal_transformers_on_the_default_model() -> None:
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    checkpoint = open_checkpoint(default_model_path())
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    weights = checkpoint.load(torch.float32, "cpu")
    theirs = LlamaForCausalLM(
        TheirConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    prompt = render_chat(tokenizer, [{"role": "user", "content": PROMPT}])
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0, -1]
    engine = scoring_engine(checkpoint, _Scorer())
    found = last_logits(engine, prompt)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert int(found.argmax()) == int(expected.argmax())


def scoring_engine(checkpoint: Any, draft: Draft) -> Engine:
    return build_engine(checkpoint, (), draft, EngineConfig(max_model_len=512, max_num_seqs=1))


def last_logits(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """[V] logits after a prompt, through the engine's own prefill."""
    from engine.core import Request, SamplingParams
    from engine.step import prompt_chain

    engine.add(Request(0, tuple(prompt), SamplingParams(temperature=0, max_tokens=1)))
    (batch,) = engine.scheduler.next_batches()
    assert batch.is_prefill
    with torch.inference_mode():
        return engine.target.score((batch,), (prompt_chain(batch),))[0].logits[0, 0]
