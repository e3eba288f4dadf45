"""The loss under autocast: the products are rounded, what is summed up is not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from draft.train.loss import SoftTargets

ROWS, VOCAB, HIDDEN = 600, 40, 16  # more rows than one block


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, table, index, row weights; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) / 2
    table = torch.randn(50, VOCAB, generator=generator, dtype=torch.float64).softmax(-1)
    index = torch.randint(0, 50, (ROWS,), generator=generator)
    scale = torch.rand(ROWS, generator=generator, dtype=torch.float64) / ROWS
    return hidden.to(dtype), weight.to(dtype), table.to(dtype), index, scale.to(dtype)


def loss_and_gradients(
    dtype: torch.dtype, hidden_dtype: torch.dtype, autocast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, table, index, scale = inputs(dtype)
    hidden = hidden.to(hidden_dtype).requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = SoftTargets(table, weight).cross_entropy(hidden, index, scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_agrees_with_double_precision(hidden_dtype: torch.dtype, autocast: bool) -> None:
    exact = loss_and_gradients(torch.float64, torch.float64, False)
    found = loss_and_gradients(torch.float32, hidden_dtype, autocast)
    assert [tensor.dtype for tensor in found] == [torch.float32, hidden_dtype, torch.float32]
    rounded = autocast or hidden_dtype == torch.bfloat16
    for value, reference in zip(found, exact, strict=True):
        error = (value.double() - reference).norm() / reference.norm()
        assert error < (2e-2 if rounded else 1e-5)


def test_autocast_leaves_double_precision_alone() -> None:
    exact, found = (loss_and_gradients(torch.float64, torch.float64, autocast) for autocast in (False, True))
    for value, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_the_weight_is_summed_in_its_own_dtype() -> None:
    """300 blocks that add 1 each: a bfloat16 sum would stop at 256."""
    hidden = torch.ones(300 * 256, 4)
    weight = torch.zeros(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        targets = SoftTargets(torch.tensor([[1.0, 0.0]]), weight)
        index = torch.zeros(hidden.shape[0], dtype=torch.int64)
        loss = targets.cross_entropy(hidden, index, torch.full((hidden.shape[0],), 1 / 128))
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    # softmax is 1/2 everywhere, and the target is all on token 0
    torch.testing.assert_close(weight.grad, torch.tensor([[-300.0] * 4, [300.0] * 4]))
