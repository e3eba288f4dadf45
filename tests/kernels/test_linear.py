"""Linear layers and their schemes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.nn.linear import Linear, fuse
from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight, dequantise


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


# --- quantised weights


def quantised(kind: str, matrix: Tensor) -> Weight:
    if kind == "fp8":
        return Fp8Weight(*kernels.quantise_fp8(matrix))
    return Nvfp4Weight(*kernels.quantise_nvfp4(matrix)) if kind == "nvfp4" else matrix


def own_sizes(*gains: float) -> list[Tensor]:
    """[7, 48], [1, 48], [24, 48], ..: odd heights, each of its own magnitude and so its own scale."""
    generator = torch.Generator().manual_seed(4)
    heights = (7, 1, 24)
    return [torch.randn(n, 48, generator=generator) * gain for n, gain in zip(heights, gains, strict=True)]


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
@pytest.mark.parametrize("rows", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_a_quantised_linear_multiplies_the_matrix_it_stands_for(kind: str, rows: tuple[int, ...]) -> None:
    weight = quantised(kind, own_sizes(0.02, 1.0, 1.0)[0])
    x = torch.randn(rows, generator=torch.Generator().manual_seed(5))
    layer = Linear(weight)
    assert (layer.scheme, layer.out_features, layer.in_features) == (kind, 7, 48)
    expected = F.linear(x.double(), dequantise(weight, torch.float64)).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantised_linear_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = quantised(kind, torch.randn(96, 1024, generator=generator) * 0.03)
    layer, one_hot = Linear(weight), torch.zeros(1024, dtype=dtype)
    one_hot[500] = 1  # nothing to sum: the scaled element, rounded once
    assert torch.equal(layer(one_hot), dequantise(weight, torch.float32)[:, 500].to(dtype))
    x = torch.randn(16, 1024, generator=generator).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    # bfloat16 rounds the sum and the scaled sum, half an ulp each; float16 rounds every weight
    expected = F.linear(x.double(), dequantise(weight, torch.float64))
    atol = 2e-5 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=atol)


def test_bfloat16_products_round_no_weight() -> None:
    """9 * 1 - 8 * 1.125 and 3 * 1 - 2 * 1.5 cancel exactly, and no longer do once weights are rounded."""
    fp8 = Fp8Weight(torch.tensor([[1.0, 1.125]]).to(torch.float8_e4m3fn), torch.tensor(0.1))
    codes, block_scales = torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1).to(torch.float8_e4m3fn)
    codes[0, 0] = 0x32
    nvfp4 = Nvfp4Weight(codes, block_scales, torch.tensor(11.0))
    for weight, pair in ((fp8, [9.0, -8.0]), (nvfp4, [3.0, -2.0])):
        x = torch.zeros(weight.shape[1], dtype=torch.bfloat16)
        x[:2] = torch.tensor(pair)
        assert float(Linear(weight)(x)) == 0.0
        assert float(F.linear(x, dequantise(weight, torch.bfloat16))) != 0.0


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_large_activations_stay_finite_in_float16(kind: str) -> None:
    weight = quantised(kind, torch.full((4, 64), 0.01))
    x = torch.full((2, 64), 900.0, dtype=torch.float16)  # times codes of 448 or 2688 it would overflow
    torch.testing.assert_close(Linear(weight)(x).float(), torch.full((2, 4), 576.0), rtol=0.07, atol=0)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_quantised_weight_is_held_as_it_is_stored(kind: str) -> None:
    weight = quantised(kind, own_sizes(1.0, 1.0, 1.0)[2])
    assert isinstance(weight, Fp8Weight | Nvfp4Weight)
    before, x = weight.codes.view(torch.uint8).clone(), torch.ones(2, 48)
    for layer in (Linear(weight), Linear(weight, half=True), fuse(weight)):
        assert layer.weight is None
        assert float(layer(x).abs().max()) > 0.1
        assert torch.equal(weight.codes.view(torch.uint8), before)
        weight.codes.view(torch.uint8).zero_()
        assert not bool(layer(x).any()), "no copy, and nothing dequantised kept beside it"
        weight.codes.view(torch.uint8).copy_(before)


def test_activations_are_not_rounded_to_their_scale() -> None:
    codes, scale = kernels.quantise_fp8(own_sizes(1.0, 1.0, 1.0)[0])
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(7))
    with_scale = Linear(Fp8Weight(codes, scale, torch.tensor(1e-6)))  # would saturate every activation
    assert torch.equal(with_scale(x), Linear(Fp8Weight(codes, scale))(x))


@pytest.mark.parametrize(
    ("kinds", "schemes"),
    [
        (("fp8",) * 3, {"fp8"}),
        (("nvfp4",) * 3, {"nvfp4"}),
        (("fp8", "plain", "nvfp4"), {"mixed"}),
        (("plain",) * 3, {"dense", "packed"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weights_keep_their_own_scales(
    kinds: tuple[str, ...], schemes: set[str], dtype: torch.dtype
) -> None:
    """The smallest matrix would vanish in rounding if it shared the largest one's scale."""
    gains = (1.0, 3e4, 1e-4)
    matrices = [matrix.to(dtype) for matrix in own_sizes(*gains)]
    weights = [quantised(kind, matrix) for kind, matrix in zip(kinds, matrices, strict=True)]
    layer = fuse(*weights)
    assert (layer.out_features, layer.in_features) == (32, 48)
    assert layer.scheme in schemes
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(8)).to(dtype)
    outputs = torch.split(layer(x), [7, 1, 24], dim=-1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for output, weight, gain in zip(outputs, weights, gains, strict=True):
        assert output.dtype == dtype
        exact = F.linear(x.double(), dequantise(weight, torch.float64)) / gain
        torch.testing.assert_close(output.double() / gain, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_fused_codes_are_bit_identical(kind: str) -> None:
    """The product with one column's one-hot row gives the matrix back: exactly the separate ones."""
    weights = [quantised(kind, matrix) for matrix in own_sizes(1.0, 30.0, 0.01)]
    together = torch.cat([dequantise(weight, torch.float32) for weight in weights])
    assert torch.equal(fuse(*weights)(torch.eye(48)).T, together)


def test_a_stack_or_weights_of_other_inputs_are_refused() -> None:
    with pytest.raises(AssertionError, match="stack of experts"):
        Linear(quantised("fp8", torch.ones(2, 3, 16)))
    with pytest.raises(AssertionError, match="same input"):
        fuse(quantised("fp8", torch.ones(3, 16)), quantised("fp8", torch.ones(3, 32)))
