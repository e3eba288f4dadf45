"""Products with matrices packed in panels, of float16 or of bytes, against the same products in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu, ref
from kernels import dispatch as ops
from tests.kernels.compiled import needs_panels, normal


def in_bytes(weight: Tensor) -> Tensor:
    codes, scales = ref.quantise_rows(weight)
    return codes.double() * scales.double()[:, None]


# How a matrix is packed, and what it is rounded to.
KINDS: list[tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]]] = [
    (ops.pack_half, lambda weight: weight.half().double()),
    (ops.pack_bytes, in_bytes),
]


@needs_panels
class TestPanels:
    @settings(deadline=None)
    @given(
        num_rows=st.one_of(st.integers(1, 14), st.sampled_from([33, 97, 200])),
        num_inputs=st.sampled_from([1, 7, 64, 576]),
        num_outputs=st.sampled_from([1, 15, 16, 17, 64, 80, 200]),
        threads=st.sampled_from([1, 2, 3]),
        kind=st.sampled_from(KINDS),
    )
    def test_is_the_product_and_its_rows_stand_alone(
        self,
        num_rows: int,
        num_inputs: int,
        num_outputs: int,
        threads: int,
        kind: tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]],
    ) -> None:
        weight, x = normal(num_outputs, num_inputs), normal(num_rows, num_inputs, seed=1)
        packed = kind[0](weight)
        assert isinstance(packed, cpu.PanelMatrix)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = ops.panel_linear(x, packed)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found.double(), x.double() @ kind[1](weight).T, rtol=1e-5, atol=1e-4)
        alone = torch.cat([ops.panel_linear(row[None], packed) for row in x[-7:]])
        assert torch.equal(alone, found[-7:])

    def test_every_float16_is_widened_exactly(self) -> None:
        bits = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
        weight = bits[bits.isfinite()].float()[:, None]
        packed = ops.pack_half(weight)
        assert torch.equal(ops.half_linear(torch.ones(1, 1), packed)[0], weight[:, 0])

    def test_every_byte_is_widened_exactly(self) -> None:
        """Each output has all the codes, so that its largest is 127; a row of zeros stays one."""
        codes = torch.arange(-127, 128).float()
        weight = torch.stack([codes * 0.5, codes.flip(0), torch.zeros(255)])
        packed = ops.pack_bytes(weight)
        assert isinstance(packed, cpu.PanelMatrix)
        assert torch.equal(ops.panel_linear(torch.eye(255), packed), weight.T)

    def test_any_shape_and_layout_of_rows(self) -> None:
        weight, x = normal(40, 24), normal(24, 3, 5, seed=1).permute(1, 2, 0)
        packed = ops.pack_half(weight)
        found = ops.half_linear(x, packed)
        assert found.shape == (3, 5, 40)
        torch.testing.assert_close(found, x @ weight.half().float().T, rtol=1e-5, atol=1e-5)
        assert ops.half_linear(x[:0], packed).shape == (0, 5, 40)

    def test_what_is_not_a_number_does_not_vanish(self) -> None:
        x = normal(2, 16)
        x[1, 3] = math.nan
        found = ops.half_linear(x, ops.pack_half(normal(32, 16, seed=1)))
        assert found[0].isfinite().all()
        assert found[1].isnan().all()

    def test_gradients_are_not_dropped_in_silence(self) -> None:
        packed = ops.pack_half(normal(16, 8))
        with pytest.raises(AssertionError, match="gradient"):
            ops.half_linear(normal(1, 8).requires_grad_(), packed)
