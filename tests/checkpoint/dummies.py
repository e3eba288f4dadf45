"""What the tests of models without weights share: directories of configuration files alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.mistral_tables import VisionShape
from engine.checkpoint.synthetic_config import TINY, config_json, head_config, params_json
from engine.checkpoint.synthetic_tables import Layout
from engine.config import EngineConfig, Mistral4Config
from engine.core import Speculation
from engine.nn.weight import Weight
from tests.text.tekken import tekken_data

VOCAB = 1300  # a thousand control tokens and the 300 most frequent others
CONFIG = dataclasses.replace(TINY, vocab_size=VOCAB)


def describe(
    directory: Path, config: Mistral4Config, layout: Layout, vision: VisionShape | None = None
) -> Path:
    """A directory with params.json or config.json, as published with a layout, and nothing else."""
    directory.mkdir()
    kind = layout.partition("-")[2]
    write, name = (config_json, "config.json") if layout.startswith("hf") else (params_json, "params.json")
    raw = write(config, None if kind == "bf16" else kind, vision)
    (directory / name).write_text(json.dumps(raw))
    return directory


def dummy_pair(root: Path, layout: Layout, config: Mistral4Config = CONFIG) -> tuple[Path, Path]:
    target = describe(root / "target", config, layout)
    (target / "tekken.json").write_text(json.dumps(tekken_data(VOCAB - 1000)))
    head_layout: Layout = "native-bf16" if layout.endswith("bf16") else "native-fp8"
    return target, describe(root / "head", head_config(config), head_layout)


def settings(**changes: Any) -> EngineConfig:
    config = EngineConfig(
        max_model_len=128,
        max_num_seqs=4,
        page_size=4,
        kv_cache_memory=8 << 20,
        speculation=Speculation(6, 3, 2),
        dummy_weights=True,
    )
    return dataclasses.replace(config, **changes)


def tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Every tensor that weights consist of, by weight and part."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            found[name] = weight
            continue
        for part in dataclasses.fields(weight):
            if getattr(weight, part.name) is not None:
                found[f"{name} {part.name}"] = getattr(weight, part.name)
    return found
