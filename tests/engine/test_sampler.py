"""The sampler against the numpy version, row by row, and against the probabilities it claims to draw from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core import Batch, Packing, SamplingParams, Scores, Sequence
from engine.core import Request as EngineRequest
from engine.sampler import Sampler, perturb, process, sampling_tensors
from kernels import gumbel_noise
from tests.oracles import sampler
from tests.oracles.noise import frequency_score

VOCAB = 30


def oracle_kept(logits: Tensor, params: SamplingParams) -> sampler.Row:
    return sampler.process(
        logits.double().numpy(), params.temperature, params.top_k, params.top_p, params.min_p
    )


def params_strategy() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 2.5]),
        seed=st.integers(-(2**63), 2**63 - 1),
        top_k=st.sampled_from([0, 1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 5]),
        top_p=st.sampled_from([0.001, 0.3, 0.77, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    )


def batch_of(params: list[SamplingParams]) -> Batch:
    """What the sampler reads of a batch."""
    seqs = tuple(Sequence(EngineRequest(i, (0,), p), [0], []) for i, p in enumerate(params))
    empty = torch.zeros(len(params), 1, dtype=torch.int64)
    return Batch(seqs, empty[:, 0], empty, 4, sampling_tensors(params, "cpu"), ())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(params_strategy(), min_size=1, max_size=4),
    st.integers(0, 10_000),
    st.sampled_from([0.5, 3.0, 12.0]),
)
def test_rows_of_a_batch(params: list[SamplingParams], seed: int, spread: float) -> None:
    """Any mix of parameters in one batch: what is kept, its probabilities, and the token that is chosen."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), 3, VOCAB, generator=generator) * spread
    positions = torch.randint(0, 5000, (len(params), 3), generator=generator)
    processed = process(logits, sampling_tensors(params, "cpu"))
    chosen = Sampler().choose(Scores(logits, positions, logits[..., :0]), batch_of(params))
    for row, param in enumerate(params):
        for node in range(3):
            if param.temperature == 0:
                assert int(chosen[row, node]) == int(logits[row, node].argmax())
                continue
            expected = oracle_kept(logits[row, node], param)
            got = processed[row, node].double().log_softmax(-1).numpy()
            assert (np.isfinite(got) == np.isfinite(expected)).all()
            kept = np.isfinite(expected)
            np.testing.assert_allclose(got[kept], expected[kept], atol=1e-4)
            noise = gumbel_noise(
                torch.tensor([param.seed]), positions[row : row + 1, node : node + 1] + 1, torch.arange(VOCAB)
            )
            with_noise = expected + noise[0, 0].double().numpy()
            best, second = np.sort(with_noise)[::-1][:2]
            if best - second > 1e-4:
                assert int(chosen[row, node]) == int(with_noise.argmax())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(params_strategy(), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 10_000)
)
def test_rows_behind_one_another_are_chosen_as_among_padding(
    seqs: list[tuple[SamplingParams, int]], seed: int
) -> None:
    """Trees of different sizes: logits of real nodes alone say what those of all would."""
    params, counts = [param for param, _ in seqs], torch.tensor([count for _, count in seqs])
    shape = len(params), int(counts.max())
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(shape[1]) < counts[:, None]
    packing = Packing(real.flatten().nonzero()[:, 0], (real.flatten().cumsum(0) - 1).view(shape))
    rows = torch.randn(int(counts.sum()), VOCAB, generator=generator) * 3
    positions = torch.randint(0, 5000, shape, generator=generator)
    packed = Scores(rows, positions, rows.new_zeros(*shape, 0), packing)
    padded = packed.unpacked()
    assert padded.logits.shape == (*shape, VOCAB)
    found = Sampler().choose(packed, batch_of(params))
    assert found.shape == shape
    assert torch.equal(found[real], Sampler().choose(padded, batch_of(params))[real])


def test_ties_at_the_edge_of_a_filter() -> None:
    """Tokens tied with the last that top-k keeps stay, as in the numpy version. At top-p's edge all tied ones
    stay too, where that version takes the lower ids: what is kept in addition is tied with what it keeps."""
    logits = torch.log(torch.tensor([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    for top_k in range(1, 9):
        param = SamplingParams(top_k=top_k)
        got = process(logits[None, None], sampling_tensors([param], "cpu"))[0, 0]
        assert (torch.isfinite(got).numpy() == np.isfinite(oracle_kept(logits, param))).all()
    for top_p in (0.1, 0.35, 0.55, 0.99):
        param = SamplingParams(top_p=top_p)
        stays = torch.isfinite(process(logits[None, None], sampling_tensors([param], "cpu"))[0, 0]).numpy()
        kept = np.isfinite(oracle_kept(logits, param))
        assert stays[kept].all()
        assert set(logits.numpy()[stays]) == set(logits.numpy()[kept])


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("temperature", [1e-4, 1.0, 100.0])
def test_extreme_logits(scale: float, temperature: float) -> None:
    """Huge spreads, impossible tokens, a single possible one: never NaN, never an impossible token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50, VOCAB, generator=generator) * scale
    logits[:, :, ::3] = -math.inf
    logits[0, 1, :] = -math.inf
    logits[0, 1, 17] = scale
    for param in (
        SamplingParams(temperature=temperature),
        SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1, top_k=5),
    ):
        sampling = sampling_tensors([param], "cpu")
        noisy = perturb(logits, torch.arange(50)[None], torch.arange(VOCAB), sampling)
        assert not torch.isnan(noisy).any()
        picked = noisy.argmax(-1)
        assert bool(torch.isfinite(logits.gather(2, picked[..., None])).all())
        assert int(picked[0, 1]) == 17
        if scale / temperature > 1e6:
            assert torch.equal(picked, logits.argmax(-1))


def test_all_tokens_equal() -> None:
    logits = torch.zeros(1, 4000, VOCAB)
    for param in (SamplingParams(), SamplingParams(top_p=0.5, top_k=3, min_p=1.0)):
        picked = perturb(
            logits, torch.arange(4000)[None], torch.arange(VOCAB), sampling_tensors([param], "cpu")
        ).argmax(-1)
        assert frequency_score(picked[0].numpy(), np.full(VOCAB, 1 / VOCAB)) < 5


@pytest.mark.parametrize(
    "param",
    [
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.0, seed=2, top_k=6),
        SamplingParams(temperature=1.3, seed=3, top_p=0.8),
        SamplingParams(temperature=1.0, seed=4, min_p=0.1, top_k=20, top_p=0.9),
    ],
)
def test_choices_follow_their_probabilities(param: SamplingParams) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
    probs = np.exp(oracle_kept(logits, param))
    count = 20_000
    scores = Scores(logits.expand(1, count, -1), torch.arange(count)[None], torch.zeros(1, count, 0))
    picked = Sampler().choose(scores, batch_of([param]))
    assert frequency_score(picked[0].numpy(), probs) < 5


def test_a_subset_of_tokens_gets_the_noise_of_its_ids() -> None:
    """A reduced draft vocabulary throws the target's dice."""
    logits = torch.randn(2, 3, VOCAB)
    positions = torch.tensor([[4, 5, 6], [9, 9, 10]])
    sampling = sampling_tensors([SamplingParams(seed=3), SamplingParams(seed=4, temperature=0.5)], "cpu")
    whole = perturb(logits, positions, torch.arange(VOCAB), sampling)
    ids = torch.tensor([3, 8, 29])
    torch.testing.assert_close(perturb(logits[..., ids], positions, ids, sampling), whole[..., ids])


def test_select_keeps_the_parameters_of_a_sequence() -> None:
    params = [
        SamplingParams(temperature=0.1 * i, top_k=i, top_p=1 - 0.1 * i, min_p=0.01 * i, seed=i)
        for i in range(4)
    ]
    chosen = sampling_tensors(params, "cpu").select(torch.tensor([3, 1]))
    assert chosen.seed.tolist() == [3, 1]
    assert chosen.top_k.tolist() == [3, 1]
    assert chosen.temperature.tolist() == pytest.approx([0.3, 0.1])
    assert chosen.top_p.tolist() == pytest.approx([0.7, 0.9])
    assert chosen.min_p.tolist() == pytest.approx([0.03, 0.01])
