"""A host that passes for a GPU: what is decided by where tensors lie goes the way of a device.

Kernels are Triton's in its interpreter (``device_path``), or their references, which takes no time
(``test_device_path``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Mistral4Config
from engine.core import Batch, DraftTree, Scores
from engine.models import decoder
from engine.nn import linear
from engine.nn.weight import Weight
from engine.rows import BatchRows, _padded_rows, _prompt_rows
from kernels import device
from kernels.ops import OPERATIONS
from tests.engine.mistral_rig import is_matrix, tiny_mistral4, to_fp8, to_nvfp4
from tests.engine.rig import prompts_of, slots_of_pages
from tests.engine.test_mistral4 import Sheet, pages_for
from tests.kernels.test_attention import random_tree

# As small as the kernels for GPUs take: rows in multiples of 16, widths in multiples of 32.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "num_layers": 1,
    "num_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
TEXTS = prompts_of([6, 3], 3, SIZES["vocab_size"])
PAGES = [pages_for(8), [20, 11, 12, 9, 30, 31, 14, 15]]
NUM_NODES = 4

Load = Callable[[str], Callable[..., Any]]


def reference(name: str) -> Callable[..., Any]:
    """What an operation means, in plain torch."""
    return next(operation.reference for operation in OPERATIONS if operation.name == name)


def pretend(monkeypatch: pytest.MonkeyPatch, load: Load) -> list[str]:
    """From now on the host is a GPU, whose kernels are what ``load`` says. Returns the list of kernels that
    are called from now on, in order."""
    called: list[str] = []

    def registered(name: str) -> Callable[..., Any]:
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


def two_steps(
    config: Mistral4Config, weights: Mapping[str, Weight], kv_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Two prompts in one forward, then a tree of each: logits, features, and the rows they leave."""
    sheet = Sheet(config, weights, kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(5)

    def seen(step: str, scores: Scores) -> Iterator[tuple[str, Tensor]]:
        yield f"{step} logits", scores.logits
        yield f"{step} features", scores.features

    found: dict[str, Tensor] = {}
    chunks = [(text[:-1], 0, pages) for text, pages in zip(TEXTS, PAGES, strict=True)]
    found |= seen("prompt", sheet.prefill(chunks))
    trees = []
    for row, text in enumerate(TEXTS):
        tokens = [text[-1], *prompts_of([NUM_NODES - 1], row, config.vocab_size)[0]]
        trees.append((tokens, random_tree(NUM_NODES, generator), len(text) - 1, PAGES[row]))
    found |= seen("tree", sheet.tree(trees))
    for row, text in enumerate(TEXTS):
        slots = slots_of_pages(PAGES[row], sheet.page_size, 0, len(text) - 1 + NUM_NODES)
        found[f"rows {row}"] = sheet.target.pool.rows.view(torch.uint8)[:, :, :, slots].view(
            sheet.target.pool.rows.dtype
        )
    return found
