"""The oracles themselves, against a third party where there is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.config import LlamaConfig, RopeScaling
from perf.peers import transformers_llama
from tests.conftest import tiny_eagle3, tiny_llama
from tests.oracles import accept, attention, eagle3, llama, noise, sampler

TOKENS = [5, 90, 17, 17, 3, 42, 8, 61, 0, 96]
LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"rope_scaling": LLAMA3, "rope_theta": 5e5}],
    ids=["untied", "tied", "llama3-rope"],
)
def test_llama_equals_transformers(overrides: dict[str, object]) -> None:
    config, weights = tiny_llama(1, **overrides)
    model = transformers_llama(config, weights)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS]), output_hidden_states=True)
    ours = llama.forward(config, weights, TOKENS)
    torch.testing.assert_close(ours.logits, theirs.logits[0], atol=2e-5, rtol=1e-5)
    for layer in range(config.num_layers):
        torch.testing.assert_close(ours.inputs[layer], theirs.hidden_states[layer][0], atol=2e-5, rtol=1e-5)


def test_tiny_models_have_spread() -> None:
    config, weights = tiny_llama(2)
    seen = llama.forward(config, weights, TOKENS)
    assert 0.7 < float(seen.logits.std()) < 4
    raw, head = tiny_eagle3(config, 2)
    rows = eagle3.true_rows(
        eagle3.head_config(raw),
        head,
        weights["model.embed_tokens.weight"],
        TOKENS,
        torch.cat(seen.inputs[:3], dim=-1),
    )
    assert rows.logits.shape == (len(TOKENS) - 1, 61)
    assert 0.7 < float(rows.logits.std()) < 4


def test_eagle3_rows_do_not_see_the_future_and_depend_on_the_feature_before() -> None:
    config, weights = tiny_llama(3)
    raw, head = tiny_eagle3(config, 3)
    features = torch.cat(llama.forward(config, weights, TOKENS).inputs[:3], dim=-1)
    shape, embedding = eagle3.head_config(raw), weights["model.embed_tokens.weight"]
    rows = eagle3.true_rows(shape, head, embedding, TOKENS, features)
    shorter = eagle3.true_rows(shape, head, embedding, TOKENS[:5], features)
    torch.testing.assert_close(shorter.logits, rows.logits[:4])
    nudged = features.clone()
    nudged[5] += 0.1  # feature 5 enters with token 6, whose row is entry 5
    after = eagle3.true_rows(shape, head, embedding, TOKENS, nudged)
    changed = (after.logits - rows.logits).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 4
    empty = eagle3.path_rows(shape, head, embedding, TOKENS, features, [])
    torch.testing.assert_close(empty.logits, rows.logits)
    longer = eagle3.path_rows(shape, head, embedding, TOKENS, features, [4, 5])
    assert longer.logits.shape[0] == len(TOKENS) + 1
    ids = eagle3.to_target(range(61), head["d2t"])
    assert head["t2d"].nonzero()[:, 0].tolist() == ids


def test_tree_attention_of_a_chain_is_causal() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    whole = llama.causal_attention(query, keys, values).view(7, 4, 8)
    tree = attention.tree_attention(query[3:], keys[:3], values[:3], keys[3:], values[3:], [-1, 0, 1, 2])
    torch.testing.assert_close(tree.float(), whole[3:])
    assert attention.ancestors_of([-1, 0, 0, 2, 2, 4], 5) == [0, 2, 4, 5]


def test_walk_by_hand() -> None:
    #        0(10) -> 1(11) -> 3(13);  0 -> 2(12) -> 4(13);  5 is padding
    tokens, parents = [10, 11, 12, 13, 13, 12], [-1, 0, 0, 1, 2, -1]
    assert accept.walk(tokens, parents, [12, 0, 13, 0, 7, 0]) == ([0, 2, 4], 7)
    assert accept.walk(tokens, parents, [13, 0, 13, 0, 7, 0]) == ([0], 13)
    assert accept.walk(tokens, parents, [11, 9, 13, 0, 7, 0]) == ([0, 1], 9)
    assert [len(accept.all_parents(n)) for n in range(1, 6)] == [1, 1, 2, 6, 24]


def test_sampler_by_hand() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])
    probs = np.exp(sampler.process(logits, 1.0, top_p=0.75))
    np.testing.assert_allclose(probs, [2 / 3, 1 / 3, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(np.exp(sampler.process(logits, 1.0, top_p=0.01)), [1, 0, 0, 0, 0])
    assert (np.exp(sampler.process(logits, 1.0, top_k=4)) > 0).sum() == 5  # the two last are tied
    assert (np.exp(sampler.process(logits, 1.0, min_p=0.2)) > 0).tolist() == [True, True, True, False, False]
    assert (np.exp(sampler.process(logits, 0.5, min_p=0.2)) > 0).tolist() == [True, True, False, False, False]
    assert sampler.choose(logits, [0, 0, 0, 9, 0], 1.0) == 3
    assert sampler.choose(logits, [0, 0, 0, 9, 0], 1.0, top_k=3) == 0
    assert sampler.choose(logits, [0, 0, 0, 9, 0], 0.0) == 0


def test_edits_by_hand() -> None:
    logits, prompt, answer = [4.0, -4.0, 2.0, 2.0, 0.5], [0, 1], [2, 3, 2]
    assert sampler.edit(logits, prompt, answer, repetition_penalty=2.0).tolist() == [2.0, -8.0, 1.0, 1.0, 0.5]
    penalised = sampler.edit(logits, prompt, answer, frequency_penalty=0.5, presence_penalty=0.25)
    assert penalised.tolist() == [4.0, -4.0, 0.75, 1.25, 0.5]
    words = [(4,), (2, 0), (3, 2, 1), (2, 2, 3), (1, 2, 3, 2, 3)]  # the last begins in the prompt
    banned = np.isinf(sampler.edit(logits, prompt, answer, bad_words=words))
    assert banned.tolist() == [True, True, False, False, True]
    assert np.isinf(sampler.edit(logits, prompt, answer, min_tokens=4, ends=[1, 3])).sum() == 2
    assert not np.isinf(sampler.edit(logits, prompt, answer, min_tokens=3, ends=[1, 3])).any()
    biased = sampler.edit(logits, prompt, answer, logit_bias=[(1, 5.0)], repetition_penalty=2.0)
    assert biased[1] == 0.5, "the bias is penalised too"


def test_noise_scores_tell_good_from_bad() -> None:
    generator = np.random.default_rng(0)
    good = generator.gumbel(size=(8, 50, 100))
    assert noise.ks_score(good) < 2.2
    assert max(noise.neighbour_scores(good)) < 5
    assert noise.ks_score(generator.normal(size=40_000)) > 10
    repeated = np.repeat(good, 2, axis=1)  # every position twice
    assert noise.neighbour_scores(repeated)[1] > 50
    logits = np.asarray([2.0, 1.0, 0.0, -1.0])
    probs = sampler.softmax(logits)
    picked = [sampler.choose(logits, generator.gumbel(size=4), 1.0) for _ in range(4000)]
    assert noise.frequency_score(picked, probs) < 5
    assert noise.frequency_score(picked, np.full(4, 0.25)) > 100


def test_llama3_scaling_leaves_fast_rotations_alone() -> None:
    plain = LlamaConfig(8, 8, 8, 1, 1, 1, 64, 512, rope_theta=5e5)
    scaled = llama.frequencies(LlamaConfig(8, 8, 8, 1, 1, 1, 64, 512, rope_theta=5e5, rope_scaling=LLAMA3))
    ratio = llama.frequencies(plain) / scaled
    assert math.isclose(float(ratio[0]), 1.0)
    assert math.isclose(float(ratio[-1]), 8.0)
