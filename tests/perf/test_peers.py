"""The peer must run our weights, or a comparison with it means nothing."""

from __future__ import annotations

import pytest

from perf.peers import TransformersPeer
from tests.conftest import tiny_llama
from tests.oracles import llama


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_runs_the_same_model(tied: bool) -> None:
    pytest.importorskip("transformers")
    config, weights = tiny_llama(4, tie_word_embeddings=tied)
    prompt = [5, 9, 33, 2]
    run = TransformersPeer(config, weights, eos_token_ids=()).run(prompt, max_tokens=6)
    assert run.token_ids == llama.greedy(config, weights, prompt, 6)
    assert run.decode_tokens == 5
    assert run.total_s == pytest.approx(run.ttft_s + run.decode_s)
