"""Parts of Mistral Small 4: rotations and their golden values, both forms of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.mla
from engine.config import Mistral4Config, YarnScaling
from engine.core import Batch, Verdict
from engine.kvcache import LatentPool, compact
from engine.nn.mla import most_absorbed, softmax_scale
from engine.nn.rope import PairRope, yarn_frequencies
from engine.sampler import sampling_tensors
from kernels.mla import absorb_queries, expand_values, mla_prompt_attention, mla_tree_attention, rope_pairs
from tests.engine.mistral_rig import YARN, sequence
from tests.kernels.test_attention import bias_of, random_tree
from tests.oracles import mistral4 as oracle
from tests.oracles.attention import tree_attention

SMALL_4 = Mistral4Config(
    vocab_size=131072,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    q_lora_rank=1024,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=1048576,
    yarn=YarnScaling(128.0, 8192),
    llama_4_beta=0.1,
    llama_4_original_positions=8192,
)


# --- rotations


def test_yarn_golden_values() -> None:
    """Lanes 0 to 12 unchanged, 25 to 31 divided by the factor, blended between; bit for bit."""
    lanes = yarn_frequencies(64, 10000.0, SMALL_4.yarn)
    golden = {
        0: "0x1.0p+0",
        1: "0x1.7ff222p-1",
        12: "0x1.030dc6p-5",
        13: "0x1.66df6cp-6",
        18: "0x1.8f8aecp-9",
        24: "0x1.60e2dap-14",
        25: "0x1.892918p-18",
        31: "0x1.17a8e4p-20",
    }
    assert {lane: float(lanes[lane]) for lane in golden} == {k: float.fromhex(v) for k, v in golden.items()}
    plain = yarn_frequencies(64, 10000.0, None)
    assert torch.equal(lanes[:13], plain[:13])
    assert torch.equal(lanes[25:], plain[25:] / 128)
    assert bool((lanes[13:25] < plain[13:25]).all())
    assert bool((lanes[13:25] > plain[13:25] / 128).all())


@pytest.mark.parametrize(
    "yarn",
    [YARN, YarnScaling(4.0, 64), YarnScaling(16.0, 1000, 8.0, 2.0), YarnScaling(4.0, 8), None],
    ids=["tests", "clamped-low", "other-betas", "both-ends-on-one-pair", "none"],
)
def test_yarn_equals_the_oracle(yarn: YarnScaling | None) -> None:
    config = dataclasses.replace(SMALL_4, yarn=yarn, qk_rope_head_dim=16)
    truth = [oracle.frequency(config, pair) for pair in range(8)]
    torch.testing.assert_close(yarn_frequencies(16, 10000.0, yarn), torch.tensor(truth))


def test_llama_4_golden_values() -> None:
    golden = {
        0: 1.0,
        8191: 1.0,
        8192: 1.06931471824646,
        100000: 1.2564949989318848,
        1048575: 1.4852030277252197,
    }
    rotation = PairRope(SMALL_4, "cpu")(torch.tensor([list(golden)]))
    assert rotation.query_scale is not None
    assert rotation.query_scale.shape == (1, 5, 1, 1)
    assert rotation.query_scale.flatten().tolist() == list(golden.values())
    off = PairRope(dataclasses.replace(SMALL_4, llama_4_beta=0.0), "cpu")
    assert off(torch.tensor([[100000]])).query_scale is None


def test_pairs_are_rotated() -> None:
    """Components 2i and 2i + 1 as a complex number, far positions included, whatever the input's dtype."""
    config = dataclasses.replace(SMALL_4, qk_rope_head_dim=8, yarn=YARN)
    positions = torch.tensor([[0, 1, 15], [16, 200, 3]])
    x = torch.randn(2, 3, 2, 8)
    rotation = PairRope(config, "cpu")(positions)
    turned = rope_pairs(x, rotation.cos, rotation.sin)
    for seq in range(2):
        for node in range(3):
            for head in range(2):
                truth = oracle.turned(config, x[seq, node, head][None], [int(positions[seq, node])])[0]
                torch.testing.assert_close(turned[seq, node, head], truth, atol=2e-5, rtol=1e-5)
    assert rope_pairs(x.bfloat16(), rotation.cos, rotation.sin).dtype == torch.float32


def test_softmax_scale_and_the_disputed_switch() -> None:
    assert softmax_scale(SMALL_4) == 0.08838834764831845
    with_mscale = softmax_scale(dataclasses.replace(SMALL_4, softmax_mscale=True))
    assert with_mscale == pytest.approx(0.194969494733, rel=1e-9)


# --- attention


def test_when_expanding_pays() -> None:
    assert most_absorbed(SMALL_4) == 153
    wide_values = dataclasses.replace(SMALL_4, v_head_dim=512)
    assert most_absorbed(wide_values) > 10**6, "the latent is narrower than keys and values"


class Rows:
    """Random queries, latents and maps, read by three sequences with different numbers of committed rows."""

    def __init__(self, num_nodes: int, in_place: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        heads, content, rotated, rank, value = 3, 5, 4, 12, 7
        self.rank, self.pasts = rank, [7, 0, 3]
        length = max(self.pasts) + num_nodes
        self.pool = random(3 * length + 40, rank + rotated)
        self.q = random(3, num_nodes, heads, content + rotated)
        self.key_up, self.value_up = random(heads, content, rank) / 4, random(heads, value, rank) / 4
        self.slots: Tensor | tuple[slice, ...]
        if in_place:
            self.rows = torch.stack([torch.arange(4 + 9 * i, 4 + 9 * i + length) for i in range(3)])
            starts = self.rows[:, 0].tolist()
            self.slots = tuple(slice(s, s + p + num_nodes) for s, p in zip(starts, self.pasts, strict=True))
        else:
            self.slots = self.rows = torch.stack(
                [torch.randperm(len(self.pool), generator=generator)[:length] for _ in self.pasts]
            )
        padding = 2 if num_nodes > 4 else 0
        self.parents = [random_tree(num_nodes, generator, padding) for _ in self.pasts]
        self.bias = torch.stack(
            [bias_of(tree, past, length) for tree, past in zip(self.parents, self.pasts, strict=True)]
        )

    def truth(self, seq: int, scale: float) -> Tensor:
        """[N, H, V] float64: keys and values of every head written out, one node at a time."""
        past, rows = self.pasts[seq], self.pool[self.rows[seq]].double()
        latent, rotated = rows[:, : self.rank], rows[:, self.rank :]
        keys = torch.stack([torch.cat([latent @ up.double().T, rotated], 1) for up in self.key_up], 1)
        values = torch.stack([latent @ up.double().T for up in self.value_up], 1)
        nodes = slice(past, past + self.q.shape[1])
        return tree_attention(
            self.q[seq], keys[:past], values[:past], keys[nodes], values[nodes], self.parents[seq], scale
        )


def absorbed(rows: Rows, bias: Tensor | None, scale: float) -> Tensor:
    q = absorb_queries(rows.q, rows.key_up)
    latents = mla_tree_attention(q, rows.pool, rows.slots, bias, scale, rows.rank)
    return expand_values(latents, rows.value_up)


def unabsorbed(rows: Rows, bias: Tensor | None, scale: float) -> Tensor:
    return mla_prompt_attention(rows.q, rows.pool, rows.key_up, rows.value_up, rows.slots, bias, scale)


@pytest.mark.parametrize("form", [absorbed, unabsorbed])
@pytest.mark.parametrize("num_nodes", [1, 6, 33])
@pytest.mark.parametrize("in_place", [True, False], ids=["slices", "slots"])
def test_both_forms_equal_a_loop(form: Any, num_nodes: int, in_place: bool) -> None:
    rows = Rows(num_nodes, in_place)
    got = form(rows, rows.bias, 0.4)
    assert got.shape == (3, num_nodes, 3, 7)
    for seq in range(3):
        torch.testing.assert_close(got[seq].double(), rows.truth(seq, 0.4), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("in_place", [True, False], ids=["slices", "slots"])
def test_no_bias_means_all_is_visible(in_place: bool) -> None:
    rows = Rows(5, in_place)
    nothing = torch.zeros_like(rows.bias)
    for form in (absorbed, unabsorbed):
        torch.testing.assert_close(form(rows, None, 0.4), form(rows, nothing, 0.4))
    torch.testing.assert_close(absorbed(rows, None, 0.4), unabsorbed(rows, None, 0.4))


def test_expanding_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(6, False)
    whole = unabsorbed(rows, rows.bias, 0.4)
    for limit in (1, 2 * rows.rows.shape[1] * 16):
        monkeypatch.setattr(kernels.mla, "_EXPANDED", limit)
        torch.testing.assert_close(unabsorbed(rows, rows.bias, 0.4), whole)


def test_accepted_latents_move_to_the_front() -> None:
    pool = LatentPool(3, 5, 40, torch.float32, "cpu")
    pool.rows.copy_(torch.randn(pool.rows.shape))
    before = pool.rows.clone()
    seqs = (sequence(0, 5, [7, 2]), sequence(1, 2, [1, 4]))
    batch = Batch(
        seqs,
        torch.tensor([5, 2]),
        torch.tensor([[7, 2], [1, 4]]),
        4,
        sampling_tensors([seq.request.sampling for seq in seqs], "cpu"),
        (),
    )
    path = torch.tensor([[0, 2, -1], [0, 1, 2]])
    compact(pool, batch, Verdict(path, torch.tensor([2, 3]), torch.tensor([0, 0])))
    expected = before.clone()
    expected[:, :, :, 10] = before[:, :, :, 11]  # row 7 of the first, slot 11, to row 6
    assert torch.equal(pool.rows, expected)
    assert LatentPool.bytes_per_slot(3, 5, torch.float32) * 40 == pool.rows.numel() * 4
    pool.layer(1)[7] = 0.5
    assert bool((pool.rows[1, 0, 0, 7] == 0.5).all()), "a layer is a view"
    assert LatentPool.bytes_per_slot(36, SMALL_4.latent_dim, torch.bfloat16) == 23040
