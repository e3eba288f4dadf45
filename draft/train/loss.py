"""Cross-entropy against whole distributions, without keeping logits or copying the distributions.

The loss of a row with hidden state h against distribution t is lse(W h) - t . (W h). Kept for the backward
pass, the [rows, vocabulary] logits would cost more memory traffic than the rest of the head, and so would
gathering t for every step of every chain. Two rewrites avoid both:

    t . (W h) = (t W) . h                                t W, [rows of the table, H], serves all steps
    d/dh = W^T softmax(W h) - t W
    d/dW = sum over rows of softmax(W h) h^T - t h^T     t h^T: one product, of h added up per table row

The softmax part of both gradients is formed at once, block by block, while a block is in cache.

Autocast would treat these products one by one, and in-place ones not at all, so it is asked once for its
dtype and then switched off: products run in that dtype, sums and the weight's gradient in the weight's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 256  # rows; times 8,192 columns of float32 that is 8 MiB


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, row_weights: Tensor, compute: torch.dtype
    ) -> Tensor:
        """See weighted_logsumexp; compute: dtype of the products. Autocast must be off."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        total = torch.zeros((), dtype=row_weights.dtype, device=hidden.device)
        matrix = weight.to(compute)
        for start in range(0, hidden.shape[0], _BLOCK):
            rows = slice(start, start + _BLOCK)
            block, scale = hidden[rows].to(compute), row_weights[rows]
            logits = (block @ matrix.t()).to(scale.dtype)
            log_probs = logits.log_softmax(-1)
            total += torch.dot(logits[:, 0] - log_probs[:, 0], scale)
            if grad_hidden is None and grad_weight is None:
                continue
            probs, factor = log_probs.exp_().to(compute), scale[:, None].to(compute)
            if grad_hidden is not None:
                grad_hidden[rows] = ((probs @ matrix) * factor).to(hidden.dtype)
            if grad_weight is not None and weight.dtype == compute:
                grad_weight.addmm_(probs.t(), block * factor)  # spares a [V, H] temporary per block
            elif grad_weight is not None:
                grad_weight += probs.t() @ (block * factor)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return (
            None if hidden is None else hidden * grads[0].to(hidden.dtype),
            None if weight is None else weight * grads[0].to(weight.dtype),
            None,
            None,
        )


def weighted_logsumexp(hidden: Tensor, weight: Tensor, row_weights: Tensor) -> Tensor:
    """Sum over rows of row_weight * logsumexp(weight @ hidden). hidden: [M, H]; weight: [V, H]; row_weights:
    [M].

    Differentiable in hidden and weight, which may differ in dtype and get gradients in their own; the sum is
    kept in the dtype of row_weights.
    """
    compute = _compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _LogSumExp.apply(hidden, weight, row_weights, compute)  # type: ignore[no-untyped-call]
    return total


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What products of the two are done in: autocast's dtype where it is on, else the wider of the two.

    As in autocast itself, double precision stays what it is.
    """
    wider, kind = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if torch.is_autocast_enabled(kind) and wider != torch.float64:
        return torch.get_autocast_dtype(kind)
    return wider


class SoftTargets:
    """Distributions over the draft vocabulary, one per table row, and what a set of draft logits loses
    against them.
    """

    def __init__(self, table: Tensor, weight: Tensor) -> None:
        """table: [rows, V]; weight: [V, H], the draft's output rows."""
        self._weight = weight
        # [rows, H]: t W, in weight's dtype even under autocast: the steps add up their gradients here
        self._expected = (table.to(weight.dtype) @ weight).to(weight.dtype)

    def cross_entropy(self, hidden: Tensor, index: Tensor, row_weights: Tensor) -> Tensor:
        """Sum over rows of row_weight * cross-entropy(table[index], softmax(weight @ hidden)), in nats.

        hidden: [M, H]; index: [M] rows of the table; row_weights: [M] float32 or float64.
        """
        agreement = (hidden * self._expected.index_select(0, index)).to(row_weights.dtype).sum(-1)
        return weighted_logsumexp(hidden, self._weight, row_weights) - torch.dot(agreement, row_weights)
