"""Dummies by name: what the published files hold, byte for byte, and engines that run on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.build import build_engine
from engine.checkpoint.mistral_tables import expected_weights
from engine.checkpoint.published import PUBLISHED, Quantised, published_head, published_target, with_layers
from engine.checkpoint.synthetic_config import SMALL_4, head_config
from engine.config import EngineConfig
from engine.core import SamplingParams, Speculation
from engine.errors import ConfigError
from engine.memory import plan_bytes
from tests.engine.rig import assert_idle


@pytest.mark.parametrize(("kind", "gigabytes"), [("fp8", 120.05), ("nvfp4", 69.94)])
def test_the_published_size(kind: Quantised, gigabytes: float) -> None:
    """What the files hold without vision, and in NVFP4 without the scales of inputs."""
    target = published_target("mistral-small-4", kind)
    assert target.config == SMALL_4
    assert plan_bytes(target.plan, 2) / 1e9 == pytest.approx(gigabytes, abs=0.02)
    kinds = {name.split(".", 2)[-1]: planned.kind for name, planned in target.plan.weights.items()}
    assert kinds["experts.w1"] == kinds["shared_experts.w2.weight"] == kind
    assert kinds["attention.wo.weight"] == ("fp8" if kind == "fp8" else "plain")
    assert kinds["gate.weight"] == target.plan.weights["output.weight"].kind == "plain"


def test_the_published_head() -> None:
    """0.39 GB, as published: no embedding and no output of its own."""
    head = published_head("mistral-small-4")
    assert head.config == head_config(SMALL_4)
    assert plan_bytes(head.plan, 2) / 1e9 == pytest.approx(0.392, abs=0.002)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_fewer_layers_are_the_first_ones(num_layers: int) -> None:
    full = published_target("mistral-small-4", "nvfp4")
    cut = with_layers(full, num_layers)
    assert cut.config == dataclasses.replace(SMALL_4, num_layers=num_layers)
    assert {name: planned.expected for name, planned in cut.plan.weights.items()} == expected_weights(
        cut.config
    )
    assert len(full.plan.weights) > len(cut.plan.weights)


@pytest.mark.parametrize("num_layers", [0, 37])
def test_layers_that_are_not_there(num_layers: int) -> None:
    with pytest.raises(ConfigError, match=f"has 36 layers, found {num_layers} asked for, expected 1 to 36"):
        with_layers(published_target("mistral-small-4"), num_layers)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_named_pair_runs(kind: Quantised) -> None:
    name = "mistral-small-4-tiny"
    config = EngineConfig(
        max_model_len=64,
        page_size=4,
        kv_cache_memory=4 << 20,
        speculation=Speculation(4, 3, 1),
        planned=False,
    )
    target = with_layers(published_target(name, kind), 1)
    engine = build_engine(target, (), published_head(name), config)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (done,) = engine.generate([list(range(5))], [params])
    assert len(done.token_ids) == 6
    assert done.num_draft_tokens > 0
    assert_idle(engine)
    assert PUBLISHED[name].num_layers == 2
    assert torch.isfinite(engine.target.logits(torch.ones(1, PUBLISHED[name].hidden_size))).all()
