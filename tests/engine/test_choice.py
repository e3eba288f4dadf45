"""The sampler's choice on a CPU, and the draft's candidates, against processing the whole vocabulary."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import SamplingParams, Scores
from engine.sampler import Sampler, candidates, perturb, process, sampling_tensors
from tests.engine.test_sampler import batch_of

VOCAB = 700  # several times the number of candidates, and no multiple of a vector
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 127, 128, 300, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def logits_of(seed: int, spread: float, num_seqs: int, tied: bool) -> torch.Tensor:
    logits = torch.randn(num_seqs, 3, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.round() if tied else logits


@settings(max_examples=120, deadline=None)
@given(
    st.lists(PARAMS, min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([0.01, 1.0, 4.0, 12.0]),
    st.booleans(),
)
def test_the_choice_is_that_of_the_whole_vocabulary(
    params: list[SamplingParams], seed: int, spread: float, tied: bool
) -> None:
    logits = logits_of(seed, spread, len(params), tied)
    positions = torch.arange(3).expand(len(params), -1) * 100
    sampling = sampling_tensors(params, "cpu")
    whole = perturb(logits, positions + 1, torch.arange(VOCAB), sampling).argmax(-1)
    picked = Sampler().choose(Scores(logits, positions, torch.zeros(len(params), 3, 0)), batch_of(params))
    assert torch.equal(picked, whole)


@settings(max_examples=60, deadline=None)
@given(PARAMS, st.integers(0, 1000), st.sampled_from([1.0, 4.0, 12.0]))
def test_candidates_are_what_the_filters_leave(param: SamplingParams, seed: int, spread: float) -> None:
    logits = logits_of(seed, spread, 1, tied=False)
    sampling = sampling_tensors([param], "cpu")
    few, whole = candidates(logits, sampling, 128), process(logits, sampling)
    before = process(logits, sampling_tensors([dataclasses.replace(param, top_p=1.0)], "cpu"))
    num_left = torch.isfinite(before).sum(-1)  # by the filters before top_p
    exact = (num_left == VOCAB) | (num_left < 128) | (param.top_p == 1)
    torch.testing.assert_close(few.scaled[exact], whole.gather(-1, few.columns)[exact])
