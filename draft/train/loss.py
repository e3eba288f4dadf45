"""Cross-entropy against a whole distribution, without keeping the logits.

A row's loss is -sum_v target(v) log softmax(h W^T)_v. Kept for the backward pass, the [rows, vocabulary] logits would
cost more memory traffic than the rest of the head; but the gradient with respect to the logits is simply
softmax - target, so the backward products are formed at once, block by block, while a block is still in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 256  # rows; times 8,192 columns of float32 that is 8 MiB


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, table: Tensor, index: Tensor, row_weights: Tensor) -> Tensor:
        """See soft_cross_entropy."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        total = torch.zeros((), dtype=row_weights.dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], _BLOCK):
            rows = slice(start, start + _BLOCK)
            block, targets, scale = hidden[rows], table[index[rows]], row_weights[rows]
            logits = (block @ weight.t()).to(scale.dtype)
            norm = logits.logsumexp(-1)
            total += torch.dot(norm - (logits * targets).sum(-1), scale)
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(norm[:, None]).exp_().sub_(targets).mul_(scale[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), block)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        scale = grads[0]
        return (None if hidden is None else hidden * scale.to(hidden.dtype),
                None if weight is None else weight * scale.to(weight.dtype), None, None, None)


def soft_cross_entropy(hidden: Tensor, weight: Tensor, table: Tensor, index: Tensor, row_weights: Tensor) -> Tensor:
    """Sum over rows of row_weight * cross-entropy(table[index], softmax(hidden @ weight.T)), in nats.

    hidden: [M, H]; weight: [V, H]; table: [rows, V] distributions; index: [M] row of the table; row_weights: [M] in
    the table's dtype. Differentiable in hidden and weight.
    """
    loss: Tensor = _SoftCrossEntropy.apply(hidden, weight, table, index, row_weights)  # type: ignore[no-untyped-call]
    return loss
