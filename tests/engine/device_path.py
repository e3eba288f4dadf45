"""Mistral Small 4 as it runs on a GPU, here in Triton's interpreter, against the same model on a CPU. Run by
``test_device_path`` in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.core import NO_CHOICE, SamplingParams, Scores
from engine.sampler import Sampler
from kernels import device, ref
from tests.engine.device_rig import model, pretend, two_steps
from tests.engine.test_sampler import batch_of


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_prompt_and_a_tree_step_equal_those_of_a_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = model(kind)
    expected = two_steps(config, weights)
    pretend(monkeypatch, device.registered)
    found = two_steps(config, weights)
    for name, truth in expected.items():
        torch.testing.assert_close(found[name], truth, atol=1e-4, rtol=1e-4, msg=f"{kind}: {name} differ")


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.6, "top_k": 40}], ids=str)
def test_choices_are_those_of_a_cpu(filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy request, one without filters and one with them, a row without a choice; where nobody has
    top_p, nothing is sorted."""
    params = [
        SamplingParams(temperature=heat, seed=seed, **(filters if seed == 2 else {}))
        for seed, heat in enumerate((0.0, 0.7, 1.3))
    ]
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(3, 4, 96, generator=generator)
    logits[1, 2, 7] = float("nan")
    positions = torch.randint(0, 9999, (3, 4), generator=generator)
    scores, batch = Scores(logits, positions, logits[..., :0]), batch_of(params)
    expected = Sampler().choose(scores, batch)
    assert int((expected == NO_CHOICE).sum()) == 1
    called = pretend(monkeypatch, device.registered)
    if "top_p" not in filters:
        monkeypatch.delattr(ref, "nucleus_floors")
    assert torch.equal(Sampler().choose(scores, batch), expected)
    assert called == ["choose"]
