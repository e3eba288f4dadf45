"""A whole run on a tiny target: it learns, it resumes exactly, its export has the published layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draft.train.evaluate import measure
from draft.train.export import Card, export_head
from draft.train.loop import CHECKPOINT, CURVE, Run, TrainSettings, learning_rate
from draft.train.model import Eagle3Module, HeadConfig, choose_draft_vocab, default_feature_layers, initialise
from draft.train.shards import Dataset, split
from engine.errors import CheckpointError, ConfigError
from tests.draft.train.tiny import (
    CONFIG,
    DRAFT_VOCAB,
    HIDDEN,
    SHAPE,
    VOCAB,
    learnable_dataset,
    make_head,
    make_target,
)
from tests.oracles import unrolled_head as oracle

SETTINGS = TrainSettings(seed=7, epochs=6, batch_tokens=64, lr=1e-2, num_steps=3, eval_every=1000)


def make_run(directory: Path, dataset: Dataset, settings: TrainSettings = SETTINGS) -> Run:
    training, heldout = split(len(dataset), 6)
    return Run(
        directory,
        settings,
        make_head(dtype=torch.float32),
        make_target(dtype=torch.float32),
        dataset,
        training,
        heldout,
    )


@pytest.mark.parametrize("share_lm_head", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_training_raises_acceptance_and_lowers_the_loss(
    tmp_path: Path, bf16: bool, share_lm_head: bool
) -> None:
    settings = dataclasses.replace(SETTINGS, bf16=bf16, share_lm_head=share_lm_head)
    run = make_run(tmp_path / "run", learnable_dataset(tmp_path / "data"), settings)
    losses: list[float] = []
    run._report = lambda report: losses.append(report.loss)
    after = run.train()
    before = json.loads((tmp_path / "run" / CURVE).read_text().splitlines()[0])
    assert before["step"] == 0
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert after.by_depth[0] > before["acceptance_by_depth"][0] + 0.3
    assert after.lengths[4] > before["acceptance_length"]["4"]
    assert (
        1.0 <= before["acceptance_length"]["4"] <= after.lengths[4] <= 4.0
    )  # three unrolled steps, and the bonus


@pytest.mark.parametrize("share_lm_head", [False, True])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, share_lm_head: bool) -> None:
    dataset = learnable_dataset(tmp_path / "data")
    settings = dataclasses.replace(SETTINGS, epochs=3, share_lm_head=share_lm_head)
    whole = make_run(tmp_path / "whole", dataset, settings)
    initial = whole.head.lm_head.weight.detach().clone()
    whole.train()
    for stop_after in (4, 5, None):  # each time a new process would start like this
        part = make_run(tmp_path / "parts", dataset, settings)
        part.train(stop_after)
    assert part.progress.step == whole.progress.step > 9
    for name, value in whole.head.state_dict().items():
        torch.testing.assert_close(part.head.state_dict()[name], value, rtol=0, atol=0)
    assert torch.equal(initial, whole.head.lm_head.weight) == share_lm_head


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    dataset = learnable_dataset(tmp_path / "data")
    make_run(tmp_path / "run", dataset).train(1)
    with pytest.raises(ConfigError, match=r"made with lr = 0.01, this run has 0.5"):
        make_run(tmp_path / "run", dataset, dataclasses.replace(SETTINGS, lr=0.5))
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        make_run(tmp_path / "run", dataset)


def test_a_time_budget_ends_the_run_with_a_small_learning_rate(tmp_path: Path) -> None:
    dataset = learnable_dataset(tmp_path / "data")
    settings = dataclasses.replace(SETTINGS, epochs=100_000, max_minutes=1.0)
    run = make_run(tmp_path / "run", dataset, settings)
    run.progress.step, run.progress.seconds = 1, 60.0  # as if resumed when the time was up
    run.train()
    assert run.progress.step == 1
    rates = [learning_rate(settings, share / 100) for share in range(101)]
    assert max(rates) == pytest.approx(settings.lr, rel=0.01)
    assert rates[-1] == pytest.approx(settings.lr * settings.final_lr_share)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_measured_acceptance_equals_walking_with_the_oracle(tmp_path: Path) -> None:
    dataset = learnable_dataset(tmp_path / "data", 6)
    run = make_run(tmp_path / "run", dataset, dataclasses.replace(SETTINGS, epochs=2))
    run.train()
    head, embedding = run.head.double(), make_target(dtype=torch.float32).embedding.double()
    weights = dict(head.state_dict())
    tried, accepted, emitted, steps = [0] * 3, [0] * 3, 0, 0
    documents = list(range(len(dataset)))
    for index in documents:
        doc = dataset.load(index)
        tokens, features = doc.tokens.tolist(), doc.features.double()
        first = doc.answer.tolist().index(True)
        runs = {}
        for start in range(first - 2, len(tokens) - 2):
            states = oracle.chain(weights, SHAPE, embedding, tokens, features, start, 3)
            runs[start] = 0
            for k, hidden in enumerate(states[: len(tokens) - 2 - start]):
                guess = int(oracle.logits(weights, SHAPE, hidden).argmax())
                tried[k] += 1
                if guess + int(head.d2t[guess]) != tokens[start + k + 2]:
                    break
                accepted[k] += 1
                runs[start] += 1
        place = first  # the root: emitted by the prefill
        while place < len(tokens) - 1:
            steps += 1
            place += min(runs[place - 1], 4) + 1
        emitted += len(tokens) - 1 - first
    measured = measure(head, embedding, dataset, documents, 3, 64)
    assert measured.by_depth == pytest.approx([a / max(t, 1) for a, t in zip(accepted, tried, strict=True)])
    assert measured.lengths[4] == pytest.approx(emitted / steps)
    assert 0 < sum(accepted) < sum(tried)


def test_initialisation_comes_from_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (32, 16),
        "self_attn.k_proj": (16, 16),
        "self_attn.v_proj": (16, 16),
        "self_attn.o_proj": (16, 32),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
        "input_layernorm": (16,),
        "post_attention_layernorm": (16,),
    }
    target = {
        f"model.layers.{number}.{name}.weight": torch.randn(shape, generator=generator)
        for number in (0, 3)
        for name, shape in shapes.items()
    }
    target |= {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    heads = []
    for _ in range(2):
        vocab = choose_draft_vocab(torch.arange(VOCAB), DRAFT_VOCAB, (0,))
        head = Eagle3Module(CONFIG, vocab)
        initialise(head, target, 4, torch.Generator().manual_seed(1))
        heads.append(head)
    state, again = heads[0].state_dict(), heads[1].state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert torch.equal(state["lm_head.weight"], target["model.embed_tokens.weight"][vocab])
    assert torch.equal(state["norm.weight"], target["model.norm.weight"])
    keys = state["midlayer.self_attn.k_proj.weight"]
    assert torch.equal(keys[:, :HIDDEN], target["model.layers.0.self_attn.k_proj.weight"])
    assert torch.equal(keys[:, HIDDEN:], target["model.layers.3.self_attn.k_proj.weight"])


def test_draft_vocabulary_holds_the_frequent_and_the_required_tokens() -> None:
    counts = torch.tensor([0, 5, 9, 1, 1, 7])
    assert choose_draft_vocab(counts, 3, (0,)).tolist() == [0, 2, 5]
    assert choose_draft_vocab(counts, 5, (0,)).tolist() == [0, 1, 2, 3, 5]  # of equals the lower id
    assert default_feature_layers(30) == (10, 20, 30)


@pytest.mark.parametrize("share_lm_head", [False, True])
def test_the_export_has_the_published_names_and_shapes(tmp_path: Path, share_lm_head: bool) -> None:
    dataset = learnable_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run", dataset, dataclasses.replace(SETTINGS, epochs=1))
    acceptance = run.train()
    card = Card(
        "tiny",
        "haast train tiny",
        dataset.settings,
        run.settings.identity(),
        len(dataset),
        100,
        0.98,
        60.0,
        120.0,
        "a CPU",
        acceptance,
    )
    export_head(tmp_path / "head", run.head, 512, card, tmp_path / "run" / CURVE, share_lm_head)
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    expected = {
        "fc.weight": (16, 48),
        "midlayer.hidden_norm.weight": (16,),
        "midlayer.input_layernorm.weight": (16,),
        "midlayer.self_attn.q_proj.weight": (32, 32),
        "midlayer.self_attn.k_proj.weight": (16, 32),
        "midlayer.self_attn.v_proj.weight": (16, 32),
        "midlayer.self_attn.o_proj.weight": (16, 32),
        "midlayer.post_attention_layernorm.weight": (16,),
        "midlayer.mlp.gate_proj.weight": (24, 16),
        "midlayer.mlp.up_proj.weight": (24, 16),
        "midlayer.mlp.down_proj.weight": (16, 24),
        "norm.weight": (16,),
        "d2t": (DRAFT_VOCAB,),
        "t2d": (VOCAB,),
    } | ({} if share_lm_head else {"lm_head.weight": (DRAFT_VOCAB, 16)})
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], torch.arange(DRAFT_VOCAB) + tensors["d2t"])
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
        "use_aux_hidden_state": True,
    }
    text = (tmp_path / "head" / "README.md").read_text()
    assert f"{acceptance.by_depth[0]:.3f}" in text
    assert "haast train tiny" in text
    assert (tmp_path / "head" / CURVE).read_text().count("\n") == 2


def test_head_config_never_asks_for_more_draft_tokens_than_there_are() -> None:
    from engine.config import LlamaConfig

    target = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    assert HeadConfig.for_target(target, (1, 2, 4), 8192).draft_vocab_size == 100


def test_too_little_data_trains_nothing(tmp_path: Path) -> None:
    dataset = learnable_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match="holds 0 conversations for training"):
        Run(
            tmp_path / "run",
            SETTINGS,
            make_head(dtype=torch.float32),
            make_target(dtype=torch.float32),
            dataset,
            [],
            list(range(len(dataset))),
        )
