"""Linear layers and their schemes: exact for targets, cheap for drafts."""

from __future__ import annotations

import pytest
import torch

import kernels
from engine.nn.linear import Linear, fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_is_a_product_whatever_its_scheme(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second, x = torch.randn(40, 64), torch.randn(24, 64), torch.randn(3, 5, 64)
    layer = fuse(first.to(dtype), second.to(dtype))
    assert (layer.out_features, layer.in_features) == (64, 64)
    assert layer.scheme in ("dense", "packed")
    got = layer(x.to(dtype))
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(got.float(), x @ torch.cat((first, second)).T, atol=tolerance, rtol=0.02)


@pytest.mark.parametrize("num_rows", [1, 4, 70])
def test_an_approximate_linear_is_off_by_little(num_rows: int) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(96, 128), torch.randn(num_rows, 128)
    weight[3] *= 100  # rows have scales of their own
    weight[5] = 0
    layer = Linear(weight, approximate=True)
    expected = x @ weight.T
    size = x.norm(dim=1)[:, None] * weight.norm(dim=1).clamp(min=1e-6)
    error = float(((layer(x) - expected).abs() / size).max())
    assert error < (0.01 if layer.scheme == "int8" else 1e-5)
    assert not bool(layer(x)[:, 5].any())


def test_only_float32_on_the_host_is_made_int8() -> None:
    assert kernels.pack_int8(torch.zeros(8, 8, dtype=torch.bfloat16)) is None
    assert kernels.pack_int8(torch.zeros(8, 8, device="meta")) is None
    assert Linear(torch.zeros(8, 8)).scheme != "int8", "a target is never approximate"


@pytest.mark.parametrize("num_rows", [1, 2, 7, 70])
def test_half_weights_round_the_weight_and_nothing_else(num_rows: int) -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(96, 128), torch.randn(1, num_rows, 128)
    weight[3] *= 100
    weight[5] *= 1e-6  # below float16's normal numbers
    layer = Linear(weight, half=True)
    rounded = weight.half().float() if layer.scheme == "half" else weight
    assert not torch.equal(rounded, weight) or layer.scheme != "half"
    got = layer(x)
    assert (got.dtype, got.shape) == (torch.float32, (1, num_rows, 96))
    torch.testing.assert_close(got, x @ rounded.T, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[..., 5], (x @ rounded.T)[..., 5], rtol=1e-4, atol=1e-9)


def test_half_weights_are_for_float32_on_the_host_within_range() -> None:
    assert kernels.pack_half(torch.zeros(8, 8, dtype=torch.bfloat16)) is None
    assert kernels.pack_half(torch.zeros(8, 8, device="meta")) is None
    for outlier in (7e4, -7e4, float("inf")):
        weight = torch.zeros(16, 8)
        weight[2, 3] = outlier  # float16 ends at 65504
        assert kernels.pack_half(weight) is None
        assert Linear(weight, half=True).scheme in ("packed", "dense")
    assert Linear(torch.zeros(8, 8)).scheme != "half", "only where it was asked for"


@pytest.mark.skipif(kernels.pack_half(torch.zeros(8, 8)) is None, reason="torch or the CPU cannot")
def test_half_weights_are_used_where_they_can_be() -> None:
    assert Linear(torch.zeros(8, 8), half=True).scheme == "half"
    assert fuse(torch.zeros(8, 8), torch.zeros(4, 8), half=True).scheme == "half"
    assert Linear(torch.zeros(8, 8), half=True, approximate=True).scheme in ("int8", "half")
