"""The noise behind every sampled token: a function of (seed, position, token id), Gumbel distributed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels import gumbel_noise
from tests.oracles import sampler
from tests.oracles.noise import correlation_score, frequency_score, ks_score, neighbour_scores


def grid(seeds: list[int], positions: int, tokens: int) -> NDArray[np.float64]:
    """[seeds, positions, tokens]"""
    place = torch.arange(positions).expand(len(seeds), -1)
    noise: NDArray[np.float64] = (
        gumbel_noise(torch.tensor(seeds), place, torch.arange(tokens)).double().numpy()
    )
    return noise


@pytest.mark.parametrize(
    "seeds", [[0], [2**40 + 1], [-1], list(range(4))], ids=["zero", "large", "negative", "several"]
)
def test_it_is_gumbel_and_independent(seeds: list[int]) -> None:
    noise = grid(seeds, 60, 1500)
    assert ks_score(noise) < 2.2
    assert max(neighbour_scores(noise if len(seeds) > 1 else noise[0])) < 5
    for position in (0, 31, 59):
        assert ks_score(noise[:, position]) < 2.2


def test_seeds_that_differ_in_one_bit_are_strangers() -> None:
    base = 0x1234_5678_9ABC
    noise = grid([base] + [base ^ (1 << bit) for bit in range(0, 63, 3)], 30, 400)
    for other in range(1, len(noise)):
        assert correlation_score(noise[0], noise[other]) < 5


def test_far_apart_positions_and_tokens_are_strangers() -> None:
    noise = grid([11], 300, 600)[0]
    for shift in (2, 3, 64, 128, 256):
        assert correlation_score(noise[:-shift], noise[shift:]) < 5
        assert correlation_score(noise[:, :-shift], noise[:, shift:]) < 5
    assert (
        correlation_score(noise[:, :300], noise[:, :300].T) < 5
    )  # (position, token) against (token, position)


def test_the_shape_of_the_call_does_not_matter() -> None:
    """Batches, rows and subsets of tokens in any order see the same numbers."""
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([[3, 4], [9, 1], [1000, 0]])
    whole = gumbel_noise(seeds, positions, torch.arange(500))
    subset = torch.tensor([499, 0, 77, 3])
    assert torch.equal(gumbel_noise(seeds, positions, subset), whole[..., subset])
    assert torch.equal(gumbel_noise(seeds, positions, subset.expand(3, 2, -1)), whole[..., subset])
    for row in range(3):
        for column in range(2):
            alone = gumbel_noise(
                seeds[row : row + 1], positions[row : row + 1, column : column + 1], torch.arange(500)
            )
            assert torch.equal(alone[0, 0], whole[row, column])
    assert torch.equal(gumbel_noise(seeds, positions.clone(), torch.arange(500)), whole)


def test_it_is_finite_everywhere() -> None:
    """With 24 random bits the largest uniform rounds to 1 and its noise to infinity: this token would have
    been chosen whatever the model thought of it, once in 16 million draws."""
    assert torch.isfinite(gumbel_noise(torch.tensor([76]), torch.tensor([[7]]), torch.tensor([28265]))).all()
    noise = gumbel_noise(torch.arange(8), torch.arange(8).expand(8, -1), torch.arange(50_000))
    assert torch.isfinite(noise).all()
    assert 13 < float(noise.max()) < 17  # log of the number of draws, and of the bits
    assert -3.2 < float(noise.min()) < -2.5


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_argmax_draws_from_the_softmax(temperature: float) -> None:
    """Over seeds at one position, and over positions of one seed."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    probs = sampler.softmax(logits.double().numpy() / temperature)
    count = 20_000
    along = gumbel_noise(torch.tensor([9]), torch.arange(count)[None], torch.arange(40))
    picked = (logits / temperature + along).argmax(-1)[0]
    assert frequency_score(picked.numpy(), probs) < 5
    across = gumbel_noise(torch.arange(count), torch.zeros(count, 1, dtype=torch.int64), torch.arange(40))
    picked = (logits / temperature + across).argmax(-1)[:, 0]
    assert frequency_score(picked.numpy(), probs) < 5
    assert frequency_score(picked.numpy(), np.full(40, 1 / 40)) > 50
