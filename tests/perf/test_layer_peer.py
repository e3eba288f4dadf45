"""The peer of a layer: what is compared, and what is said where there is nothing to compare with."""

from __future__ import annotations

from typing import Any

import pytest

from engine.checkpoint.published import published_target
from engine.config import EngineConfig
from perf.layer_peer import layers_that_fit, per_layer

NAME = "mistral-small-4-tiny"


def row(
    nodes: int, verify_ms: float, batch: int = 1, context: int = 40, routing: str = "uniform"
) -> dict[str, Any]:
    return {"nodes": nodes, "verify_ms": verify_ms, "batch": batch, "context": context, "routing": routing}


def test_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    rows = [row(1, 8.0), row(4, 9.0)]
    others = [row(2, 1.0, batch=2), row(2, 1.0, context=70), row(2, 1.0, routing="alike")]
    before, found = per_layer(published_target(NAME), EngineConfig(), rows + others)
    assert found["ours"] == {1: 4.0, 4: 4.5}
    assert found["eager"].keys() == {1, 4}
    assert before == found | {"compiled": "not yet"}
    assert found["compiled"] == "on a GPU only"
    monkeypatch.setattr("perf.layer_peer._CLASS", "Mistral99Model")
    (found,) = per_layer(published_target(NAME), EngineConfig(), rows)
    assert "has no attribute Mistral99Model" in found["missing"]
    monkeypatch.setattr("perf.layer_peer._MODULE", "transformers.models.mistral99")
    (found,) = per_layer(published_target(NAME), EngineConfig(), rows)
    assert "No module named" in found["missing"]


def test_layers_of_the_peer_that_fit() -> None:
    """6.55 GB a layer in bfloat16."""
    config = published_target("mistral-small-4").config
    assert layers_that_fit(config, 10_000_000_000) == 1
    assert layers_that_fit(config, 30_000_000_000) == 3
    assert layers_that_fit(config, 1 << 40) == 5
