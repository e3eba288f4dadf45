"""Choosing among a few candidates is choosing among all: exact where they settle it, the long way where
not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.sampler
from engine.core import SamplingParams, Scores
from engine.sampler import Sampler, candidates, perturb, process, sampling_tensors
from kernels import MAX_NOISE, gumbel_noise
from tests.engine.test_sampler import batch_of

VOCAB = 700  # several times the number of candidates
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
    picked = Sampler(VOCAB, "cpu")(
        Scores(logits, positions, torch.zeros(len(params), 3, 0)), batch_of(params)
    )
    assert torch.equal(picked, whole)


@settings(max_examples=60, deadline=None)
@given(PARAMS, st.integers(0, 1000), st.sampled_from([1.0, 4.0, 12.0]))
def test_candidates_are_what_the_filters_leave(param: SamplingParams, seed: int, spread: float) -> None:
    logits = logits_of(seed, spread, 1, tied=False)
    sampling = sampling_tensors([param], "cpu")
    few, whole = candidates(logits, sampling, 128), process(logits, sampling)
    rows = few.exact[0].nonzero()[:, 0]
    torch.testing.assert_close(few.scaled[0, rows], whole.gather(-1, few.columns)[0, rows])
    rest = whole.scatter(-1, few.columns, float("-inf")).amax(-1)
    assert bool((rest[0, rows] <= few.outside[0, rows]).all())


@pytest.mark.parametrize(
    ("spread", "param", "needed"),
    [
        (12.0, SamplingParams(), False),  # a peaked distribution: nothing far down can win
        (0.01, SamplingParams(), True),  # a flat one: anything can
        (0.01, SamplingParams(top_k=40), False),
        (4.0, SamplingParams(top_p=0.9), False),
        (0.01, SamplingParams(top_p=0.9), True),
    ],
)
def test_the_long_way_is_taken_only_where_it_must(
    monkeypatch: pytest.MonkeyPatch, spread: float, param: SamplingParams, needed: bool
) -> None:
    calls = []
    whole = engine.sampler.perturb

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.sampler, "perturb", counted)
    logits = logits_of(1, spread, 1, tied=False)
    Sampler(VOCAB, "cpu")(
        Scores(logits, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, 0)), batch_of([param])
    )
    assert bool(calls) == needed


def test_no_noise_exceeds_its_bound() -> None:
    noise = gumbel_noise(torch.arange(20), torch.arange(10).expand(20, -1), torch.arange(20_000))
    assert float(noise.max()) < MAX_NOISE
    largest = torch.tensor((2**23 - 0.5) * 2.0**-23).log().neg().log().neg()
    assert MAX_NOISE - 0.01 < float(largest) < MAX_NOISE
