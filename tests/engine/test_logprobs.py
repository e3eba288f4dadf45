"""Reported log-probabilities are those of the raw logits."""

from __future__ import annotations

import pytest

from engine.core import Request as EngineRequest
from engine.core import SamplingParams
from tests.engine.edited import MODEL, PROMPTS
from tests.engine.rig import make_engine
from tests.oracles.llama import forward


@pytest.mark.parametrize("draft", ["none", "eagle3"])
def test_logprobs_are_those_of_the_raw_logits(draft: str) -> None:
    """Of every token, accepted or not, edited or not; and none for who does not ask."""
    params = [
        SamplingParams(temperature=0.9, seed=3, max_tokens=15, logprobs=0),
        SamplingParams(temperature=0.9, seed=4, max_tokens=15),
        SamplingParams(temperature=0, max_tokens=15, logprobs=5, frequency_penalty=2.0, min_p=0.2),
    ]
    engine = make_engine(MODEL, draft, max_num_batched_tokens=16)
    for request_id, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.add(EngineRequest(request_id, tuple(prompt), param))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    for row, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        own = [delta for delta in deltas if delta.request_id == row]
        tokens = [token for delta in own for token in delta.token_ids]
        found = [logprob for delta in own for logprob in delta.logprobs]
        if param.logprobs is None:
            assert found == []
            continue
        assert all(len(delta.logprobs) == len(delta.token_ids) for delta in own)
        logits = forward(MODEL.config, MODEL.weights, [*prompt, *tokens]).logits[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for token, of_token, row_of_token in zip(tokens, found, expected, strict=True):
            assert of_token.logprob == pytest.approx(float(row_of_token[token]), abs=1e-5)
            best = row_of_token.topk(param.logprobs)
            assert [token for token, _ in of_token.top] == best.indices.tolist()
            assert [each for _, each in of_token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert (sum(delta.num_accepted for delta in deltas) > 3) == (draft != "none")
