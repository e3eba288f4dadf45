"""The same engine on a GPU: equal tokens, with graphs and without, equal to those of the host; and where its
memory is once everything is captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draft.none import NoDraft
from engine.config import EngineConfig
from engine.core import SPECULATION_OFF, Request, SamplingParams
from engine.graphs import CudaDevice, Graphs
from engine.models.mistral4 import Mistral4
from engine.nn.weight import Fp8Weight, Weight
from engine.pages import PagePool
from engine.step import Engine
from kernels import can_be_dependent
from tests.engine import device_rig
from tests.engine.rig import CHAIN, PLAIN, TREE, Model, echo_model, make_engine, prompts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = prompts_of([1, 9, 2, 21])


@pytest.fixture(scope="module")
def echo() -> Model:
    return echo_model(3)


def engine_on_gpu(model: Model, draft: str, *, captured: bool, pdl: bool = False) -> Engine:
    torch.backends.cuda.matmul.allow_tf32 = False
    graphs = Graphs(CudaDevice("cuda") if captured else None, pdl)
    speculation = PLAIN if draft == "none" else TREE
    return make_engine(model, draft, speculation=speculation, device="cuda", graphs=graphs)


def params_of(temperature: float) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, seed=i, max_tokens=24) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("draft", ["none", "ngram", "eagle3", "eagle"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_are_those_of_the_host(echo: Model, draft: str, temperature: float, captured: bool) -> None:
    params = params_of(temperature)
    host = [c.token_ids for c in make_engine(echo, speculation=PLAIN).generate(PROMPTS, params)]
    engine = engine_on_gpu(echo, draft, captured=captured)
    for _ in range(2):  # at first everything is captured, then replayed
        assert [c.token_ids for c in engine.generate(PROMPTS, params)] == host
    assert bool(engine.graphs.keys) == captured


@pytest.mark.parametrize("draft", ["none", "eagle3", "eagle"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_dependent_launches_change_no_token(echo: Model, draft: str, temperature: float) -> None:
    if not can_be_dependent("cuda"):
        pytest.skip("needs a GPU of compute capability 9.0")
    params = params_of(temperature)
    host = [c.token_ids for c in make_engine(echo, speculation=PLAIN).generate(PROMPTS, params)]
    engine = engine_on_gpu(echo, draft, captured=True, pdl=True)
    for _ in range(3):
        assert [c.token_ids for c in engine.generate(PROMPTS, params)] == host


def mistral_on(device: str, kv_dtype: torch.dtype | None = None, graphs: Graphs | None = None) -> Engine:
    """Experts and attention in FP8, on a GPU all through its kernels."""
    shape, weights = device_rig.model("fp8", num_layers=2)
    on_device = {name: moved(weight, device) for name, weight in weights.items()}
    target = Mistral4(shape, on_device, 480, kv_dtype=kv_dtype)
    config = EngineConfig(
        device=device, kv_cache_dtype=kv_dtype, max_model_len=200, max_num_batched_tokens=96, page_size=4
    )
    return Engine(config, target, NoDraft(), PagePool(120, 4), (), graphs=graphs)


def moved(weight: Weight, device: str) -> Weight:
    if isinstance(weight, Tensor):
        return weight.to(device)
    assert isinstance(weight, Fp8Weight)
    return Fp8Weight(weight.codes.to(device), weight.scale.to(device))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mixture_of_experts_on_latents(temperature: float) -> None:
    """Prompts of more and of fewer tokens than the kernels for few tokens take. Rows in FP8 change tokens,
    and nothing else."""
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = prompts_of([3, 80, 1], 5, device_rig.SIZES["vocab_size"])
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=16) for i in range(len(prompts))]
    host = [done.token_ids for done in mistral_on("cpu").generate(prompts, params)]
    overlapping = Graphs(CudaDevice("cuda"), can_be_dependent("cuda"))
    for graphs in (Graphs(), Graphs(CudaDevice("cuda")), overlapping):
        found = mistral_on("cuda", graphs=graphs).generate(prompts, params)
        assert [done.token_ids for done in found] == host
    narrow = mistral_on("cuda", torch.float8_e4m3fn).generate(prompts, params)
    assert [len(done.token_ids) for done in narrow] == [16, 16, 16]


def test_one_sequence_after_another(echo: Model) -> None:
    """Batches of one, of growing contexts, in rows and pages that others have left."""
    params = params_of(0.7)
    engine = engine_on_gpu(echo, "eagle3", captured=True)
    for prompt, param in zip(PROMPTS * 2, params * 2, strict=True):
        host = make_engine(echo, speculation=CHAIN).generate([prompt], param)
        assert engine.generate([prompt], param)[0].token_ids == host[0].token_ids


@pytest.mark.parametrize("captured", [False, True])
def test_sequences_that_draft_unlike_amounts(echo: Model, captured: bool) -> None:
    """The padding of those that draft less reaches past their pages, wherever in a page they are."""
    params = params_of(0.7)
    host = [c.token_ids for c in make_engine(echo, speculation=PLAIN).generate(PROMPTS, params)]
    engine = engine_on_gpu(echo, "eagle3", captured=captured)
    for number, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        speculation = SPECULATION_OFF if number % 2 else None
        engine.add(Request(number, tuple(prompt), param, speculation))
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.token_ids
    assert [tuple(tokens) for tokens in found] == host


@pytest.mark.parametrize("draft", ["none", "eagle3"])
def test_the_steady_state_takes_no_memory_from_the_device(echo: Model, draft: str) -> None:
    """Once all is captured, tensors come from what torch has; it asks the device for nothing."""
    engine, params = engine_on_gpu(echo, draft, captured=True), params_of(0.0)
    num_graphs = -1
    while num_graphs < len(engine.graphs.keys):  # what the head learns may call for another tree
        num_graphs = len(engine.graphs.keys)
        engine.generate(PROMPTS, params)
    before = torch.cuda.memory_stats()
    engine.generate(PROMPTS, params)
    after = torch.cuda.memory_stats()
    assert len(engine.graphs.keys) == num_graphs
    for counter in ("segment.all.allocated", "num_device_alloc"):
        assert after.get(counter, 0) == before.get(counter, 0), counter
    assert engine.graphs.seconds > 0
