"""From logits to tokens: the processors of a request and the choice keyed by position.

Order of the processors: temperature, min_p, top_k, top_p (as in vLLM). Then Gumbel noise that depends on
(seed, position, token id) alone is added and the largest entry wins. The draft ranks its candidates by the
same processed, perturbed scores, so target and draft look at the same dice (Daliri et al. 2024, "Coupling
without communication and drafter-invariant speculative decoding").
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core import Batch, SamplingParams, SamplingTensors, Scores
from kernels import gumbel_noise


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
    negative_infinity = float("-inf")
    floor = scaled.amax(-1, keepdim=True) + torch.log(sampling.min_p)[:, None, None]  # log(0) = -inf: off
    scaled = scaled.masked_fill(scaled < floor, negative_infinity)
    vocab_size = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values
    keep = torch.where(sampling.top_k > 0, sampling.top_k, vocab_size).clamp(max=vocab_size)
    kth = ordered.gather(-1, (keep - 1)[:, None, None].expand(-1, scaled.shape[1], 1))
    scaled = scaled.masked_fill(scaled < kth, negative_infinity)
    ordered = ordered.masked_fill(ordered < kth, negative_infinity)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of strictly better entries
    kept = before < sampling.top_p[:, None, None]
    kept[..., 0] = True
    last = ordered.gather(
        -1, kept.sum(-1, keepdim=True) - 1
    )  # the smallest entry that stays; ties stay with it
    return torch.where(
        (sampling.top_p < 1)[:, None, None], scaled.masked_fill(scaled < last, negative_infinity), scaled
    )


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


class Sampler:
    """The target's choice after every scored node."""

    def __init__(self, vocab_size: int, device: str) -> None:
        self._token_ids = torch.arange(vocab_size, device=device)

    def __call__(self, scores: Scores, batch: Batch) -> Tensor:
        """Returns [B, R] int64. The token after a node at position p stands at p + 1, and is keyed by
        that."""
        choice = scores.logits.argmax(dim=-1)
        sampling = batch.sampling
        if sampling.all_greedy:
            return choice
        # Noise over a whole vocabulary is work: on the host only the sampled sequences get it. Finding them
        # on a
        # device would make the host wait, so there every row is perturbed and ``perturb`` leaves greedy rows
        # alone.
        rows = torch.arange(len(choice), device=choice.device)
        if choice.device.type == "cpu":
            rows = rows[sampling.temperature > 0]
        perturbed = perturb(
            scores.logits[rows], scores.positions[rows] + 1, self._token_ids, sampling.select(rows)
        )
        choice[rows] = perturbed.argmax(dim=-1)
        return choice
