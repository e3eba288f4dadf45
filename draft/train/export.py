"""Write a trained head as a checkpoint that any EAGLE-3 server can read, and a card saying how it was made.

model.safetensors   bfloat16, published names; lm_head.weight left out where its rows are the target's own
config.json         the head's shape and which hidden states it reads
curve.jsonl         held-out acceptance while training
README.md           the card
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft.train.evaluate import Acceptance
from draft.train.model import Eagle3Module, HeadConfig


@dataclass(frozen=True, slots=True)
class Card:
    """What the README says. Seconds are wall time of the two phases."""

    target: str
    command: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    documents: int
    answer_tokens: int
    coverage: float  # share of held-out answer tokens inside the draft vocabulary
    data_seconds: float
    train_seconds: float
    device: str
    acceptance: Acceptance


def export_head(
    directory: Path,
    head: Eagle3Module,
    max_positions: int,
    card: Card,
    curve: Path | None,
    share_lm_head: bool,
) -> None:
    """Write the directory. share_lm_head: leave out lm_head.weight, because its rows are the target's."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(head_tensors(head, share_lm_head), str(directory / "model.safetensors"), {"format": "pt"})
    config = json.dumps(head_config(head.config, max_positions), indent=2)
    (directory / "config.json").write_text(config + "\n", encoding="utf-8")
    points: list[dict[str, Any]] = []
    if curve is not None and curve.exists():
        if curve.resolve() != (directory / "curve.jsonl").resolve():
            shutil.copyfile(curve, directory / "curve.jsonl")
        points = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    (directory / "README.md").write_text(render_card(card, points), encoding="utf-8")


def head_tensors(head: Eagle3Module, share_lm_head: bool) -> dict[str, Tensor]:
    """Name -> host tensor in the published layout."""
    tensors = {}
    for name, value in head.state_dict().items():
        if share_lm_head and name == "lm_head.weight":
            continue
        stored = value.to(torch.bfloat16) if value.is_floating_point() else value
        tensors[name] = stored.detach().cpu().contiguous()
    return tensors


def head_config(config: HeadConfig, max_positions: int) -> dict[str, Any]:
    """The config.json of a head."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "torch_dtype": "bfloat16",
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.feature_layers),
            "use_aux_hidden_state": True,
        },
    }


def render_card(card: Card, points: Sequence[Mapping[str, Any]]) -> str:
    """The card in Markdown."""
    acceptance = card.acceptance
    depths = " | ".join(str(depth + 1) for depth in range(len(acceptance.by_depth)))
    values = " | ".join(f"{value:.3f}" for value in acceptance.by_depth)
    lengths = ", ".join(f"{value:.3f} with chains of {chain}" for chain, value in acceptance.lengths.items())
    data, settings = (json.dumps(dict(part), sort_keys=True) for part in (card.data, card.settings))
    text = f"""# EAGLE-3 head for {card.target}

Trained with haast on the target's own answers. To use it: `haast serve MODEL --spec-model DIRECTORY`.

## How it was made

```
{card.command}
```

- Data: {card.documents} conversations, {card.answer_tokens} answer tokens, every second answer greedy;
  {card.data_seconds / 60:.0f} minutes.
- Training: {card.train_seconds / 60:.0f} minutes.
- Device: {card.device}; torch {torch.__version__}, Python {platform.python_version()}.
- Data settings: `{data}`
- Training settings: `{settings}`

## Acceptance on held-out greedy answers

{acceptance.num_documents} conversations, {acceptance.num_tokens} tokens; chains of greedy draft tokens.

| depth | {depths} |
{"|---" * (len(acceptance.by_depth) + 1)}|
| accepted | {values} |

A share counts draft tokens whose predecessors in the chain were all accepted. Acceptance length, in tokens
emitted per step: {lengths}. The draft vocabulary covers {100 * card.coverage:.2f} % of the tokens of these
answers.

## Learning curve

| step | minutes | loss | depth 1 | depth 2 | length |
|---|---|---|---|---|---|
"""
    return text + "".join(_curve_row(point) for point in _thinned(points, 24))


def _curve_row(point: Mapping[str, Any]) -> str:
    by_depth = [f"{value:.3f}" for value in point["acceptance_by_depth"]]
    loss = "" if point["loss"] is None else f"{point['loss']:.3f}"
    cells = [
        str(point["step"]),
        f"{point['seconds'] / 60:.1f}",
        loss,
        *(by_depth + [""])[:2],
        f"{next(iter(point['acceptance_length'].values())):.3f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _thinned(points: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most ``most`` points, evenly spread, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
