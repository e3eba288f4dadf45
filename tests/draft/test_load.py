"""Head checkpoints: every layout that is read, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from draft.eagle import EagleModel
from draft.eagle3 import Eagle3Model
from draft.load import published_feature_layers, read_head
from engine.config import POST_NORM
from engine.core import SamplingParams
from engine.errors import CheckpointError, ConfigError
from engine.models.llama import Llama
from engine.pages import PagePool
from engine.step import Engine
from tests.conftest import tiny_eagle3
from tests.engine.rig import (
    FEATURE_LAYERS,
    TREE,
    Model,
    copies,
    echo_model,
    make_engine,
    plain_tokens,
    prompts_of,
)

MODEL: Model = echo_model(1)
Weights = dict[str, Tensor]
Raw = dict[str, Any]


def eagle3_files() -> tuple[Raw, Weights]:
    raw, _ = tiny_eagle3(MODEL.config, 0, 90)
    return raw, copies(MODEL.eagle3)


def eagle_files() -> tuple[Raw, Weights]:
    raw, _ = tiny_eagle3(MODEL.config)
    kept = {key: value for key, value in raw.items() if key not in ("draft_vocab_size", "eagle_config")}
    return kept | {"architectures": ["LlamaForCausalLM"]}, copies(MODEL.eagle)


def save(path: Path, raw: Raw, weights: Weights, name: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path / name)
    return path


def target(layers: tuple[int, ...] = FEATURE_LAYERS, model: Model = MODEL) -> Llama:
    return Llama(model.config, copies(model.weights), 200, layers)


def answers(path: Path) -> tuple[list[tuple[int, ...]], int]:
    """Tokens and acceptances of an engine with a head read from disk."""
    checkpoint = read_head(path)
    engine = make_engine(MODEL)
    built = Llama(MODEL.config, copies(MODEL.weights), 120 * 4, checkpoint.feature_layers)
    engine = Engine(engine.config, built, checkpoint.build(built, 120 * 4), PagePool(120, 4), ())
    got = engine.generate(prompts_of([5, 12]), SamplingParams(temperature=0, max_tokens=12), TREE)
    return [c.token_ids for c in got], sum(c.num_accepted for c in got)


def expected(draft: str) -> tuple[list[tuple[int, ...]], int]:
    got = make_engine(MODEL, draft).generate(
        prompts_of([5, 12]), SamplingParams(temperature=0, max_tokens=12), TREE
    )
    params = [SamplingParams(temperature=0, max_tokens=12)] * 2
    tokens = [c.token_ids for c in got]
    assert tokens == plain_tokens(MODEL, prompts_of([5, 12]), params)
    return tokens, sum(c.num_accepted for c in got)


# --- layouts --------------------------------------------------------------------------------------


def renamed(weights: Weights, old: str, new: str) -> Weights:
    return {name.replace(old, new): tensor for name, tensor in weights.items()}


LAYOUTS: dict[str, Callable[[Weights], Weights]] = {
    "SafeAILab": lambda w: w,
    "layers.0": lambda w: renamed(w, "midlayer.", "layers.0."),
    "model prefix": lambda w: {f"model.{name}": tensor for name, tensor in w.items()},
    "own embedding": lambda w: (
        w | {"embed_tokens.weight": MODEL.weights["model.embed_tokens.weight"].clone()}
    ),
    "no t2d": lambda w: {name: tensor for name, tensor in w.items() if name != "t2d"},
    "shared lm_head": lambda w: {name: tensor for name, tensor in w.items() if name != "lm_head.weight"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eagle_3_layouts(tmp_path: Path, layout: str) -> None:
    """All of them are the same head (the echo head's lm_head is the target's), so they draft the same."""
    raw, weights = eagle3_files()
    path = save(tmp_path / "head", raw, LAYOUTS[layout](weights))
    checkpoint = read_head(path)
    assert (checkpoint.kind, checkpoint.feature_layers, checkpoint.draft_vocab_size) == (
        "eagle3",
        (0, 1, 2),
        90,
    )
    draft = checkpoint.build(target(), 40)
    assert isinstance(draft.model, Eagle3Model)
    assert draft.name == "eagle3 (head)"
    assert answers(path) == expected("eagle3")


def test_a_whole_draft_vocabulary_needs_no_d2t(tmp_path: Path) -> None:
    raw, weights = eagle3_files()
    weights = {
        name: tensor for name, tensor in weights.items() if name not in ("d2t", "t2d", "lm_head.weight")
    }
    path = save(tmp_path, raw | {"draft_vocab_size": 97}, weights)
    draft = read_head(path).build(target(), 40)
    assert draft.model.token_ids.tolist() == list(range(97))


def test_d2t_is_an_offset() -> None:
    draft = make_engine(MODEL, "eagle3").draft
    ids = draft.model.token_ids.tolist()  # type: ignore[attr-defined]
    assert ids == MODEL.eagle3["t2d"].nonzero()[:, 0].tolist()


def test_the_eagle_1_layout(tmp_path: Path) -> None:
    raw, weights = eagle_files()
    path = save(tmp_path / "head", raw, weights | {"lm_head.weight": MODEL.weights["lm_head.weight"].clone()})
    checkpoint = read_head(path)
    assert (checkpoint.kind, checkpoint.feature_layers) == ("eagle", (POST_NORM,))
    draft = checkpoint.build(target((POST_NORM,)), 40)
    assert isinstance(draft.model, EagleModel)
    assert answers(path) == expected("eagle")


def test_weights_in_several_files(tmp_path: Path) -> None:
    raw, weights = eagle3_files()
    names = sorted(weights)
    save(tmp_path, raw, {name: weights[name] for name in names[:7]}, "model-00001-of-00002.safetensors")
    save(tmp_path, raw, {name: weights[name] for name in names[7:]}, "model-00002-of-00002.safetensors")
    assert answers(tmp_path) == expected("eagle3")


def test_a_shorter_head_context_does_not_limit_the_target(tmp_path: Path) -> None:
    """Published heads say 2048 where their targets take 128k; positions go as far as the target's."""
    raw, weights = eagle3_files()
    path = save(tmp_path, raw | {"max_position_embeddings": 10}, weights)
    assert answers(path) == expected("eagle3")


def test_the_vocabulary_of_an_eagle_1_head_is_the_targets(tmp_path: Path) -> None:
    raw, weights = eagle_files()
    path = save(tmp_path, raw | {"vocab_size": 90}, weights)
    assert answers(path) == expected("eagle")


def test_published_feature_layers() -> None:
    assert published_feature_layers(32) == (2, 16, 29)


def test_feature_layers_from_the_config(tmp_path: Path) -> None:
    raw, weights = eagle3_files()
    raw["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    assert read_head(save(tmp_path, raw, weights)).feature_layers == (1, 2, 3)
    del raw["eagle_config"]
    assert read_head(save(tmp_path, raw, weights)).feature_layers == ()
    raw["eagle_aux_hidden_state_layer_ids"] = [0, 1, 3]
    assert read_head(save(tmp_path, raw, weights)).feature_layers == (0, 1, 3)


# --- what is wrong, and what the message says -----------------------------------------------------


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda w: {key: tensor for key, tensor in w.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda w: w | {name: change(w[name])}


def put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


def same_target(d2t: Tensor) -> Tensor:
    ids = torch.arange(len(d2t)) + d2t
    ids[3] = ids[2]
    return ids - torch.arange(len(d2t))


BAD_WEIGHTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (without("midlayer.mlp.up_proj.weight"), r"missing tensors \['midlayer.mlp.up_proj.weight'\]"),
    "unexpected": (lambda w: w | {"extra.weight": torch.ones(2)}, r"unexpected tensors \['extra.weight'\]"),
    "misshapen": (
        changed("fc.weight", lambda t: t[:, :64]),
        r"'fc.weight' has shape \(32, 64\), expected \(32, 96\)",
    ),
    "nan": (
        changed("norm.weight", put(3, float("nan"))),
        r"model.safetensors: tensor 'norm.weight' holds NaN or infinite",
    ),
    "infinite": (changed("fc.weight", put(5, float("inf"))), r"tensor 'fc.weight' holds NaN or infinite"),
    "d2t too far": (changed("d2t", put(89, 60)), r"d2t points to tokens \d+..149, the target has 0..96"),
    "d2t negative": (changed("d2t", put(0, -1)), r"d2t points to tokens -1..\d+, the target has 0..96"),
    "d2t twice": (changed("d2t", same_target), r"d2t maps two draft tokens to the same target token"),
    "d2t short": (changed("d2t", lambda t: t[:-1]), r"'d2t' has shape \(89,\), expected \(90,\)"),
    "d2t missing": (without("d2t"), r"'d2t' is missing, though draft_vocab_size is 90 of 97"),
    "t2d elsewhere": (
        changed("t2d", lambda t: t.roll(1)),
        r"t2d and d2t do not name the same draft vocabulary",
    ),
    "t2d too many": (changed("t2d", torch.ones_like), r"t2d and d2t do not name the same draft vocabulary"),
    "t2d short": (changed("t2d", lambda t: t[:-1]), r"'t2d' has shape \(96,\), expected \(97,\)"),
    "embedding": (
        lambda w: w | {"embed_tokens.weight": torch.ones(5, 32)},
        r"shape \(5, 32\), expected \(97, 32\)",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_wrong_weights(tmp_path: Path, name: str) -> None:
    raw, weights = eagle3_files()
    change, message = BAD_WEIGHTS[name]
    checkpoint = read_head(save(tmp_path / "head", raw, change(weights)))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.build(target(), 40)
    assert str(tmp_path / "head") in str(caught.value)


def test_wrong_eagle_1_weights(tmp_path: Path) -> None:
    raw, weights = eagle_files()
    for bad, message in (
        (without("fc.weight")(weights), r"missing tensors \['fc.weight'\]"),
        (weights | {"layers.1.mlp.up_proj.weight": torch.ones(48, 32)}, r"unexpected tensors \['layers.1"),
        (weights | {"fc.bias": torch.ones(31)}, r"'fc.bias' has shape \(31,\), expected \(32,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_head(save(tmp_path, raw, bad)).build(target((POST_NORM,)), 40)


def test_another_targets_head(tmp_path: Path) -> None:
    raw, weights = eagle3_files()
    with pytest.raises(CheckpointError, match=r"config.json: the head's hidden_size is 64, the target's 32"):
        read_head(save(tmp_path, raw | {"hidden_size": 64}, weights)).build(target(), 40)


def test_wrong_configs(tmp_path: Path) -> None:
    raw, weights = eagle3_files()
    with pytest.raises(CheckpointError, match=r"config.json: num_hidden_layers is 2, EAGLE-3 heads have 1"):
        read_head(save(tmp_path, raw | {"num_hidden_layers": 2}, weights))
    with pytest.raises(ConfigError, match=r"config.json: hidden_act is 'gelu', supported: 'silu'"):
        read_head(save(tmp_path, raw | {"hidden_act": "gelu"}, weights))
    with pytest.raises(ConfigError, match=r"config.json: required key 'hidden_size' is missing"):
        read_head(save(tmp_path, {key: value for key, value in raw.items() if key != "hidden_size"}, weights))


@pytest.mark.parametrize("text", [b"[1, 2", b"[1]", b'"\xff"', b'{"a": ' + b"[" * 100_000])
def test_configs_that_are_no_json_objects(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config.json: not a JSON object"):
        read_head(tmp_path)


LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
BAD_VALUES: list[tuple[Raw, str]] = [
    ({"eagle_config": 7}, "eagle_config is 7, expected a JSON object"),
    ({"eagle_config": [LAYER_IDS]}, f"eagle_config is ['{LAYER_IDS}'], expected a JSON object"),
    *(
        (keys, f"{prefix}{LAYER_IDS} is {ids!r}, expected three layer numbers")
        for ids in (3, "1,2,3", [], [1, 2], [1, 2, 3, 4], [1, 2, "3"], [1, 2, True], [-2, 1, 2], {"0": 1})
        for prefix, keys in (
            ("", {"eagle_config": None, LAYER_IDS: ids}),
            ("eagle_config.", {"eagle_config": {LAYER_IDS: ids}}),
        )
    ),
    *(
        ({"draft_vocab_size": size}, f"draft_vocab_size is {size!r}, expected a whole number from 1 to 97")
        for size in ("x", -1, 0, 98, 10**30, 61.5, [61], True)
    ),
    ({"architectures": "Eagle3"}, "architectures is 'Eagle3', expected a list of names"),
    ({"architectures": {"0": "Eagle3"}}, "architectures is {'0': 'Eagle3'}, expected a list of names"),
    ({"architectures": [3]}, "architectures is [3], expected a list of names"),
    ({"norm_before_residual": True}, "norm_before_residual is True, supported: False"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_VALUES, ids=[message[:60] for _, message in BAD_VALUES])
def test_malformed_values(tmp_path: Path, keys: Raw, message: str) -> None:
    raw, _ = tiny_eagle3(MODEL.config)
    (tmp_path / "config.json").write_text(json.dumps(raw | keys))
    with pytest.raises(ConfigError) as caught:
        read_head(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {message}"


def test_values_that_may_be_null(tmp_path: Path) -> None:
    raw, _ = tiny_eagle3(MODEL.config)
    keys = {"architectures": None, "eagle_config": None, LAYER_IDS: None, "draft_vocab_size": None}
    (tmp_path / "config.json").write_text(json.dumps(raw | keys))
    head = read_head(tmp_path)
    assert (head.kind, head.feature_layers, head.draft_vocab_size) == ("eagle3", (), 97)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere: no such directory; expected a directory with config.json"
    ):
        read_head(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"the directory has no config.json"):
        read_head(tmp_path)
    raw, _ = eagle3_files()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file$"):
        read_head(tmp_path).build(target(), 40)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin is a pickle, which we do not load: convert it"
    ):
        read_head(tmp_path).build(target(), 40)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        read_head(tmp_path).build(target(), 40)
