"""The mixture of experts: its router, stacks of experts with shared ones behind, and what runs apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.models.mistral4 import Mistral4
from engine.nn.moe import MixtureOfExperts
from engine.nn.norm import Norm
from engine.nn.stack import split_experts, stack
from engine.nn.weight import Weight, dequantise
from kernels import Stored, route
from kernels.stored import product
from tests.engine.mistral_rig import owned, tiny_mistral4, to_fp8, to_nvfp4
from tests.engine.rig import prompts_of
from tests.engine.test_mistral4 import Sheet
from tests.oracles import mistral4 as oracle
from tests.oracles.llama import swiglu


def test_router_takes_the_best_and_the_lower_of_equals() -> None:
    config, weights = tiny_mistral4(3, num_experts_per_tok=3, routed_scaling_factor=2.5)
    gate = weights["layers.0.gate.weight"].clone()
    gate[6] = gate[1]
    gate[7] = gate[1]
    x = torch.cat((torch.randn(20, 32), 4 * gate[1:2]))  # the last row likes expert 1 best, and its equals
    ids, shares = route(x, gate, 3, 2.5)[:2]
    assert ids[-1].tolist() == [1, 6, 7]
    for row, expert_ids, weight in zip(x, ids.tolist(), shares, strict=True):
        truth = oracle.chosen_experts(config, gate, row)
        assert list(truth) == expert_ids
        torch.testing.assert_close(weight, torch.tensor(list(truth.values())))
    torch.testing.assert_close(shares.sum(-1), torch.full((21,), 2.5))


def test_router_decides_in_float32() -> None:
    """Two experts that bfloat16 logits cannot tell apart: 100 + 0.25 rounds to 100."""
    gate = torch.tensor([[100.0, 0.0], [100.0, 0.25]]).bfloat16()
    ids, shares = route(torch.ones(1, 2, dtype=torch.bfloat16), gate, 1)[:2]
    assert ids.tolist() == [[1]]
    assert shares.dtype == torch.float32
    assert int((torch.ones(1, 2).bfloat16() @ gate.T).argmax()) == 0, "the test is idle"


def as_kind(kind: str, weight: Tensor, generator: torch.Generator) -> Weight:
    if kind == "plain":
        return weight
    return to_fp8(weight) if kind == "fp8" else to_nvfp4(weight, generator)


def dense(weight: Stored) -> Tensor:
    """The matrices that a stack stands for, [E, out, in]."""
    return torch.stack([product(torch.eye(weight.shape[2]), weight[e]).T for e in range(weight.shape[0])])


@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4"])
def test_experts_stacked_with_shared_ones(kind: str) -> None:
    """The stacks are the matrices; the layer is the sum of its experts, and of the block of shared ones."""
    generator = torch.Generator().manual_seed(0)
    config, weights = tiny_mistral4(5, num_shared_experts=2, routed_scaling_factor=1.5)
    names = [f"layers.1.{part}" for part in ("experts.{}", "shared_experts.{}.weight")]
    routed, shared = (
        [as_kind(kind, weights[name.format(part)], generator) for part in ("w1", "w3", "w2")]
        for name in names
    )
    below, alone = split_experts(shared[0], shared[1], shared[2], 2)
    up, low = stack([routed[0], routed[1]], below), stack([routed[2]], alone)
    assert (up.kind, up.shape, low.shape) == (kind, (10, 32, 32), (10, 32, 16))
    wide, block = ([dequantise(weight, torch.float32) for weight in part] for part in (routed, shared))
    torch.testing.assert_close(dense(up)[:8], torch.cat(wide[:2], 1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dense(low)[:8], wide[2], atol=1e-6, rtol=1e-6)

    gate = weights["layers.1.gate.weight"]
    x, residual = (torch.randn(9, config.hidden_size, generator=generator) for _ in range(2))
    norm = Norm(weights["layers.1.ffn_norm.weight"], 1e-6)
    layer = MixtureOfExperts(gate, up, low, 2, 1.5)
    found = layer(x, norm, residual)
    for token, row in enumerate(norm(x)):
        truth = residual[token] + swiglu(row[None], *block)[0]
        for expert, share in oracle.chosen_experts(config, gate, row).items():
            truth = truth + share * swiglu(row[None], *(weight[expert] for weight in wide))[0]
        torch.testing.assert_close(found[token], truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x[3:4], norm, residual[3:4])[0], found[3], atol=1e-6, rtol=1e-6)


def test_a_shared_expert_of_another_kind_runs_apart() -> None:
    config, weights = tiny_mistral4(5)
    mixed: dict[str, Weight] = dict(weights)
    for name, weight in weights.items():
        if ".experts." in name:
            mixed[name] = to_fp8(weight)
    layer = Mistral4(config, owned(mixed), 8).layers[0].mlp
    assert isinstance(layer, MixtureOfExperts)
    assert layer.apart is not None
    assert (layer.num_shared, layer.gate_up.shape[0]) == (0, 8)
    tokens = prompts_of([20])[0]
    wide = {name: dequantise(weight, torch.float32) for name, weight in mixed.items()}
    seen = oracle.forward(config, wide, tokens).logits
    torch.testing.assert_close(Sheet(config, mixed).all_logits(tokens), seen, atol=1e-4, rtol=1e-4)


def test_a_single_weight_is_not_copied() -> None:
    weight = to_fp8(torch.randn(6, 32))
    assert stack([weight]).codes.data_ptr() == weight.codes.data_ptr()
