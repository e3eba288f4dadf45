"""``haast train`` from a checkpoint on disk to a head that the engine serves, interrupted on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draft.train.collect import DataSettings
from draft.train.evaluate import Acceptance
from draft.train.loop import CHECKPOINT, CURVE, Run
from draft.train.recorder import FeatureRecorder
from engine.build import build
from engine.checkpoint import open_checkpoint
from engine.cli import options
from engine.cli.main import main
from engine.cli.train import recording_engine
from engine.config import EngineConfig
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from tests.checkpoint.files import write_gguf, write_hf, write_tokenizer
from tests.conftest import tiny_llama

VOCAB, STEPS_BEFORE_INTERRUPT = 288, 3


def write_target(directory: Path, kind: str) -> Path:
    """Untied embeddings in a Hugging Face directory, or tied ones and a single layer in a GGUF file."""
    config, weights = tiny_llama(
        vocab_size=VOCAB, num_layers=1 if kind == "gguf" else 3, tie_word_embeddings=kind == "gguf"
    )
    if kind == "gguf":
        return write_gguf(directory / "target.gguf", config, weights)
    write_hf(directory / "target", config, weights)
    return write_tokenizer(directory / "target", VOCAB)


def command_line(directory: Path, target: Path, *more: str) -> list[str]:
    prompts = directory / "prompts.txt"
    prompts.write_text("".join(f"hello world, number {number}\n" for number in range(60)))
    options = {
        "--output": directory / "head",
        "--work-dir": directory / "work",
        "--prompts": prompts,
        "--device": "cpu",
        "--tokens": 300,
        "--max-answer-tokens": 10,
        "--data-batch": 16,
        "--draft-vocab": 128,
        "--epochs": 2,
        "--batch-tokens": 256,
        "--steps-unrolled": 3,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return ["train", str(target), *words, *more]


def greedy_tokens(target: Path, head: str, speculation: Speculation) -> list[list[int]]:
    """32 greedy tokens after each of three prompts, with stop tokens ignored."""
    config = EngineConfig(max_model_len=128, max_num_seqs=4, speculation=speculation)
    engine = build(str(target), head, config).engine
    sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    for number, prompt in enumerate(((5, 6, 7), (40, 41, 42, 43), (99,))):
        engine.add(Request(number, prompt, sampling))
    tokens: list[list[int]] = [[], [], []]
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    return tokens


@pytest.mark.parametrize(
    ("kind", "bf16", "flags"), [("hf", True, ()), ("hf", False, ()), ("gguf", False, ("--share-lm-head",))]
)
def test_a_head_is_trained_resumed_and_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    bf16: bool,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.setattr(options, "has_fast_bfloat16", lambda: bf16)
    target = write_target(tmp_path, kind)
    words = command_line(tmp_path, target, *flags)
    data, run, head = tmp_path / "work" / "data", tmp_path / "work" / "run", tmp_path / "head"
    steps: list[int] = []
    train, step = Run.train, Run._step

    def counted(self: Run, *args: Any) -> tuple[float, int]:
        steps.append(self.progress.step)
        return step(self, *args)

    def interrupted(self: Run) -> Acceptance:
        train(self, STEPS_BEFORE_INTERRUPT)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_step", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", interrupted)
        assert main(words) == 130
    assert steps == list(range(STEPS_BEFORE_INTERRUPT))
    assert not head.exists()
    manifest = (data / "manifest.json").read_bytes()
    assert json.loads(manifest)["shards"][0]["num_answer_tokens"] >= 300

    assert main(words) == 0  # the rest of training, and the export
    last = len(steps)
    assert steps == list(range(last))
    assert last > STEPS_BEFORE_INTERRUPT
    weights = load_file(head / "model.safetensors")

    capsys.readouterr()
    assert main(words) == 0  # nothing is left to do
    assert len(steps) == last
    assert "answer tokens are already there" in capsys.readouterr().err
    assert (data / "manifest.json").read_bytes() == manifest
    assert (run / CHECKPOINT).exists()
    curve = [json.loads(line)["step"] for line in (run / CURVE).read_text().splitlines()]
    assert curve[0] == 0
    assert curve[-1] == last
    again = load_file(head / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights | again)

    assert weights["d2t"].shape == (128,)
    assert ("lm_head.weight" in weights) == (not flags)

    more = [*words, "--init-head", str(head), "--phase", "train", "--output", str(tmp_path / "more")]
    assert main([*more, "--run-dir", str(tmp_path / "no-step"), "--max-minutes", "0"]) == 0
    unmoved = load_file(tmp_path / "more" / "model.safetensors")
    assert all(torch.equal(unmoved[name], weights[name]) for name in weights | unmoved)
    assert main([*more, "--run-dir", str(tmp_path / "steps")]) == 0
    moved = load_file(tmp_path / "more" / "model.safetensors")
    assert not torch.equal(moved["fc.weight"], weights["fc.weight"])
    assert "--init-head head" in (tmp_path / "more" / "README.md").read_text()
    other = [*more, "--run-dir", str(tmp_path / "other"), "--draft-vocab", "64", "--max-minutes", "0"]
    if flags:  # the target's output rows suit any draft vocabulary
        assert main(other) == 0
        fewer = load_file(tmp_path / "more" / "model.safetensors")
        assert fewer["d2t"].shape == (64,)
        assert int(fewer["t2d"].sum()) == 64
        assert torch.equal(fewer["fc.weight"], weights["fc.weight"])
        assert "lm_head.weight" not in fewer
    else:
        assert main(other) == 1
        assert "its draft_vocab_size is 128, this run has 64" in capsys.readouterr().err

    plain = greedy_tokens(target, "none", SPECULATION_OFF)
    assert [len(tokens) for tokens in plain] == [32] * 3
    assert greedy_tokens(target, str(head), Speculation(8, 3, 2)) == plain


def test_a_device_that_is_none_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "missing"), "--device", "cpu:abc"]) == 1
    assert "--device is 'cpu:abc', expected cpu or cuda" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_used_where_the_kernels_have_it(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(options, "has_fast_bfloat16", lambda: fast)
    assert options.bfloat16_is_fast("cpu") == fast
    assert options.bfloat16_is_fast("cuda:1")


def test_every_token_is_computed_where_features_are_recorded(tmp_path: Path) -> None:
    """Questions begin alike; a prefix cache would spare the engine what the recorder is there for."""
    checkpoint = open_checkpoint(str(write_target(tmp_path, "hf")))
    engine = recording_engine(
        checkpoint, checkpoint.tokenizer(), FeatureRecorder(), (0,), DataSettings(max_model_len=64), "cpu"
    )
    requests = [Request(number, tuple(range(40)), SamplingParams(max_tokens=2)) for number in range(2)]
    for request in requests:
        engine.add(request)
        while engine.has_work:
            engine.step()
        assert isinstance(engine.draft, FeatureRecorder)
        assert len(engine.draft.take(request.id).features) == 41
