"""A head's level in two calls against the same operations one by one: bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import FusedHead, LayerSizes, cpu, cpu_layer, fused_head, fused_layer, ref
from kernels import dispatch as ops

pytestmark = pytest.mark.skipif(
    cpu.panel_kernels() is None, reason="no C compiler with OpenMP, or no float16"
)

EPS, NUM_SLOTS, NUM_TOKENS, NUM_POSITIONS, VOCAB, NUM_FEATURES = 1e-5, 60, 90, 50, 64, 72
SIZES = LayerSizes(hidden=48, num_heads=6, num_kv_heads=2, head_dim=8, inner=80)


@dataclass(frozen=True)
class Part:
    num_seqs: int
    num_nodes: int
    read: Tensor | tuple[slice, ...]
    bias: Tensor | None


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Parts:
    """What a head is made of."""

    layer: cpu_layer.FusedLayer
    norms: tuple[Tensor, Tensor, Tensor]
    embedding: Tensor
    rotation: tuple[Tensor, Tensor]
    fc: object
    logits: object
    token_ids: Tensor

    def fused(self) -> FusedHead | None:
        return fused_head(
            self.layer, self.norms, self.embedding, self.rotation, self.fc, self.logits, self.token_ids, EPS
        )


def parts_of_a_head(given: int = 2 * SIZES.hidden, vocab: int = VOCAB) -> Parts:
    heads = SIZES.num_heads * SIZES.head_dim
    shapes = [(heads + 2 * SIZES.num_kv_heads * SIZES.head_dim, given), (SIZES.hidden, heads)]
    shapes += [(2 * SIZES.inner, SIZES.hidden), (SIZES.hidden, SIZES.inner)]
    shapes += [(SIZES.hidden, NUM_FEATURES), (vocab, SIZES.hidden)]
    *matrices, fc, logits = [
        ops.pack_bytes(normal(*shape, seed=seed) * shape[1] ** -0.5) for seed, shape in enumerate(shapes)
    ]
    norms = [1 + 0.3 * normal(SIZES.hidden, seed=10 + i) for i in range(4)]
    layer = fused_layer((None, norms[3]), matrices, SIZES, EPS, SIZES.head_dim**-0.5)
    assert layer is not None
    rotation = normal(NUM_POSITIONS, SIZES.head_dim, seed=20), normal(NUM_POSITIONS, SIZES.head_dim, seed=21)
    token_ids = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(1))[:vocab]
    embedding = normal(NUM_TOKENS, SIZES.hidden, seed=22)
    return Parts(layer, (norms[0], norms[1], norms[2]), embedding, rotation, fc, logits, token_ids)


@settings(max_examples=40, deadline=None)
@given(
    num_nodes=st.integers(1, 9),
    before=st.integers(0, 30),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
    is_target=st.booleans(),
)
def test_a_level_is_its_operations(
    num_nodes: int, before: int, threads: int, seed: int, is_target: bool
) -> None:
    parts, generator = parts_of_a_head(), torch.Generator().manual_seed(seed)
    head = parts.fused()
    assert head is not None
    tokens = torch.randint(NUM_TOKENS, (num_nodes,), generator=generator)
    positions = torch.randint(NUM_POSITIONS, (num_nodes,), generator=generator)
    feature = normal(num_nodes, NUM_FEATURES if is_target else SIZES.hidden, seed=seed)
    seen = torch.rand(1, num_nodes, before + num_nodes, generator=generator) < 0.7
    seen[..., 0] = True
    part = Part(1, num_nodes, (slice(3, 3 + before + num_nodes),), torch.where(seen, 0.0, float("-inf")))
    write = slice(3 + before, 3 + before + num_nodes)
    pool = normal(2, SIZES.num_kv_heads, NUM_SLOTS, SIZES.head_dim, seed=30)
    own_pool = pool.clone()
    torch.set_num_threads(threads)

    rows = ops.layer_rows(parts.layer, None, write, [part], (own_pool[0], own_pool[1]))
    assert rows is not None
    found = head.forward(tokens, feature, positions, rows, (own_pool[0], own_pool[1]), is_target=is_target)
    offered, shares = head.offers(found, 5)

    if is_target:
        assert isinstance(parts.fc, cpu.PanelMatrix)
        feature = ops.panel_linear(feature, parts.fc)
    normed = ops.rms_norm(parts.embedding[tokens], parts.norms[0], EPS)
    side_by_side = torch.cat((normed, ops.rms_norm(feature, parts.norms[1], EPS)), dim=-1)
    rotation = parts.rotation[0][positions, None], parts.rotation[1][positions, None]
    rows = ops.layer_rows(parts.layer, rotation, write, [part], (pool[0], pool[1]))
    assert rows is not None
    expected = parts.layer(feature, (pool[0], pool[1]), rows, side_by_side)
    assert torch.equal(found, expected)
    assert torch.equal(own_pool, pool)
    assert isinstance(parts.logits, cpu.PanelMatrix)
    logits = ops.panel_linear(ops.rms_norm(expected, parts.norms[2], EPS), parts.logits)
    values, columns, mass = ref.best(logits, 5)
    assert torch.equal(offered, parts.token_ids[columns])
    torch.testing.assert_close(shares, torch.exp(values - mass[..., None]), rtol=1e-5, atol=1e-7)


def test_what_is_not_a_number_is_offered_with_no_share() -> None:
    head = parts_of_a_head().fused()
    assert head is not None
    feature = normal(2, 3, SIZES.hidden, seed=1)
    feature[1, 2, 7] = float("nan")
    tokens, shares = head.offers(feature, 4)
    assert tokens.shape == shares.shape == (2, 3, 4)
    assert shares[1, 2].tolist() == [0.0] * 4
    assert (shares[0] > 0).all()
    assert ((tokens >= 0) & (tokens < NUM_TOKENS)).all()


def test_heads_that_are_not_made_so() -> None:
    whole = parts_of_a_head()
    assert whole.fused() is not None
    assert parts_of_a_head(given=SIZES.hidden).fused() is None
    assert parts_of_a_head(vocab=VOCAB - 3).fused() is None
    assert replace(whole, logits=torch.eye(VOCAB)).fused() is None
    assert replace(whole, fc=torch.eye(SIZES.hidden)).fused() is None
    assert replace(whole, embedding=whole.embedding.double()).fused() is None
    assert replace(whole, embedding=whole.embedding.T).fused() is None
    assert replace(whole, token_ids=whole.token_ids.int()).fused() is None
