"""Dummies by name: the shape of what was published, and how it is stored, without a file of it.

    mistral-small-4         Mistral Small 4, 119B, in FP8 or NVFP4, and its Eagle head of two layers in FP8
    mistral-small-4-tiny    the same in small, which any machine holds

Both are described as their params.json would describe them (``synthetic_config``) and filled as ``dummy``
fills all that has no files. There is no tokenizer: for those who feed token ids and look at the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from engine.checkpoint.dummy import DummyMistral, DummyMistralHead
from engine.checkpoint.native import announced_weights
from engine.checkpoint.plan import Plan
from engine.checkpoint.synthetic_config import SMALL_4, TINY, head_config, params_json
from engine.config import Mistral4Config
from engine.errors import ConfigError

Quantised = Literal["fp8", "nvfp4"]

PUBLISHED: Final[Mapping[str, Mistral4Config]] = {"mistral-small-4": SMALL_4, "mistral-small-4-tiny": TINY}


def published_target(name: str, quantised: Quantised = "fp8") -> DummyMistral:
    """The target of that name, one of ``PUBLISHED``."""
    config, path = PUBLISHED[name], Path(name)
    weights = announced_weights(config, params_json(config, quantised, None), path)
    return DummyMistral(path, name, config, weights)


def published_head(name: str) -> DummyMistralHead:
    """The Eagle head of that target, in FP8 whatever the target is stored as."""
    config, path = head_config(PUBLISHED[name]), Path(f"{name}-eagle")
    weights = announced_weights(config, params_json(config, "fp8", None), path)
    return DummyMistralHead(path, config, {}, Plan(weights, (), ()))


def with_layers(dummy: DummyMistral, num_layers: int) -> DummyMistral:
    """A dummy cut to its first layers. Raises ConfigError if it has fewer."""
    most = dummy.config.num_layers
    if not 1 <= num_layers <= most:
        raise ConfigError(
            f"{dummy.name} has {most} layers, found {num_layers} asked for, expected 1 to {most}"
        )
    kept = {
        weight: planned
        for weight, planned in dummy.plan.weights.items()
        if not weight.startswith("layers.") or int(weight.split(".")[1]) < num_layers
    }
    config = dataclasses.replace(dummy.config, num_layers=num_layers)
    return DummyMistral(dummy.path, dummy.name, config, kept)
