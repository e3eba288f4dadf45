"""From logits to tokens: the processors of a request and the choice keyed by position.

Order of the processors: temperature, min_p, top_k, top_p (as in vLLM). Then Gumbel noise that depends on
(seed, position, token id) alone is added and the largest entry wins. The draft ranks its candidates by the
same processed, perturbed scores, so target and draft look at the same dice (Daliri et al. 2024, "Coupling
without communication and drafter-invariant speculative decoding").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core import Batch, SamplingParams, SamplingTensors, Scores
from kernels import MAX_NOISE, gumbel_noise

NEVER = float("-inf")
_NUM_CANDIDATES = 128


def sampling_tensors(params: list[SamplingParams], device: str) -> SamplingTensors:
    """Parameters of a batch as tensors."""

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplingTensors(
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float32),
        min_p=column([p.min_p for p in params], torch.float32),
        seed=column([p.seed for p in params], torch.int64),
        all_greedy=all(p.temperature == 0 for p in params),
        any_filter=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params),
    )


def process(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """Temperature and filters. logits: [B, R, V] float32 -> scaled logits, -inf where a filter removed a
    token.

    Greedy rows pass unchanged: no filter removes the largest entry.
    """
    greedy = (sampling.temperature == 0)[:, None, None]
    scaled = logits / torch.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None, None]
    if sampling.any_filter:
        scaled = torch.where(greedy, scaled, _filter(scaled, sampling))
    return scaled


def _filter(scaled: Tensor, sampling: SamplingTensors) -> Tensor:
    """min_p, then top_k, then top_p of what is left; the largest entry always stays."""
    floor = scaled.amax(-1, keepdim=True) + torch.log(sampling.min_p)[:, None, None]  # log(0) = -inf: off
    scaled = scaled.masked_fill(scaled < floor, NEVER)
    vocab_size = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values
    keep = torch.where(sampling.top_k > 0, sampling.top_k, vocab_size).clamp(max=vocab_size)
    kth = ordered.gather(-1, (keep - 1)[:, None, None].expand(-1, scaled.shape[1], 1))
    scaled = scaled.masked_fill(scaled < kth, NEVER)
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of strictly better entries
    kept = before < sampling.top_p[:, None, None]
    kept[..., 0] = True
    last = ordered.gather(
        -1, kept.sum(-1, keepdim=True) - 1
    )  # the smallest entry that stays; ties stay with it
    return torch.where((sampling.top_p < 1)[:, None, None], scaled.masked_fill(scaled < last, NEVER), scaled)


def perturb(logits: Tensor, positions: Tensor, token_ids: Tensor, sampling: SamplingTensors) -> Tensor:
    """Processed logits plus the noise of their position; greedy rows get none.

    logits: [B, R, n] float32; positions: [B, R] position of the token to be chosen; token_ids: [n] int64,
    which token each column stands for. The target passes its whole vocabulary, a draft its own.
    """
    scaled = process(logits, sampling)
    if sampling.all_greedy:
        return scaled
    noise = gumbel_noise(sampling.seed, positions, token_ids)
    return torch.where((sampling.temperature == 0)[:, None, None], scaled, scaled + noise)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The K best columns of every row, processed: enough to choose from, nearly always.

    A whole vocabulary of noise costs more than a layer of a small model, and sorting one much more. Which
    tokens
    survive the filters, and which can win once noise is added, is usually decided among a few dozen.
    """

    columns: Tensor  # [B, R, K] int64 columns of the logits, best first
    scaled: (
        Tensor  # [B, R, K] processed logits, -inf where a filter removed the token; greedy rows as they are
    )
    outside: (
        Tensor  # [B, R] the most that a surviving column that is not listed can have; -inf if there is none
    )
    exact: Tensor  # [B, R] whether the filters could be decided from the list


def candidates(logits: Tensor, sampling: SamplingTensors, num: int) -> Candidates:
    """Process the ``num`` best columns of logits [B, R, V] as ``process`` does with all of them."""
    greedy = (sampling.temperature == 0)[:, None, None]
    scaled = logits / torch.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None, None]
    listed, columns = scaled.topk(min(num, scaled.shape[-1]), dim=-1)
    is_all = listed.shape[-1] == scaled.shape[-1]
    beyond = torch.full_like(listed[..., -1], NEVER) if is_all else listed[..., -1]
    exact = torch.ones_like(beyond, dtype=torch.bool)
    if not sampling.any_filter:
        return Candidates(columns, listed, beyond, exact)
    kept = listed.masked_fill(listed < listed[..., :1] + torch.log(sampling.min_p)[:, None, None], NEVER)
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    place = (top_k - 1).clamp(0, listed.shape[-1] - 1)[..., None].expand(-1, listed.shape[1], 1)
    kth = torch.where((top_k > 0)[..., None], kept.gather(-1, place), NEVER)
    kept = kept.masked_fill(kept < kth, NEVER)
    exact &= is_all | (top_k < listed.shape[-1])
    # What lies outside still counts in top_p's normaliser, unless a filter has already cut inside the list.
    cut = torch.isneginf(kept[..., -1]) | is_all
    mass = torch.where(cut, kept.logsumexp(-1), scaled.logsumexp(-1))
    exact &= cut | (top_p == 1) | ((sampling.min_p[:, None] == 0) & (top_k == 0))
    probs = torch.exp(kept - mass[..., None])
    inside = probs.cumsum(-1) - probs < top_p[..., None]
    inside[..., 0] = True
    last = kept.gather(-1, inside.sum(-1, keepdim=True) - 1)
    nucleus = kept.masked_fill(kept < last, NEVER)
    exact &= (top_p == 1) | cut | torch.isneginf(nucleus[..., -1])
    kept = torch.where((top_p < 1)[..., None], nucleus, kept)
    kept = torch.where(greedy, listed, kept)
    outside = torch.where(torch.isneginf(kept[..., -1]), NEVER, beyond)
    return Candidates(columns, kept, outside, exact | greedy[..., 0])


class Sampler:
    """The target's choice after every scored node."""

    def __init__(self, vocab_size: int, device: str) -> None:
        self._token_ids = torch.arange(vocab_size, device=device)

    def __call__(self, scores: Scores, batch: Batch) -> Tensor:
        """Returns [B, R] int64. The token after a node at position p stands at p + 1, and is keyed by
        that."""
        sampling = batch.sampling
        if sampling.all_greedy:
            return scores.logits.argmax(dim=-1)
        if scores.logits.device.type != "cpu":  # a device does not wait to be told how little would have done
            return perturb(scores.logits, scores.positions + 1, self._token_ids, sampling).argmax(dim=-1)
        choice = scores.logits.argmax(dim=-1)
        rows = (sampling.temperature > 0).nonzero()[:, 0]
        choice[rows] = self._sample(scores.logits[rows], scores.positions[rows] + 1, sampling.select(rows))
        return choice

    def _sample(self, logits: Tensor, positions: Tensor, sampling: SamplingTensors) -> Tensor:
        """As ``perturb(..).argmax()``, from candidates where they settle it. logits: [B, R, V] -> [B, R]."""
        few = candidates(logits, sampling, _NUM_CANDIDATES)
        best = (few.scaled + gumbel_noise(sampling.seed, positions, few.columns)).max(dim=-1)
        choice = few.columns.gather(-1, best.indices[..., None])[..., 0]
        settled = few.exact & (best.values > few.outside + MAX_NOISE)
        for row in (~settled.all(dim=1)).nonzero():
            perturbed = perturb(logits[row], positions[row], self._token_ids, sampling.select(row))
            choice[row] = perturbed.argmax(dim=-1)
        return choice
