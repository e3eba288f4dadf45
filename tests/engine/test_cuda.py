"""The same engine on a GPU, with the plain torch operations: equal tokens, equal to those of the host."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from draft.eagle3 import Eagle3Model
from draft.head import FeatureDraft
from draft.none import NoDraft
from engine.config import EngineConfig
from engine.core import SamplingParams
from engine.models.llama import Llama
from engine.pages import PagePool
from engine.roles import Draft
from engine.step import Engine
from tests.engine.rig import FEATURE_LAYERS, TREE, Model, copies, echo_model, prompts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def engine_on(device: str, model: Model, *, with_head: bool) -> Engine:
    config = EngineConfig(
        device=device, max_model_len=200, max_num_batched_tokens=16, page_size=4, speculation=TREE
    )
    on_device = {name: tensor.to(device) for name, tensor in copies(model.weights).items()}
    target = Llama(model.config, on_device, 480, FEATURE_LAYERS)
    draft: Draft = NoDraft()
    if with_head:
        weights = {name: t.to(device) for name, t in copies(model.eagle3).items() if name != "t2d"}
        shape = dataclasses.replace(model.eagle3_config)
        draft = FeatureDraft(Eagle3Model(shape, weights, target.embedding, FEATURE_LAYERS, 480), "eagle3")
    return Engine(config, target, draft, PagePool(120, 4), ())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_speculative_tokens_equal_plain_tokens_and_those_of_the_host(temperature: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model, prompts = echo_model(3), prompts_of([1, 9, 2, 21])
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=24) for i in range(len(prompts))]
    host = [c.token_ids for c in engine_on("cpu", model, with_head=False).generate(prompts, params)]
    plain = [c.token_ids for c in engine_on("cuda", model, with_head=False).generate(prompts, params)]
    fast = [c.token_ids for c in engine_on("cuda", model, with_head=True).generate(prompts, params)]
    assert plain == host
    assert fast == plain
