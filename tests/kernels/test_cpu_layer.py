"""Fused decoder layers against the same operations one by one: bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu_layer
from kernels import dispatch as ops
from tests.kernels.compiled import Part, needs_panels, normal

pytestmark = needs_panels

EPS, NUM_SLOTS = 1e-5, 200
SIZES = cpu_layer.LayerSizes(hidden=48, num_heads=6, num_kv_heads=2, head_dim=8, inner=80)
GROUPED = cpu_layer.LayerSizes(hidden=64, num_heads=3, num_kv_heads=1, head_dim=16, inner=32)


@dataclass(frozen=True)
class Layer:
    """The parts of a layer, and the layer as one call."""

    sizes: cpu_layer.LayerSizes
    norms: tuple[Tensor, Tensor]
    matrices: tuple[object, object, object, object]

    @classmethod
    def random(cls, sizes: cpu_layer.LayerSizes, seed: int = 0) -> Layer:
        heads = sizes.num_heads * sizes.head_dim
        qkv = heads + 2 * sizes.num_kv_heads * sizes.head_dim
        shapes = (qkv, sizes.hidden), (sizes.hidden, heads), (2 * sizes.inner, sizes.hidden)
        packed = [  # in both ways, since a layer takes each matrix as it is
            (ops.pack_half, ops.pack_bytes)[(seed + i) % 2](normal(*shape, seed=seed + i) * shape[1] ** -0.5)
            for i, shape in enumerate((*shapes, (sizes.hidden, sizes.inner)))
        ]
        norms = tuple(1 + 0.3 * normal(sizes.hidden, seed=seed + 5 + i) for i in range(2))
        return cls(sizes, (norms[0], norms[1]), (packed[0], packed[1], packed[2], packed[3]))

    def fused(self) -> cpu_layer.FusedLayer | None:
        return cpu_layer.fused_layer(self.norms, self.matrices, self.sizes, EPS, self.sizes.head_dim**-0.5)

    def by_operations(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        write: Tensor | slice,
        parts: list[Part],
        pools: tuple[Tensor, Tensor],
    ) -> Tensor:
        qkv, out, gate_up, down = self.matrices
        heads = ops.half_linear(ops.rms_norm(x, self.norms[0], EPS), qkv)
        heads = heads.view(1, len(x), -1, self.sizes.head_dim)
        cos, sin = rotation[0][None], rotation[1][None]
        q = ops.rope_write(heads, self.sizes.num_heads, cos, sin, *pools, write)[0]
        attended, first = [], 0
        for part in parts:
            rows = q[first : first + part.num_seqs * part.num_nodes]
            rows = rows.reshape(part.num_seqs, part.num_nodes, *rows.shape[1:])
            scale = self.sizes.head_dim**-0.5
            attended.append(
                ops.tree_attention(rows, *pools, part.read, part.bias, scale).reshape(
                    -1, rows.shape[2] * rows.shape[3]
                )
            )
            first += part.num_seqs * part.num_nodes
        total = x + ops.half_linear(torch.cat(attended), out)
        normed = ops.rms_norm(total, self.norms[1], EPS)
        return total + ops.half_linear(ops.silu_mul(ops.half_linear(normed, gate_up)), down)


def hidden_some(num_seqs: int, num_nodes: int, longest: int, seed: int) -> Tensor:
    """A mask that hides some rows, never the first."""
    seen = torch.rand(num_seqs, num_nodes, longest, generator=torch.Generator().manual_seed(seed)) < 0.7
    seen[..., 0] = True
    return torch.where(seen, 0.0, float("-inf"))


@st.composite
def parts_of(draw: st.DrawFn) -> list[Part]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        num_seqs, num_nodes = draw(st.integers(1, 3)), draw(st.integers(1, 9))
        lens = [num_nodes + draw(st.integers(0, 40)) for _ in range(num_seqs)]
        if draw(st.booleans()):
            starts = [draw(st.integers(0, NUM_SLOTS - own)) for own in lens]
            read: Tensor | tuple[slice, ...] = tuple(
                slice(start, start + own) for start, own in zip(starts, lens, strict=True)
            )
        else:
            generator = torch.Generator().manual_seed(number)
            read = torch.randint(NUM_SLOTS, (num_seqs, max(lens)), generator=generator)
        bias = hidden_some(num_seqs, num_nodes, max(lens), number) if draw(st.booleans()) else None
        found.append(Part(num_seqs, num_nodes, read, bias))
    return found


@settings(deadline=None)
@given(
    sizes=st.sampled_from([SIZES, GROUPED]),
    parts=parts_of(),
    threads=st.sampled_from([1, 2, 3]),
    listed=st.booleans(),
)
def test_one_call_has_the_bits_of_ten(
    sizes: cpu_layer.LayerSizes, parts: list[Part], threads: int, listed: bool
) -> None:
    layer = Layer.random(sizes)
    num_rows = sum(part.num_seqs * part.num_nodes for part in parts)
    x = normal(num_rows, sizes.hidden, seed=20)
    rotation = tuple(normal(num_rows, 1, sizes.head_dim, seed=30 + i) for i in range(2))
    write = (
        torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(1))[:num_rows]
        if listed
        else slice(3, 3 + num_rows)
    )
    pools = tuple(normal(sizes.num_kv_heads, NUM_SLOTS, sizes.head_dim, seed=40 + i) for i in range(2))
    theirs = tuple(pool.clone() for pool in pools)
    expected = layer.by_operations(x, (rotation[0], rotation[1]), write, parts, (theirs[0], theirs[1]))
    fused = layer.fused()
    assert fused is not None
    before, given_x = torch.get_num_threads(), x.clone()
    torch.set_num_threads(threads)
    try:
        rows = cpu_layer.LayerRows(sizes, (rotation[0], rotation[1]), write, parts, NUM_SLOTS)
        found = fused(x, (pools[0], pools[1]), rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    assert torch.equal(x, given_x)
    assert all(torch.equal(*pair) for pair in zip(pools, theirs, strict=True))


def test_a_stack_is_its_layers_one_after_another() -> None:
    layers = [Layer.random(SIZES, seed=seed).fused() for seed in (0, 100, 200)]
    fused = [layer for layer in layers if layer is not None]
    pools = normal(3, 2, SIZES.num_kv_heads, NUM_SLOTS, SIZES.head_dim, seed=40)
    theirs = pools.clone()
    rotation = normal(3, 1, SIZES.head_dim, seed=30), normal(3, 1, SIZES.head_dim, seed=31)
    part = Part(1, 3, (slice(0, 13),), hidden_some(1, 3, 13, 0))
    rows = cpu_layer.LayerRows(SIZES, rotation, slice(10, 13), [part], NUM_SLOTS)
    x = normal(3, SIZES.hidden, seed=20)
    given_x, expected = x.clone(), x
    for layer, (keys, values) in zip(fused, theirs, strict=True):
        expected = layer(expected, (keys, values), rows)
    found = cpu_layer.FusedStack(fused, [(keys, values) for keys, values in pools])(x, rows)
    assert torch.equal(found, expected)
    assert torch.equal(x, given_x)
    assert torch.equal(pools, theirs)


def test_layers_that_do_not_fit_are_left_as_operations() -> None:
    layer = Layer.random(SIZES)
    assert layer.fused() is not None
    odd = cpu_layer.LayerSizes(hidden=48, num_heads=6, num_kv_heads=2, head_dim=8, inner=72)
    assert Layer.random(odd).fused() is None
    narrow = cpu_layer.LayerSizes(hidden=48, num_heads=4, num_kv_heads=2, head_dim=4, inner=80)
    assert Layer.random(narrow).fused() is None
    dense = (*layer.matrices[:3], torch.zeros(48, 80))
    assert Layer(SIZES, layer.norms, dense).fused() is None
    assert Layer(SIZES, (layer.norms[0], layer.norms[1].bfloat16()), layer.matrices).fused() is None


def test_rows_that_do_not_match_are_refused() -> None:
    fused = Layer.random(SIZES).fused()
    assert fused is not None
    rotation = torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)
    part = Part(1, 2, (slice(0, 5),), None)
    rows = cpu_layer.LayerRows(SIZES, rotation, slice(3, 5), [part], NUM_SLOTS)
    pool = torch.zeros(2, NUM_SLOTS, 8)
    with pytest.raises(AssertionError):
        fused(torch.zeros(3, 48), (pool, pool), rows)
    with pytest.raises(AssertionError):
        fused(torch.zeros(2, 48), (pool[:, 1:], pool), rows)
    with pytest.raises(AssertionError, match="rows"):
        cpu_layer.LayerRows(SIZES, rotation, slice(3, 5), [part, part], NUM_SLOTS)
    for write in (slice(3, 6), slice(NUM_SLOTS - 1, NUM_SLOTS + 1), torch.tensor([3])):
        with pytest.raises(AssertionError, match="slot"):
            cpu_layer.LayerRows(SIZES, rotation, write, [part], NUM_SLOTS)
    with pytest.raises(AssertionError, match="mask"):
        cpu_layer.LayerRows(
            SIZES, rotation, slice(3, 5), [Part(1, 2, (slice(0, 5),), torch.zeros(2, 1, 5))], NUM_SLOTS
        )
    with pytest.raises(AssertionError, match="rotation"):
        cpu_layer.LayerRows(SIZES, (rotation[0], rotation[1][:1]), slice(3, 5), [part], NUM_SLOTS)


def test_matrices_of_another_layer_are_refused() -> None:
    layer = Layer.random(SIZES)
    wide = Layer.random(cpu_layer.LayerSizes(hidden=48, num_heads=6, num_kv_heads=2, head_dim=8, inner=96))
    with pytest.raises(AssertionError):
        Layer(SIZES, layer.norms, (*layer.matrices[:2], *wide.matrices[2:])).fused()
    with pytest.raises(AssertionError):
        Layer(SIZES, (layer.norms[0], torch.ones(64)), layer.matrices).fused()
