"""From files on disk to an engine: synthetic pairs of Mistral Small 4 and its head, in published layouts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draft.head import FeatureDraft
from draft.mistral_eagle import copied_output
from engine.build import Served, build, build_engine
from engine.checkpoint.published import published_target
from engine.checkpoint.synthetic import write_head, write_target
from engine.checkpoint.synthetic_config import head_config
from engine.checkpoint.synthetic_tables import Layout
from engine.config import EngineConfig, Mistral4Config, YarnScaling
from engine.core import SPECULATION_OFF, SamplingParams, Speculation
from engine.errors import CheckpointError, ConfigError
from engine.models.mistral4 import Mistral4
from engine.nn.linear import Linear
from tests.checkpoint.files import write_hf, write_tokenizer
from tests.conftest import tiny_llama
from tests.engine.rig import assert_idle, prompts_of
from tests.text.tekken import tekken_data

VOCAB = 1300  # a thousand control tokens and the 300 most frequent others
CONFIG = Mistral4Config(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=512,
    intermediate_size=48,
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    moe_intermediate_size=32,
    yarn=YarnScaling(4.0, 128),
    llama_4_beta=0.1,
    llama_4_original_positions=128,
)
PROMPTS = prompts_of([3, 17], vocab_size=VOCAB)


def write_pair(directory: Path, layout: Layout) -> tuple[str, str]:
    target, head = directory / "target", directory / "head"
    target.mkdir()
    head.mkdir()
    write_target(target, CONFIG, layout, seed=1)
    write_head(head, head_config(CONFIG), seed=2)
    (target / "tekken.json").write_text(json.dumps(tekken_data(VOCAB - 1000)))
    return str(target), str(head)


def settings(**changes: object) -> EngineConfig:
    config = EngineConfig(
        max_model_len=128,
        max_num_seqs=4,
        page_size=4,
        kv_cache_memory=8 << 20,
        speculation=Speculation(6, 3, 2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def tokens(served: Served, temperature: float) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=12, ignore_eos=True)
    return [done.token_ids for done in served.engine.generate(PROMPTS, [params] * len(PROMPTS))]


@pytest.mark.parametrize("layout", ["native-fp8", "native-nvfp4", "native-bf16", "hf-fp8", "hf-bf16"])
def test_a_pair_from_disk_speculates_and_changes_nothing(tmp_path: Path, layout: Layout) -> None:
    target, head = write_pair(tmp_path, layout)
    plain = build(target, "none", settings(speculation=SPECULATION_OFF))
    pair = build(target, head, settings())
    assert isinstance(pair.engine.target, Mistral4)
    assert (pair.name, pair.draft_name) == ("target", "eagle (head)")
    assert pair.tokenizer.vocab_size == VOCAB
    assert pair.tokenizer.eos_token_ids == (2,)
    for temperature in (0.0, 1.0):
        assert tokens(pair, temperature) == tokens(plain, temperature)
    assert_idle(pair.engine)


def test_the_draft_vocabulary_is_cut_to_the_lowest_ids(tmp_path: Path) -> None:
    target, head = write_pair(tmp_path, "native-fp8")
    plain = tokens(build(target, "none", settings()), 0.7)
    for size, expected in ((0, VOCAB), (100_000, VOCAB), (1100, 1100)):
        pair = build(target, head, settings(draft_vocab_size=size))
        assert isinstance(pair.engine.draft, FeatureDraft)
        assert pair.engine.draft.model.token_ids.tolist() == list(range(expected))
        logits = pair.engine.draft.model.logits(torch.ones(1, CONFIG.hidden_size))
        full = pair.engine.target.logits(torch.ones(1, CONFIG.hidden_size))
        assert float((logits - full[:, :expected]).abs().max()) < 0.05 * float(full.abs().max())
        assert tokens(pair, 0.7) == plain


def _drafted_logits(served: Served, hidden: Tensor) -> Tensor:
    assert isinstance(served.engine.draft, FeatureDraft)
    return served.engine.draft.model.logits(hidden)


def test_rows_in_fp8_change_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's own rows as a GPU holds them: a byte a number, and as often right."""
    target, head = write_pair(tmp_path, "native-fp8")
    wide = build(target, head, settings(draft_vocab_size=1100))

    def in_fp8(rows_of: Callable[[Tensor], Tensor], token_ids: Tensor, fp8: bool) -> Linear:
        assert not fp8, "the device is a CPU"
        return copied_output(rows_of, token_ids, fp8=True)

    monkeypatch.setattr("engine.build.copied_output", in_fp8)
    narrow = build(target, head, settings(draft_vocab_size=1100))
    hidden = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    expected, found = (_drafted_logits(served, hidden) for served in (wide, narrow))
    # FP8 keeps four bits of a number: an error of at most a sixteenth of it, and of either sign.
    assert 0 < float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())
    for temperature in (0.0, 0.7):
        assert tokens(narrow, temperature) == tokens(wide, temperature)
    assert_idle(narrow.engine)


def test_the_head_is_used_up_to_its_own_context(tmp_path: Path) -> None:
    target, head = write_pair(tmp_path, "native-fp8")
    pair = build(target, head, settings(draft_max_model_len=10))
    assert isinstance(pair.engine.draft, FeatureDraft)
    assert pair.engine.draft.max_len == 10
    assert tokens(pair, 0.0) == tokens(build(target, "none", settings()), 0.0)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_what_a_gpu_lacks_is_refused_before_weights_are_read(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dependent launches on an older one; on any, activations that the router's kernel does not take."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target = published_target("mistral-small-4-tiny")
    monkeypatch.delattr(type(target), "load")
    refusal = (
        "pdl is on with a GPU of compute capability 8.9, expected 9.0"
        if capability < (9, 0)
        else "dtype is float16 on cuda:0, expected bfloat16 or float32: the kernels of Mistral"
    )
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        build_engine(target, (), "none", settings(device="cuda:0", dtype=torch.float16, pdl=True))


def test_what_does_not_fit_together_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    target, head = write_pair(tmp_path, "native-bf16")
    other = tmp_path / "other"
    other.mkdir()
    write_head(other, head_config(dataclasses.replace(CONFIG, hidden_size=64)))
    with pytest.raises(CheckpointError, match="its hidden_size is 64, the target's 32"):
        build(target, str(other), settings())
    write_hf(tmp_path / "llama", *tiny_llama(vocab_size=288))
    write_tokenizer(tmp_path / "llama", 288)
    with pytest.raises(CheckpointError, match="made for Mistral Small 4, found a Llama target"):
        build(str(tmp_path / "llama"), head, settings())
    with pytest.raises(ConfigError, match="max_model_len is 4096, but target was made for at most 512"):
        build(target, head, settings(max_model_len=4096))
    with pytest.raises(ConfigError, match="less than max_model_len 128; 384 bytes a token are needed"):
        build(target, head, settings(kv_cache_memory=4096))
