"""From logits to tokens: the processors of a request and the choice keyed by position.

Order of the processors: the edits of ``engine.edits``, then temperature, min_p, top_k, top_p (as in vLLM).
Then Gumbel noise that depends on (seed, position, token id) alone is added and the largest entry wins. The
draft ranks its candidates by the same processed, perturbed scores, but for the edits, so target and draft
look at the same dice (Daliri et al. 2024, "Coupling without communication and drafter-invariant speculative
decoding").
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, SamplingParams, SamplingTensors, Scores, Sequence
from engine.edits import Edit, EditList
from kernels import choose, gumbel_noise, nucleus

NEVER = float("-inf")


_COLUMNS: Final = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
}


def sampling_columns(params: Items[SamplingParams]) -> dict[str, Tensor]:
    """Parameters of a batch as tensors on the host, [B] each, by their names."""
    return {
        name: torch.tensor([getattr(one, name) for one in params], dtype=dtype)
        for name, dtype in _COLUMNS.items()
    }


def sampling_tensors(params: Items[SamplingParams], device: str) -> SamplingTensors:
    """Parameters of a batch on a device."""
    return tensors_of(params, {name: of.to(device) for name, of in sampling_columns(params).items()})


def tensors_of(params: Items[SamplingParams], columns: Mapping[str, Tensor]) -> SamplingTensors:
    """Parameters of a batch whose columns lie where they should; there may be more in them, for padding."""
    return SamplingTensors(
        **{name: columns[name] for name in _COLUMNS},
        all_greedy=all(p.temperature == 0 for p in params),
        any_filter=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params),
        any_top_p=any(p.top_p < 1 for p in params),
        most_top_k=_power_of_two(max((p.top_k for p in params), default=0)),
    )


def _power_of_two(number: int) -> int:
    """The least that is not below a number; 0 for 0."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


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
    return nucleus(scaled, ordered.masked_fill(ordered < kth, NEVER), sampling.top_p)


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
    """The K best columns of every row, processed: among them a draft finds its children.

    Processing all of a vocabulary costs more than a layer of a small model, and sorting it much more.
    """

    columns: Tensor  # [B, R, K] int64 columns of the logits, best first
    scaled: Tensor  # [B, R, K] processed logits, -inf where a filter removed the token; greedy ones unchanged


def candidates(logits: Tensor, sampling: SamplingTensors, num: int) -> Candidates:
    """Process the ``num`` best columns of logits [B, R, V] as ``process`` does with all of them.

    Exact but where both top_p and a filter before it leave more than these columns: there what the earlier
    one has removed still counts as mass.
    """
    greedy = (sampling.temperature == 0)[:, None, None]
    scaled = logits / torch.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None, None]
    listed, columns = scaled.topk(min(num, scaled.shape[-1]), dim=-1)
    if not sampling.any_filter:
        return Candidates(columns, listed)
    kept = listed.masked_fill(listed < listed[..., :1] + torch.log(sampling.min_p)[:, None, None], NEVER)
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    place = (top_k - 1).clamp(0, listed.shape[-1] - 1)[..., None].expand(-1, listed.shape[1], 1)
    kth = torch.where((top_k > 0)[..., None], kept.gather(-1, place), NEVER)
    kept = kept.masked_fill(kept < kth, NEVER)
    # What lies outside still counts in top_p's normaliser, unless a filter has already cut inside the list.
    cut = torch.isneginf(kept[..., -1]) | (listed.shape[-1] == scaled.shape[-1])
    mass = torch.where(cut, kept.logsumexp(-1), scaled.logsumexp(-1))
    probs = torch.exp(kept - mass[..., None])
    inside = probs.cumsum(-1) - probs < top_p[..., None]
    inside[..., 0] = True
    last = kept.gather(-1, inside.sum(-1, keepdim=True) - 1)
    kept = torch.where((top_p < 1)[..., None], kept.masked_fill(kept < last, NEVER), kept)
    return Candidates(columns, torch.where(greedy, listed, kept))


def _floors(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """[B, R]: the least logit / temperature that min_p and top_k keep, -inf where they are off. No device is
    waited for."""
    temperature = torch.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
    floors = logits.amax(dim=-1) / temperature + torch.log(sampling.min_p)[:, None]
    most = min(sampling.most_top_k, logits.shape[-1])
    if most == 0:
        return floors
    best = logits.topk(most, dim=-1).values
    place = (sampling.top_k - 1).clamp(0, most - 1)[:, None, None].expand(-1, best.shape[1], 1)
    kth = best.gather(-1, place)[..., 0] / temperature
    return torch.where((sampling.top_k > 0)[:, None], torch.maximum(floors, kth), floors)


class Sampler:
    """The target's choice after every scored node. edits: what requests may ask for, in order."""

    def __init__(self, edits: Items[Edit] = ()) -> None:
        self._edits = EditList(edits)

    def __call__(self, scores: Scores, batch: Batch, tree: DraftTree) -> Tensor:
        """Returns [B, R] int64, as ``choose``."""
        return self.choose(self.edited(scores, batch, tree), batch)

    def edits(self, batch: Batch) -> bool:
        """Whether scores of the batch are edited at all."""
        return self._edits.apply_to(batch)

    def edited(self, scores: Scores, batch: Batch, tree: DraftTree) -> Scores:
        """The scores as the requests edit them: what is to be chosen from. The raw ones stay as they are."""
        if not self.edits(batch):
            return scores
        scores = scores.unpacked()
        return replace(scores, logits=self._edits.edited(scores.logits, batch, tree))

    def choose(self, scores: Scores, batch: Batch) -> Tensor:
        """The choice from edited scores, [B, R] int64. The token after a node at position p stands at p + 1,
        and is keyed by that.

        NO_CHOICE where the largest logit is no finite number: a row with NaN or infinity in it says nothing,
        and in one that is -inf throughout no token is allowed. No draft agrees with that, so the path of a
        tree ends there, and with it the request (``Scheduler.commit``): it alone.
        """
        sampling, logits, positions = batch.sampling, scores.logits, scores.positions + 1
        packing = scores.packing
        if packing is not None:  # as many sequences as there are rows
            sampling = sampling.select(packing.nodes // positions.shape[1])
            logits, positions = logits[:, None], positions.flatten()[packing.nodes, None]
        floors = _floors(logits, sampling) if sampling.any_filter else None
        top_p = sampling.top_p if sampling.any_top_p else None  # where nobody has one, nothing is sorted
        choice = choose(logits, positions, sampling.temperature, top_p, floors, sampling.seed)
        return choice if packing is None else choice[packing.places, 0]

    def forget(self, seq: Sequence) -> None:
        """Drop everything kept for a sequence that ended or was preempted."""
        self._edits.forget(seq)
