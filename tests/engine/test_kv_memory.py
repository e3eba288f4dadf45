"""How much of a GPU's memory the KV cache gets, decided before anything is loaded. No GPU is needed."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.build import DEFAULT_HEAD, open_head
from engine.checkpoint import open_model
from engine.checkpoint.native import MistralHead
from engine.checkpoint.synthetic import write_headers
from engine.checkpoint.synthetic_config import SMALL_4, SMALL_4_VISION, head_config
from engine.checkpoint.synthetic_tables import Layout
from engine.cli.footprint import head_footprint, target_footprint
from engine.config import EngineConfig
from engine.core import Speculation
from engine.errors import ConfigError
from engine.memory import (
    GPU_RESERVE,
    activation_bytes,
    graph_bytes,
    kv_budget,
    num_pages,
    out_of_memory,
    plan_bytes,
    weight_bytes,
    with_kv_memory,
)
from tests.checkpoint.files import write_hf
from tests.conftest import tiny_llama
from tests.engine.test_build_mistral import write_pair

GIB = 1 << 30
H200 = 143_771 << 20


@pytest.fixture(scope="module", params=["native-fp8", "native-nvfp4"])
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Layout, Path, Path]:
    """Headers of the full-size pair: (layout, target, head)."""
    layout: Layout = request.param
    root = tmp_path_factory.mktemp(layout)
    write_headers(root / "t", SMALL_4, layout, vision=SMALL_4_VISION, num_shards=7)
    return layout, root / "t", write_headers(root / "h", head_config(SMALL_4), "native-fp8")


def on_gpu(monkeypatch: pytest.MonkeyPatch, total: int, free: int | None = None) -> None:
    sizes = (total if free is None else free, total)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: sizes)


def test_a_budget() -> None:
    assert kv_budget(100 * GIB, 99 * GIB, 0.8, 50 * GIB, GIB) == 29 * GIB - GPU_RESERVE
    assert kv_budget(100 * GIB, 60 * GIB, 0.8, 50 * GIB, GIB) == 9 * GIB - GPU_RESERVE


@given(*[st.integers(0, 200 * GIB)] * 4, st.floats(0.01, 1.0))
def test_a_budget_never_promises_what_is_not_there(
    total: int, free: int, weights: int, activations: int, share: float
) -> None:
    budget = kv_budget(total, min(free, total), share, weights, activations)
    taken = budget + weights + activations + GPU_RESERVE
    assert taken <= share * total
    assert taken <= free


def test_nodes_of_prompt_lookup_have_logits_too() -> None:
    model, _ = tiny_llama(0)
    plain = EngineConfig(max_num_seqs=3, speculation=Speculation(4, 3, 2))
    wider = dataclasses.replace(plain, speculation=Speculation(4, 3, 2, lookup=8))
    more = activation_bytes(model, wider) - activation_bytes(model, plain)
    assert more == 3 * 8 * model.vocab_size * 4 * 5


def test_the_published_pair(published: tuple[Layout, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as ``haast check`` counts them, from other tables; and the published line on one H200."""
    layout, target, head = published
    checkpoint, draft = open_model(target), open_head(str(head))
    config = EngineConfig(
        dtype=torch.bfloat16,
        device="cuda",
        max_model_len=262144,
        max_num_batched_tokens=16384,
        max_num_seqs=128,
        gpu_memory_utilization=0.8,
    )
    alone = target_footprint(checkpoint).memory_bytes
    assert weight_bytes(checkpoint, "none", config) == alone
    weights = alone + head_footprint(draft).memory_bytes + 32_768 * (4_096 + 4)
    assert weight_bytes(checkpoint, draft, config) == weights
    whole = dataclasses.replace(config, draft_vocab_size=0)
    assert weight_bytes(checkpoint, draft, whole) == weights - 32_768 * (4_096 + 4)
    activations = activation_bytes(checkpoint.config, config)
    queries, chunk = 16384 * 32 * (320 + 256) * 4, 16384 * (4096 * 20 * 2 + 5 * (2048 * 2 + 4096 * 4))
    assert activations == queries + chunk + 128 * 8 * 131072 * 4 * 5

    on_gpu(monkeypatch, H200)
    if layout == "native-nvfp4":
        graphs = 32 * 8 * 131072 * 4 * 5 + 48 * (8 << 20)
        left = int(0.8 * H200) - 2_000_000_000 - weights - activations - graphs
        assert with_kv_memory(checkpoint, draft, config).kv_cache_memory == left
        assert left > 262144 * (23_040 + 1_280)
        narrow = dataclasses.replace(config, kv_cache_dtype=torch.float8_e4m3fn, kv_cache_memory=left)
        pages = num_pages(checkpoint.config, draft, dataclasses.replace(narrow, max_num_seqs=1024))
        assert pages == left // ((23_040 // 2 + 1_280) * config.page_size), "the head's rows stay wide"
    else:
        longest, said = _refused(checkpoint, draft, config)
        assert longest == 0
        assert "no length would fit" in said
        more = dataclasses.replace(config, gpu_memory_utilization=0.88)
        longest, said = _refused(checkpoint, draft, more)
        assert "does not fit: 88% of 140.4 GiB (140.4 GiB are free), less 11" in said
        assert longest > 0
        # what is said to fit does, and a page more does not
        fits = dataclasses.replace(more, max_model_len=longest)
        assert with_kv_memory(checkpoint, draft, fits).kv_cache_memory > 0
        assert num_pages(checkpoint.config, draft, with_kv_memory(checkpoint, draft, fits)) > 0
        assert _refused(checkpoint, draft, dataclasses.replace(more, max_model_len=longest + 1))[0] == longest


def _refused(checkpoint: object, draft: object, config: EngineConfig) -> tuple[int, str]:
    """(the length that is said to fit, all that is said)."""
    with pytest.raises(ConfigError, match=f"^max_model_len {config.max_model_len} does not fit") as caught:
        with_kv_memory(checkpoint, draft, config)  # type: ignore[arg-type]
    found = re.search(r"--max-model-len (\d+) would fit", str(caught.value))
    return (0 if found is None else int(found[1])), str(caught.value)


def test_other_processes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, head = write_pair(tmp_path, "native-bf16")
    checkpoint, draft = open_model(target), open_head(head)
    config = EngineConfig(device="cuda", max_model_len=128, gpu_memory_utilization=0.5)
    on_gpu(monkeypatch, 80 * GIB, 10 * GIB)
    sized = with_kv_memory(checkpoint, draft, config)
    taken = weight_bytes(checkpoint, draft, config) + activation_bytes(checkpoint.config, config)
    taken += graph_bytes(checkpoint.config, config)
    eager = with_kv_memory(checkpoint, draft, dataclasses.replace(config, enforce_eager=True))
    assert eager.kv_cache_memory - sized.kv_cache_memory == graph_bytes(checkpoint.config, config) > 0
    assert sized.kv_cache_memory == 10 * GIB - GPU_RESERVE - taken
    assert dataclasses.replace(sized, kv_cache_memory=config.kv_cache_memory) == config
    without = dataclasses.replace(config, gpu_memory_utilization=None)
    assert with_kv_memory(checkpoint, draft, without) is without


@pytest.mark.parametrize("layout", ["native-fp8", "native-nvfp4", "native-bf16", "hf-fp8", "hf-bf16"])
def test_plans_are_as_large_as_what_they_load(tmp_path: Path, layout: Layout) -> None:
    target, head = write_pair(tmp_path, layout)
    opened = open_head(head)
    assert isinstance(opened, MistralHead)
    for checkpoint in (open_model(target), opened):
        loaded = checkpoint.load(torch.float32, "cpu")
        num_bytes = sum(sum(part.nbytes for part in _parts(weight)) for weight in loaded.values())
        assert plan_bytes(checkpoint.plan, 4) == num_bytes  # type: ignore[union-attr]


def _parts(weight: object) -> list[torch.Tensor]:
    if isinstance(weight, torch.Tensor):
        return [weight]
    parts = [getattr(weight, field.name) for field in dataclasses.fields(weight)]  # type: ignore[arg-type]
    return [part for part in parts if part is not None]


def test_weights_of_a_llama_and_its_head(tmp_path: Path) -> None:
    model, weights = tiny_llama()
    checkpoint = open_model(write_hf(tmp_path / "m", model, weights))
    config = EngineConfig(dtype=torch.bfloat16)
    alone = weight_bytes(checkpoint, "ngram", config)
    assert alone == 2 * sum(weight.numel() for weight in weights.values())
    head = open_head(str(DEFAULT_HEAD))
    numbers = sum(group.parameters for group in head_footprint(head).groups)
    assert weight_bytes(checkpoint, head, config) - alone >= 2 * numbers


def test_files_beside_a_dummy_head_are_not_looked_at(tmp_path: Path) -> None:
    checkpoint, real = open_model(write_hf(tmp_path / "m", *tiny_llama())), open_head(str(DEFAULT_HEAD))
    shutil.copy(DEFAULT_HEAD / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    config = EngineConfig(dtype=torch.bfloat16)
    dummy = weight_bytes(checkpoint, open_head(str(tmp_path), dummy=True), config)
    assert weight_bytes(checkpoint, "none", config) < dummy <= weight_bytes(checkpoint, real, config)


def test_a_share_of_no_gpu_is_refused() -> None:
    for share, device in ((0.8, "cpu"), (0.0, "cuda"), (1.1, "cuda")):
        with pytest.raises(ConfigError, match=f"gpu_memory_utilization is {share} on {device}, expected"):
            EngineConfig(gpu_memory_utilization=share, device=device)


@pytest.mark.parametrize(
    ("share", "advice"),
    [
        (0.9, r"lower --gpu-memory-utilization from 0\.90 to 0\.88 \(1\.5 GiB\), or give --enforce-eager"),
        (None, r"lower --kv-cache-memory by 1\.5 GiB, or give --enforce-eager"),
    ],
)
def test_an_allocation_that_fails_says_what_to_lower(share: float | None, advice: str) -> None:
    config = EngineConfig(device="cuda", gpu_memory_utilization=share)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity .."
    )
    said = str(out_of_memory(error, config, 2 * GIB, 80 * GIB))
    assert re.search("3.00 GiB were asked for, 2.00 of 80.0 GiB are free; " + advice, said), said
