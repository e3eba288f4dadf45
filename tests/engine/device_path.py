"""Mistral Small 4 as it runs on a GPU, here in Triton's interpreter: every registered kernel and every plan
for devices, against the same model on a CPU. Run by ``test_device_path`` in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Mistral4Config
from engine.core import NO_CHOICE, Batch, DraftTree, SamplingParams, Scores
from engine.models import decoder
from engine.nn import linear
from engine.nn.weight import Weight
from engine.rows import BatchRows, _padded_rows, _prompt_rows
from engine.sampler import Sampler
from kernels import device, ref
from tests.engine.mistral_rig import is_matrix, tiny_mistral4, to_fp8, to_nvfp4
from tests.engine.rig import prompts_of, slots_of_pages
from tests.engine.test_mistral4 import Sheet, pages_for
from tests.engine.test_sampler import batch_of
from tests.kernels.test_attention import random_tree

# As small as the kernels for GPUs take: rows in multiples of 16, widths in multiples of 32.
SIZES = {
    "vocab_size": 96,
    "num_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_layers": 1,
    "routed_scaling_factor": 1.5,
}
KINDS = ("plain", "fp8", "nvfp4")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors of the host count as a GPU's meanwhile. Returns the kernels that were called, in order."""
    called: list[str] = []
    load = device.registered

    def registered(name: str) -> Any:
        called.append(name)
        return load(name)

    def rows(batch: Batch, tree: DraftTree) -> BatchRows:
        return _padded_rows(batch, tree) if batch.prompt is None else _prompt_rows(batch, tree)

    monkeypatch.setattr(device, "on_gpu", lambda x: True)
    monkeypatch.setattr(device, "registered", registered)
    monkeypatch.setattr(decoder, "batch_rows", rows)
    monkeypatch.setattr(linear, "_packings", lambda *given: iter(()))  # of a CPU's weights alone
    return called


def model(kind: str, **overrides: Any) -> tuple[Mistral4Config, dict[str, Weight]]:
    """FP8 wherever the published files have it; NVFP4 in experts alone."""
    config, plain = tiny_mistral4(11, **(SIZES | overrides))
    generator = torch.Generator().manual_seed(11)
    weights: dict[str, Weight] = dict(plain)
    for name, tensor in plain.items():
        if kind == "fp8" and is_matrix(name):
            weights[name] = to_fp8(tensor)
        elif kind == "nvfp4" and "experts" in name:
            weights[name] = to_nvfp4(tensor, generator)
    return config, weights


TEXTS = prompts_of([9, 4], 3, SIZES["vocab_size"])
PAGES = [pages_for(8), [20, 11, 12, 9, 30, 31, 14, 15]]


def two_steps(config: Mistral4Config, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
    """Two prompts in one forward, then a tree of each; logits and features, and the rows they leave."""
    sheet = Sheet(config, weights)
    generator = torch.Generator().manual_seed(5)

    def seen(step: str, scores: Scores) -> Iterator[tuple[str, Tensor]]:
        yield f"{step} logits", scores.logits
        yield f"{step} features", scores.features

    chunks = [(text[:-1], 0, pages) for text, pages in zip(TEXTS, PAGES, strict=True)]
    yield from seen("prompt", sheet.prefill(chunks))
    trees = [
        ([text[-1], *prompts_of([4], row, 96)[0]], random_tree(5, generator), len(text) - 1, PAGES[row])
        for row, text in enumerate(TEXTS)
    ]
    yield from seen("tree", sheet.tree(trees))
    for row, text in enumerate(TEXTS):
        slots = slots_of_pages(PAGES[row], sheet.page_size, 0, len(text) + 4)
        yield f"rows {row}", sheet.target.pool.rows[:, :, :, slots]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_a_tree_step_equal_those_of_a_cpu(kind: str, request: pytest.FixtureRequest) -> None:
    config, weights = model(kind)
    expected = dict(two_steps(config, weights))
    called = request.getfixturevalue("on_device")
    found = dict(two_steps(config, weights))
    for name, truth in expected.items():
        torch.testing.assert_close(found[name], truth, atol=1e-4, rtol=1e-4, msg=f"{kind}: {name} differ")
    attention = ["linear", "linear", "rope_latent_write", "mla_tree_attention", "linear"]
    tree_step = [*attention, "route", "gate_up", "down", "rms_norm", "linear"]
    assert called[-len(tree_step) :] == tree_step


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.6, "top_k": 40}], ids=str)
def test_choices_are_those_of_a_cpu(
    filters: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A greedy request, one without filters and one with them, a row without a choice; nobody sorts in vain."""
    params = [
        SamplingParams(temperature=heat, seed=seed, **(filters if seed else {}))
        for seed, heat in enumerate((0.0, 0.7, 1.3))
    ]
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(3, 4, 96, generator=generator)
    logits[1, 2, 7] = float("nan")
    positions = torch.randint(0, 9999, (3, 4), generator=generator)
    scores, batch = Scores(logits, positions, logits[..., :0]), batch_of(params)
    expected = Sampler().choose(scores, batch)
    assert int((expected == NO_CHOICE).sum()) == 1
    called = request.getfixturevalue("on_device")
    if "top_p" not in filters:
        monkeypatch.delattr(ref, "nucleus_floors")
    assert torch.equal(Sampler().choose(scores, batch), expected)
    assert called == ["choose"]
