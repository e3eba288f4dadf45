"""The second oracle: what every pool held after every step against a computation from scratch.

It returns a number, so that a test can show it to fail: the largest difference found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.config import LlamaConfig
from tests.engine.rig import FEATURE_LAYERS, Model, Recording
from tests.oracles import eagle3
from tests.oracles.eagle3 import HeadRows
from tests.oracles.llama import Forward, causal_attention, forward, frequencies, rms_norm, rotate, swiglu

TOLERANCE = 2e-4


def eagle_rows(
    config: LlamaConfig, weights: Mapping[str, Tensor], model: Model, tokens: Sequence[int], features: Tensor
) -> tuple[HeadRows, list[Tensor], list[Tensor]]:
    """An EAGLE-1 head over a list of rows, no cache: rows 1..R with their tokens and features ([R, H]).

    Returns the last layer's rows and per layer the keys and values; ``hidden`` is the next feature.
    """
    length, eps, freqs = len(tokens), config.rms_norm_eps, frequencies(config)
    embedded = model.weights["model.embed_tokens.weight"][list(tokens)]
    hidden = torch.cat([embedded, features], dim=-1) @ weights["fc.weight"].T
    hidden = hidden + weights.get("fc.bias", torch.zeros(1))
    all_keys, all_values = [], []
    for layer in range(config.num_layers):
        name = f"layers.{layer}."
        first = weights.get(name + "input_layernorm.weight")
        rows = hidden if first is None else rms_norm(hidden, first, eps)
        query = (rows @ weights[name + "self_attn.q_proj.weight"].T).view(length, config.num_heads, -1)
        keys = (rows @ weights[name + "self_attn.k_proj.weight"].T).view(length, config.num_kv_heads, -1)
        values = (rows @ weights[name + "self_attn.v_proj.weight"].T).view(length, config.num_kv_heads, -1)
        query, keys = rotate(query, range(length), freqs), rotate(keys, range(length), freqs)
        hidden = hidden + causal_attention(query, keys, values) @ weights[name + "self_attn.o_proj.weight"].T
        hidden = hidden + swiglu(
            rms_norm(hidden, weights[name + "post_attention_layernorm.weight"], eps),
            weights[name + "mlp.gate_proj.weight"],
            weights[name + "mlp.up_proj.weight"],
            weights[name + "mlp.down_proj.weight"],
        )
        all_keys.append(keys)
        all_values.append(values)
    last = rms_norm(hidden, weights["norm.weight"], eps) if "norm.weight" in weights else hidden
    logits = last @ model.weights["lm_head.weight"].T
    return HeadRows(logits, hidden, all_keys[-1], all_values[-1]), all_keys, all_values


def head_truth(model: Model, draft: str, tokens: Sequence[int], seen: Forward) -> Tensor:
    """[layers, 2, Hkv, T - 1, D]: the head's rows 1..T-1 from true features."""
    if draft == "eagle3":
        rows = eagle3.true_rows(
            model.eagle3_config,
            model.eagle3,
            model.weights["model.embed_tokens.weight"],
            tokens,
            torch.cat([seen.inputs[layer] for layer in FEATURE_LAYERS], dim=-1),
        )
        keys, values = [rows.keys], [rows.values]
    else:
        _, keys, values = eagle_rows(model.eagle_config, model.eagle, model, tokens[1:], seen.post_norm[:-1])
    return pool_layout(keys, values)


def pool_layout(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Per layer [T, Hkv, D] -> [layers, 2, Hkv, T, D]."""
    return torch.stack([torch.stack(pair) for pair in zip(keys, values, strict=True)]).transpose(2, 3)


def state_error(model: Model, recording: Recording, draft: str) -> float:
    """The largest difference between a pool's rows and the rows computed from the committed tokens.

    Rows depend on earlier tokens alone, so one computation over the longest token list of a request serves
    all its steps. draft: "eagle3" or "eagle" to look at the head's pool too.
    """
    worst = 0.0
    for request in {snapshot.request_id for snapshot in recording.snapshots}:
        mine = [snapshot for snapshot in recording.snapshots if snapshot.request_id == request]
        tokens = max((snapshot.tokens for snapshot in mine), key=len)
        seen = forward(model.config, model.weights, tokens)
        target = pool_layout(seen.keys, seen.values)
        head = (
            head_truth(model, draft, tokens, seen) if draft.startswith("eagle") and len(tokens) > 1 else None
        )
        for snapshot in mine:
            assert tokens[: len(snapshot.tokens)] == snapshot.tokens, "a committed token changed"
            pairs = [(snapshot.target_rows, target)]
            if snapshot.head_rows is not None:
                assert head is not None
                pairs.append((snapshot.head_rows, head))
            for held, truth in pairs:
                if held.shape[3]:
                    worst = max(worst, float((held - truth[:, :, :, : held.shape[3]]).abs().max()))
    return worst


def state_matches(model: Model, recording: Recording, draft: str) -> bool:
    return state_error(model, recording, draft) < TOLERANCE
