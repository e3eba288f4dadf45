"""The road of a device, walked on a host: see ``device_rig``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.models.llama import Llama
from kernels.products import FEW
from tests.conftest import tiny_llama
from tests.engine import test_llama as llama
from tests.engine.device_rig import model, pretend, reference, two_steps
from tests.engine.rig import prompts_of
from tests.engine.test_mistral4 import Sheet, pages_for
from tests.kernels.test_products import interpreted

FP8 = torch.float8_e4m3fn
LAYER = (
    *("linear", "linear", "rope_latent_write", "absorb_queries", "mla_tree_attention", "expand_values"),
    *("linear", "route", "gate_up", "down"),
)


def test_in_the_interpreter() -> None:
    interpreted("tests/engine/device_path.py")


@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4"])
def test_a_tree_step_is_these_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = model(kind, num_layers=2)
    called = pretend(monkeypatch, reference)
    two_steps(config, weights)
    tree_step = [*LAYER * 2, "rms_norm", "linear"]
    assert called[-len(tree_step) :] == tree_step


def test_a_chunk_of_many_tokens_equals_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past what the kernels for few tokens take, linear layers and the routing are torch's."""
    config, weights = model("fp8")
    tokens = prompts_of([FEW + 6], 4, config.vocab_size)[0]
    chunk = [(tokens, 0, pages_for(20))]
    expected = Sheet(config, weights).prefill(chunk)
    called = pretend(monkeypatch, reference)
    found = Sheet(config, weights).prefill(chunk)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=1e-4)
    norms = ["rms_norm"] * 2
    layer = [*norms, "rope_latent_write", "mla_tree_attention", "gate_up", "down"]
    assert called == [*layer, "rms_norm", "linear"], "the last row alone is scored"


@pytest.mark.parametrize("kv_dtype", [None, FP8])
def test_a_llama(kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two prompts, of which one goes on in a second forward."""
    config, weights = tiny_llama(3, vocab_size=96, hidden_size=32, intermediate_size=64)
    prompts = prompts_of([9, 7], 2, config.vocab_size)

    def logits(rows: torch.dtype | None) -> Tensor:
        target = Llama(config, dict(weights), 256, kv_dtype=rows)
        sheet = llama.Sheet(config, weights)
        sheet.target = target
        sheet.prefill([(prompts[0][:5], 0, pages_for(4)), (prompts[1][:2], 0, [9, 7, 30, 12])])
        rest = [(prompts[0][5:], 5, pages_for(4)), (prompts[1][2:], 2, [9, 7, 30, 12])]
        return sheet.prefill(rest).logits

    expected = logits(None)
    called = pretend(monkeypatch, reference)
    found = logits(kv_dtype)
    if kv_dtype is None:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert 0 < float((found - expected).abs().mean()) < 0.1 * float(expected.std())
    attention = ["linear", "rope_write", *["mha_tree_attention"] * 2, "linear"]
    layer = [*attention, "linear", "silu_mul", "linear"]
    assert called == [*layer * config.num_layers, "rms_norm", "linear"] * 2


def test_rows_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded as they are written, and only that changes."""

    def rounding(name: str) -> Callable[..., Any]:
        def write(*arguments: Any) -> Tensor:
            queries: Tensor = reference(name)(*arguments)
            pool = arguments[7]
            pool.copy_(pool.to(FP8))
            return queries

        return write if name == "rope_latent_write" else reference(name)

    config, weights = model("plain")
    pretend(monkeypatch, reference)
    exact, narrow = two_steps(config, weights), two_steps(config, weights, FP8)
    pretend(monkeypatch, rounding)
    wide = two_steps(config, weights)
    for name, found in narrow.items():
        assert found.dtype == (FP8 if name.startswith("rows") else torch.float32)
        torch.testing.assert_close(found.float(), wide[name], atol=1e-5, rtol=1e-5)
    assert float((narrow["tree logits"] - exact["tree logits"]).abs().max()) > 1e-3, "nothing was rounded"


def test_rows_in_fp8_are_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is float8_e4m3fn on cpu, expected a CUDA device"):
        EngineConfig(kv_cache_dtype=FP8)
