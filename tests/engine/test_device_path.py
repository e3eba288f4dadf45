"""The road of a device, walked on a host: see ``device_rig``."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.engine.device_rig import model, pretend, reference, two_steps
from tests.kernels.test_products import interpreted

FP8 = torch.float8_e4m3fn
LAYER = (
    *("linear", "linear", "rope_latent_write", "mla_tree_attention", "linear"),
    *("route", "gate_up", "down"),
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


def test_rows_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded as they are written, and only that changes; e4m3 has three bits behind the first."""
    config, weights = model("plain")
    pretend(monkeypatch, reference)
    wide, narrow = two_steps(config, weights), two_steps(config, weights, FP8)
    for row in ("rows 0", "rows 1"):
        assert narrow[row].dtype == FP8
        assert torch.equal(narrow[row].view(torch.uint8), wide[row].to(FP8).view(torch.uint8))
    for name in ("prompt logits", "tree logits"):
        difference = (narrow[name] - wide[name]).abs()
        assert 0 < float(difference.mean()) < 0.05 * float(wide[name].std())


def test_rows_in_fp8_are_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is float8_e4m3fn on cpu, expected a CUDA device"):
        EngineConfig(kv_cache_dtype=FP8)
