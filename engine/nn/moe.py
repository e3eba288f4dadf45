"""Mixture of experts with a few experts per token, chosen by a softmax router, and a shared expert.

    y = sum over the chosen e of weight_e * expert_e(x)  +  shared(x)

Experts are SwiGLU blocks whose weights are stacked, as the checkpoint stores them, quantised or not. Tokens
are grouped by expert, so an expert that several tokens chose is read once and one that none chose never.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.nn.mlp import SwiGLU
from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight, dequantise


class Router:
    """Scores of all experts for a token, the best few of them, and weights that sum to ``scale``.

    Logits and softmax are float32, because a flipped near-tie changes an expert; ties go to the lower id. A
    softmax over all experts that is renormalised over the chosen ones equals a softmax over those.
    """

    def __init__(self, gate: Tensor, num_chosen: int, scale: float) -> None:
        """gate: [E, H], kept in float32."""
        self.gate, self.num_chosen, self.scale = gate.float(), num_chosen, scale

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, H] -> expert ids [T, k] int64, best first, and weights [T, k] float32."""
        logits, ids = F.linear(x.float(), self.gate).sort(dim=-1, descending=True, stable=True)
        weights = torch.softmax(logits[:, : self.num_chosen], dim=-1) * self.scale
        return ids[:, : self.num_chosen], weights


def one_of(stack: Weight, index: int) -> Weight:
    """One matrix [out, in] of a stack [E, out, in], with its scale and without a copy."""
    match stack:
        case Fp8Weight(codes, scale):
            return Fp8Weight(codes[index], scale[index])
        case Nvfp4Weight(codes, block_scales, divisor):
            return Nvfp4Weight(codes[index], block_scales[index], divisor[index])
        case Tensor():
            return stack[index]


class Experts:
    """Stacked SwiGLU experts. w1 (gate) and w3 (up): [E, I, H]; w2 (down): [E, H, I].

    The plain version: it asks the device which experts are hit, and widens a quantised expert for each use.
    """

    def __init__(self, w1: Weight, w3: Weight, w2: Weight) -> None:
        self.w1, self.w3, self.w2 = w1, w3, w2

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x: [T, H]; ids, weights: [T, k] -> [T, H] float32.

        The k contributions of a token are summed in the router's order, so the sum does not depend on who
        else is in the batch.
        """
        num_tokens, num_chosen = ids.shape
        flat = ids.flatten()
        order = flat.argsort(stable=True)  # entries of [T * k], grouped by expert
        counts = flat.bincount()
        hit, ends = counts.nonzero()[:, 0], counts.cumsum(0)
        outputs = x.new_empty(num_tokens * num_chosen, x.shape[-1])
        first = 0
        for expert, end in zip(hit.tolist(), ends[hit].tolist(), strict=True):
            entries, first = order[first:end], end
            outputs[entries] = self._expert(expert, x[entries // num_chosen])
        parts = outputs.view(num_tokens, num_chosen, -1).float() * weights[..., None]
        return parts.sum(dim=1)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        w1, w3, w2 = (dequantise(one_of(w, index), x.dtype) for w in (self.w1, self.w3, self.w2))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


class MixtureOfExperts:
    """Router, experts and the shared expert, which every token takes, unweighted."""

    def __init__(self, router: Router, experts: Experts, shared: SwiGLU | None) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, H] -> the same shape and dtype."""
        y = self.experts(x, *self.router(x))
        if self.shared is not None:
            y = y + self.shared(x).float()
        return y.to(x.dtype)
