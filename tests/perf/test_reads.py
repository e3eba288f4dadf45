"""What a step is said to read is what the code holds: counted from plans, and from the tensors of models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from draft.head import FeatureDraft
from draft.mistral_eagle import MistralEagleModel, copied_output
from engine.build import build_engine
from engine.checkpoint.dummy import DummyLlama, DummyMistral, DummyMistralHead
from engine.checkpoint.native import announced_weights
from engine.checkpoint.plan import Plan
from engine.checkpoint.published import published_head, published_target
from engine.checkpoint.synthetic_config import SMALL_4, TINY, head_config, params_json
from engine.cli.roofline import step_bytes
from engine.config import EngineConfig, Mistral4Config
from engine.models.decoder import Decoder
from engine.nn.linear import Linear
from perf.reads import draft_reads, held_bytes, prompt_flops, target_reads
from tests.conftest import tiny_llama

# Wide enough for scales and norms to be next to nothing beside any matrix.
WIDE = dataclasses.replace(
    TINY, vocab_size=2048, hidden_size=1024, intermediate_size=1024, q_lora_rank=512, kv_lora_rank=256,
    qk_nope_head_dim=64, v_head_dim=64, num_experts=4, moe_intermediate_size=256,
)  # fmt: skip
ON_GPU = EngineConfig(dtype=torch.bfloat16, device="cuda")


def dummy(config: Mistral4Config, kind: str) -> DummyMistral:
    weights = announced_weights(config, params_json(config, kind, None), Path("x"))
    return DummyMistral(Path("x"), "x", config, weights)


def test_a_level_of_drafting_reads_what_the_head_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a GPU's head drafts among are in FP8 here too."""
    target = dummy(WIDE, "fp8")
    of_head = head_config(WIDE)
    head = DummyMistralHead(target.path, of_head, {}, Plan(dummy(of_head, "fp8").plan.weights, (), ()))
    config = EngineConfig(
        dtype=torch.bfloat16, max_model_len=64, kv_cache_memory=1 << 20, draft_vocab_size=1024
    )
    monkeypatch.setattr(
        "engine.build.copied_output", lambda rows_of, ids, fp8: copied_output(rows_of, ids, fp8=True)
    )
    engine = build_engine(target, (), head, config)
    assert isinstance(engine.draft, FeatureDraft)
    network = engine.draft.model
    assert isinstance(network, MistralEagleModel)
    held = held_bytes(network, (network.embedding, network.token_ids, network.pool.rows))
    reads = draft_reads(head, dataclasses.replace(config, device="cuda"))
    assert reads.always == pytest.approx(held, rel=0.004)
    # A whole vocabulary is shared with the target, in its dtype.
    whole = draft_reads(head, dataclasses.replace(config, device="cuda", draft_vocab_size=0))
    assert whole.always - reads.always == 2048 * 1024 * 2 - 1024 * (1024 + 4)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_step_reads_what_the_target_holds(kind: str) -> None:
    checkpoint = dummy(WIDE, kind)
    config = EngineConfig(dtype=torch.bfloat16, max_model_len=64, kv_cache_memory=1 << 20)
    target = build_engine(checkpoint, (), "none", config).target
    assert isinstance(target, Decoder)
    reads = target_reads(checkpoint, config)
    held = held_bytes(target, (target.embedding, target.pool.rows))
    assert reads.always + reads.experts == pytest.approx(held, rel=0.01)
    assert reads.kv_row * target.pool.rows.shape[3] == target.pool.rows.nbytes
    assert reads.experts == sum(
        held_bytes(weight)
        for name, weight in checkpoint.load(torch.bfloat16, "cpu").items()
        if checkpoint.plan.weights[name].expected.num_experts
    ) - (4 * 4 * 3 * 2 if kind == "fp8" else 0)  # input scales


def test_a_llama_reads_all_but_an_untied_embedding() -> None:
    config, weights = tiny_llama(1)
    checkpoint = DummyLlama(Path("x"), "x", config, lambda: None)  # type: ignore[arg-type, return-value]
    held = sum(tensor.numel() for tensor in weights.values())
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert target_reads(checkpoint, ON_GPU).always == 2 * (held - table)


@pytest.mark.parametrize(("kind", "plain", "four"), [("fp8", 1.39, 3.52), ("nvfp4", 1.19, 2.39)])
def test_the_floors_of_the_published_model(kind: str, plain: float, four: float) -> None:
    """Milliseconds on an H200 at all of its bandwidth, behind 1024 tokens, as calculated apart from this."""
    reads = target_reads(published_target("mistral-small-4", kind), ON_GPU)  # type: ignore[arg-type]
    for nodes, milliseconds in ((1, plain), (4, four)):
        assert 1e3 * step_bytes(reads, nodes) / 4.8e12 == pytest.approx(milliseconds, rel=0.02)


def test_the_bytes_of_the_published_draft() -> None:
    """0.39 GB of layers; 32,768 rows of 4,096 bytes are a quarter of all, the whole output nearly three
    quarters."""
    head = published_head("mistral-small-4")
    few = draft_reads(head, ON_GPU).always
    assert few / 1e6 == pytest.approx(391.7 + 3.1 + 134.3, abs=1)
    whole = draft_reads(head, dataclasses.replace(ON_GPU, draft_vocab_size=0)).always
    rows = SMALL_4.vocab_size * SMALL_4.hidden_size * 2
    assert rows / whole == pytest.approx(0.73, abs=0.01)


def test_the_work_of_a_prompt() -> None:
    """6.1 thousand million parameters a token but for the output, which one token sees."""
    target = published_target("mistral-small-4")
    one = prompt_flops(target, 1)
    per_layer = 28_049_408 + 524_288 + 5 * 25_165_824 + 4_096 * 2 + 1_024 + 256
    assert one == pytest.approx(2 * (36 * (per_layer + 32 * 256) + 131_072 * 4_096), rel=1e-6)
    many = prompt_flops(target, 1000)
    pairs = 36 * 32 * 256 * 1000 * 1001 / 2
    assert many == pytest.approx(2 * (1000 * 36 * per_layer + pairs + 131_072 * 4_096), rel=1e-6)


def test_rows_in_fp8_are_half_as_many_bytes() -> None:
    """The target's; a head's stay as they are."""
    target, head = published_target("mistral-small-4"), published_head("mistral-small-4")
    narrow = dataclasses.replace(ON_GPU, kv_cache_dtype=torch.float8_e4m3fn)
    assert target_reads(target, ON_GPU).kv_row == 2 * target_reads(target, narrow).kv_row == 23_040
    assert draft_reads(head, ON_GPU).kv_row == draft_reads(head, narrow).kv_row == 1_280


def test_held_bytes_looks_everywhere_and_counts_once() -> None:
    table = torch.zeros(10)
    linear = Linear(torch.ones(4, 4, dtype=torch.bfloat16))

    def closed() -> tuple[object, object]:
        return table, linear

    assert held_bytes([closed, table[2:], {"again": linear}]) == 40 + 32
    assert held_bytes([closed], without=[table]) == 32
