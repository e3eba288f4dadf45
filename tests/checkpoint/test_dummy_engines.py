"""Engines run on models without weights: activations stay sane, and speculation changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from draft.head import FeatureDraft
from engine.build import build, build_engine
from engine.checkpoint.dummy import DummyLlama, open_dummy
from engine.checkpoint.synthetic_tables import LAYOUTS, Layout
from engine.cli import main
from engine.config import EngineConfig
from engine.core import SPECULATION_OFF, Batch, DraftTree, SamplingParams, Scores
from tests.checkpoint.dummies import CONFIG, VOCAB, dummy_pair, settings
from tests.checkpoint.files import hf_config, write_tokenizer
from tests.conftest import tiny_eagle3, tiny_llama
from tests.engine.rig import assert_idle, prompts_of


def answers(target: Path, head: str, config: EngineConfig, vocab_size: int) -> list[tuple[int, ...]]:
    served = build(str(target), head, config)
    found = []
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=5, max_tokens=12, ignore_eos=True)
        prompts = prompts_of([3, 17], vocab_size=vocab_size)
        done = served.engine.generate(prompts, [params] * len(prompts))
        assert all(len(one.token_ids) == 12 for one in done)
        found += [one.token_ids for one in done]
    if isinstance(served.engine.draft, FeatureDraft):
        assert bool(torch.isfinite(served.engine.draft.model.pool.rows).all())
    assert_idle(served.engine)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dummy_pair_speculates_and_changes_nothing(tmp_path: Path, layout: Layout) -> None:
    target, head = dummy_pair(tmp_path, layout)
    plain = answers(target, "none", settings(speculation=SPECULATION_OFF), VOCAB)
    assert answers(target, str(head), settings(), VOCAB) == plain
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("layout", ["native-fp8", "native-nvfp4", "native-bf16"])
def test_activations_stay_sane_through_36_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    config = dataclasses.replace(CONFIG, num_layers=36)
    checkpoint = open_dummy(dummy_pair(tmp_path, layout, config)[0])
    _check_activations(checkpoint, monkeypatch, VOCAB, 36)


@pytest.mark.parametrize("tied", [False, True])
def test_activations_of_a_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    config, _ = tiny_llama(vocab_size=300, num_layers=24, tie_word_embeddings=tied)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    checkpoint = open_dummy(tmp_path)
    assert isinstance(checkpoint, DummyLlama)
    assert ("lm_head.weight" in checkpoint.load(torch.float32, "cpu")) != tied
    _check_activations(checkpoint, monkeypatch, 300, 24)


def _check_activations(checkpoint: Any, monkeypatch: pytest.MonkeyPatch, vocab: int, num_layers: int) -> None:
    """Hidden states between layers grow as a random walk, and logits say something, but not everything."""
    config = settings(dtype=torch.bfloat16, max_num_batched_tokens=64)
    layers = tuple(range(num_layers + 1))
    engine = build_engine(checkpoint, (), "none", config, feature_layers=layers)
    seen: list[Scores] = []
    score = engine.target.score

    def recorded(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        scores = score(batches, trees)
        seen.extend(scores)
        return scores

    monkeypatch.setattr(engine.target, "score", recorded)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.generate(prompts_of([40], vocab_size=vocab), [params])
    features = seen[0].features[0].float()  # of the prompt, [N, layers * H]
    hidden = features.view(len(features), num_layers + 1, -1)
    spreads = hidden.square().mean(dim=(0, 2)).sqrt()
    assert bool(torch.isfinite(spreads).all())
    assert 0.05 < float(spreads.min()) < float(spreads.max()) < 3 * num_layers**0.5, spreads
    for scores in seen:
        logits = scores.logits.float()
        assert bool(torch.isfinite(logits).all())
        assert bool(((logits.std(dim=-1) > 0.3) & (logits.std(dim=-1) < 3)).all())
        assert float(torch.softmax(logits, dim=-1).max()) < 0.5
    assert len({int(scores.logits[0, 0].argmax()) for scores in seen}) > 1  # not one token for ever


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "ngram"])
def test_a_dummy_llama_speculates_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    config, _ = tiny_llama(vocab_size=300, num_layers=6)
    target, head = tmp_path / "target", tmp_path / "head"
    head.mkdir()
    write_tokenizer(target, 300)
    (target / "config.json").write_text(json.dumps(hf_config(config)))
    raw = tiny_eagle3(config)[0] if kind == "eagle3" else hf_config(config) | {"num_hidden_layers": 1}
    (head / "config.json").write_text(json.dumps(raw))
    draft = kind if kind == "ngram" else str(head)
    plain = answers(target, "none", settings(speculation=SPECULATION_OFF), 300)
    assert answers(target, draft, settings(), 300) == plain


def test_load_format_dummy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, head = dummy_pair(tmp_path, "native-nvfp4")
    prompts, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("a\nb\n")
    words = ["generate", str(target), "--spec-model", str(head), "-i", str(prompts), "-o", str(out)]
    words += ["--device", "cpu", "--max-model-len", "128", "--kv-cache-memory", "8MiB", "--max-tokens", "4"]
    assert main.main([*words, "--load-format", "mistral"]) == 1
    assert "no consolidated*.safetensors" in capsys.readouterr().err
    words += ["--load-format", "dummy"]
    assert main.main([*words, "--quantization", "fp8"]) == 1
    assert "is stored as nvfp4" in capsys.readouterr().err
    assert main.main([*words, "--quantization", "nvfp4"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["usage"]["completion_tokens"] for line in lines] == [4, 4]
