"""The networks of the heads, run without an engine: rows of a pool against rows computed at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draft.eagle import EagleModel
from draft.eagle3 import Eagle3Model
from engine.config import POST_NORM
from engine.rows import Part, RowPlan
from tests.engine.rig import FEATURE_LAYERS, copies, random_model
from tests.engine.state import eagle_rows
from tests.oracles import eagle3

TOKENS = [4, 90, 17, 3, 3, 55]


def causal_plan(count: int) -> RowPlan:
    """Row i of the list lies in slot i + 1."""
    bias = torch.full((1, count, count), float("-inf")).triu(1)
    return RowPlan(slice(1, 1 + count), (Part(1, count, torch.arange(1, 1 + count)[None], bias),))


def test_the_eagle_3_network() -> None:
    model = random_model(3)
    embedding = model.weights["model.embed_tokens.weight"]
    features = torch.randn(len(TOKENS), 3 * model.config.hidden_size)
    weights = {name: tensor for name, tensor in copies(model.eagle3).items() if name != "t2d"}
    head = Eagle3Model(model.eagle3_config, weights, embedding, FEATURE_LAYERS, 20)
    count = len(TOKENS)
    out = head.extend(torch.tensor(TOKENS), features, torch.arange(count), causal_plan(count))
    truth = eagle3.true_rows(model.eagle3_config, model.eagle3, embedding, [0, *TOKENS], features)
    torch.testing.assert_close(out, truth.hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.logits(out), truth.logits, atol=1e-4, rtol=1e-4)
    keys, values = head.pool.layer(0)
    torch.testing.assert_close(keys[:, 1 : 1 + count].transpose(0, 1), truth.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values[:, 1 : 1 + count].transpose(0, 1), truth.values, atol=1e-4, rtol=1e-4)
    assert head.logits(out).shape[-1] == len(head.token_ids) == 61


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": True}, {"bias": True, "input_norm": True}, {"eagle_layers": 3}],
    ids=["bare", "norm", "bias", "layers"],
)
def test_the_eagle_1_network(options: dict[str, Any]) -> None:
    model = random_model(3, **options)
    features = torch.randn(len(TOKENS), model.config.hidden_size)
    lm_head = model.weights["lm_head.weight"]
    head = EagleModel(
        model.eagle_config,
        copies(model.eagle),
        model.weights["model.embed_tokens.weight"],
        lambda hidden: hidden @ lm_head.T,
        20,
    )
    count = len(TOKENS)
    assert head.feature_layers == (POST_NORM,)
    out = head.extend(torch.tensor(TOKENS), features, torch.arange(count), causal_plan(count))
    truth, keys, _ = eagle_rows(model.eagle_config, model.eagle, model, TOKENS, features)
    torch.testing.assert_close(out, truth.hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.logits(out), truth.logits, atol=1e-4, rtol=1e-4)
    for layer, expected in enumerate(keys):
        held = head.pool.layer(layer)[0][:, 1 : 1 + count].transpose(0, 1)
        torch.testing.assert_close(held, expected, atol=1e-4, rtol=1e-4)
