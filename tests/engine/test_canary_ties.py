"""What counts as a tie, on logits made by hand, and which steps are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.canary import compare, draw, is_tie, logit_noise
from engine.core import SamplingParams, Scores
from engine.sampler import perturb, sampling_tensors
from kernels import gumbel_noise


def scores_of(logits: Sequence[float], position: int = 7) -> Scores:
    """After a single node."""
    return Scores(torch.tensor([[logits]]), torch.tensor([[position]]), torch.zeros(1, 1, 0))


def test_noise_grows_with_the_logits_and_the_dtype() -> None:
    logits = torch.tensor([[[0.5, -10.0, 3.0]]])
    assert logit_noise(logits, torch.float32) == pytest.approx(4 * 2**-23 * 10)
    assert logit_noise(2 * logits, torch.bfloat16) == pytest.approx(4 * 2**-7 * 20)


@pytest.mark.parametrize(
    ("behind", "expected"), [(0.0, True), (1e-6, True), (0.019, True), (0.021, False), (1.0, False)]
)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_a_tie_is_within_twice_the_noise(temperature: float, behind: float, expected: bool) -> None:
    """At any temperature: the gap is scaled as the noise is. Both tokens have the same Gumbel noise, none."""
    sampling = sampling_tensors([SamplingParams(temperature=temperature)], "cpu")
    dice = torch.zeros(3)
    if temperature:
        dice = gumbel_noise(sampling.seed, torch.tensor([[8]]), torch.arange(3))[0, 0]
    logits = (torch.tensor([1.0, 1.0 - behind, -9.0]) - temperature * dice).tolist()
    assert is_tie(scores_of(logits), sampling, 1, noise=0.01) == expected
    found = compare(scores_of(logits), sampling, 1, 0, torch.float32)
    assert (found.position, found.emitted, found.rescored) == (8, 1, 0)
    assert found.gap == pytest.approx(behind / (temperature or 1.0), abs=1e-5)
    assert found.is_tie == (behind < 1e-5)


def test_a_nan_is_no_rounding() -> None:
    sampling = sampling_tensors([SamplingParams(temperature=0)], "cpu")
    found = compare(scores_of([1.0, math.nan, 2.0]), sampling, 0, 1, torch.float32)
    assert not found.is_tie
    assert math.isnan(found.gap)


def seed_where(wanted: int, others: int, lead: float, size: int) -> int:
    """A seed whose noise at position 8 puts a token ahead of another by so much, and that one ahead of the
    rest."""
    seeds = torch.arange(20_000)
    dice = gumbel_noise(seeds, torch.full((len(seeds), 1), 8), torch.arange(size))[:, 0]
    rest = [token for token in range(size) if token not in (wanted, others)]
    good = (dice[:, wanted] - dice[:, others] > lead) & (dice[:, [others]] > dice[:, rest]).all(1)
    return int(good.nonzero()[0])


@pytest.mark.parametrize(("slack", "expected"), [(0.001, True), (0.1, False)])
@pytest.mark.parametrize("which", ["top_k", "min_p", "top_p", "rival"])
def test_rounding_also_moves_the_edge_of_a_filter(which: str, slack: float, expected: bool) -> None:
    """Token 2 would have won, but was removed by a hair or by more. Or token 1, the rival, was kept by a hair
    or by more, and beat token 0."""
    params: dict[str, Any] = {"top_k": 2}
    if which == "rival":
        logits, emitted, seed = [3.0, 1.0, 1.0 - slack], 0, seed_where(1, 0, 4.0, 3)
    else:
        emitted, seed = 2, seed_where(2, 0, 4.0, 3)
        logits = [2.0, 1.0, 1.0 - slack]
        if which == "min_p":
            params = {"min_p": math.exp(-1)}
        elif which == "top_p":
            logits[2] = 0.5
            mass = torch.softmax(torch.tensor(logits), 0)[:2].sum()
            params = {"top_p": float(mass) - slack / 10}
    sampling = sampling_tensors([SamplingParams(seed=seed, **params)], "cpu")
    scores = scores_of(logits)
    found: Tensor = perturb(scores.logits, scores.positions + 1, torch.arange(3), sampling)[0, 0]
    assert int(found.argmax()) != emitted, "the test is idle unless the filter decides"
    assert is_tie(scores, sampling, emitted, noise=0.01) == expected
    rescored = int(found.argmax())
    assert math.isinf(compare(scores, sampling, emitted, rescored, torch.float32).gap) == (which != "rival")


def test_the_dice_know_request_and_position_alone() -> None:
    ids = [request for request in range(100) for _ in range(200)]
    positions = list(range(200)) * 100
    assert draw(1.0, ids, positions) == [True] * 20_000
    drawn = draw(0.05, ids, positions)
    assert 0.045 < sum(drawn) / len(drawn) < 0.055
    some = list(zip(ids, positions, strict=True))[:2000:29]
    assert [draw(0.05, [one], [place])[0] for one, place in some] == drawn[:2000:29]
    fewer = draw(0.01, ids, positions)
    assert all(more or not less for more, less in zip(drawn, fewer, strict=True))
    by_request = torch.tensor(drawn).view(100, 200).sum(1)
    by_position = torch.tensor(drawn).view(100, 200).sum(0)
    assert by_request.max() < 30
    assert by_position.max() < 20
    assert draw(0.5, [], []) == []
