"""transformers' Mistral 4 beside our steps: the time of one layer, from as many layers as the memory holds.

Its weights are bfloat16, twice the bytes of FP8, so all of its layers do not fit where ours do, and layers
are compared: the time of a few less that of one, over how many more they are. Ours is the whole forward of a
step over its number of layers, so that embedding, output and a context count against us; theirs has no
context. The tokens are a causal sequence, as a chain is.

transformers is optional. Without it, or with one that has no such model, the result says so.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, MistralCheckpoint
from engine.checkpoint.synthetic_config import config_json
from engine.config import EngineConfig, Mistral4Config

_MODULE: Final = "transformers.models.mistral4"
_CLASS: Final = "Mistral4Model"
_VOCAB: Final = 256
_MOST_LAYERS: Final = 5
_WIDTH: Final = 2  # bytes of a number in bfloat16
_SHARE: Final = 0.7  # of the free memory for weights
_CALLS: Final = 12
_COMPILED: Final = (1, 4)  # tokens: every size and every number of layers is compiled anew
_FAILURES: Final = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)


def per_layer(
    checkpoint: Checkpoint | MistralCheckpoint, config: EngineConfig, steps: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a layer, ours and theirs, by tokens; theirs eager, then compiled, which may take longer
    than there is time: yields what there is so far. steps: our figures, as in the result of the bench.

    ``missing`` says why, where there is nothing to compare with. Call when the engine's memory is free again.
    """
    model = checkpoint.config
    if not isinstance(model, Mistral4Config):
        yield {"missing": f"{checkpoint.name} is no Mistral Small 4"}
        return
    try:
        transformers, family = importlib.import_module("transformers"), importlib.import_module(_MODULE)
        build = getattr(family, _CLASS)
    except (ImportError, AttributeError) as error:
        yield {"missing": f"transformers with {_CLASS}: {error}"}
        return
    ours, num_layers = _ours(steps, model.num_layers), layers_that_fit(model, _free_bytes(config.device))
    if num_layers < 2:
        yield {"missing": f"memory for two layers in bfloat16, found room for {num_layers}"}
        return
    found: dict[str, Any] = {
        "peer": f"transformers {transformers.__version__}", "class": _CLASS, "dtype": "bfloat16",
        "num_layers": num_layers, "ours": {tokens: round(ms, 4) for tokens, ms in ours.items()},
    }  # fmt: skip
    try:
        theirs = _random_model(family.Mistral4Config, build, model, num_layers, config.device)
        found["eager"] = _layer_times(theirs, theirs, list(ours), config.device)
    except _FAILURES as error:
        yield found | {"missing": _said(error)}
        return
    yield found | {"compiled": "not yet"}
    yield found | {"compiled": _compiled(theirs, [size for size in ours if size in _COMPILED], config.device)}


def _compiled(theirs: Any, sizes: Sequence[int], device: str) -> dict[int, float] | str:
    """Their times once compiled, or why there are none."""
    if device == "cpu":
        return "on a GPU only"
    try:
        return _layer_times(theirs, torch.compile(theirs), sizes, device)
    except _FAILURES as error:
        return _said(error)


def layers_that_fit(config: Mistral4Config, num_bytes: int) -> int:
    """Layers in bfloat16 that so much memory holds, and never more than tell the time of one."""
    inner, experts = config.moe_intermediate_size, config.num_experts + config.num_shared_experts
    attention = config.hidden_size * (
        config.q_lora_rank + config.latent_dim + config.num_heads * config.v_head_dim
    )
    layer = _WIDTH * (3 * config.hidden_size * inner * experts + attention)
    return min(int(_SHARE * num_bytes) // layer, _MOST_LAYERS)


def _ours(steps: Sequence[Mapping[str, Any]], num_layers: int) -> dict[int, float]:
    """Tokens -> milliseconds of a single sequence's forward, over the layers, behind the shortest context."""
    alone = [row for row in steps if row["batch"] == 1 and row["routing"] == "uniform"]
    nearest = min((row["context"] for row in alone), default=0)
    return {row["nodes"]: row["verify_ms"] / num_layers for row in alone if row["context"] == nearest}


def _free_bytes(device: str) -> int:
    if device == "cpu":
        return 1 << 30  # as much as a trial on a CPU should take
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _random_model(
    config_class: Any, model_class: Any, config: Mistral4Config, num_layers: int, device: str
) -> Any:
    """Their decoder with random weights, filled where they lie."""
    raw = config_json(dataclasses.replace(config, vocab_size=_VOCAB, num_layers=num_layers), None, None)
    raw["text_config"].pop("model_type")
    raw["text_config"]["pad_token_id"] = 0
    with torch.device("meta"):
        model = model_class(config_class(**raw["text_config"])).to(torch.bfloat16)
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]))
    with torch.device(device):  # buffers are no parameters
        model.rotary_emb = type(model.rotary_emb)(model.config)
    return model.eval()


def _layer_times(
    model: Any, forward: Callable[..., Any], sizes: Sequence[int], device: str
) -> dict[int, float]:
    """Tokens -> milliseconds of a layer. forward: the model, or what was compiled of it."""
    num_layers = len(model.layers)
    whole = {tokens: _median_ms(forward, tokens, device) for tokens in sizes}
    model.config.num_hidden_layers = 1  # which its forward looks at
    one = {tokens: _median_ms(forward, tokens, device) for tokens in sizes}
    model.config.num_hidden_layers = num_layers
    return {tokens: round((whole[tokens] - one[tokens]) / (num_layers - 1), 4) for tokens in sizes}


@torch.inference_mode()
def _median_ms(forward: Callable[..., Any], num_tokens: int, device: str) -> float:
    """Of a forward over random tokens, other ones each time. Raises ValueError if a number is not finite."""
    prompts = [torch.randint(_VOCAB, (1, num_tokens), device=device) for _ in range(_CALLS)]
    hidden: Tensor = forward(input_ids=prompts[0], use_cache=False).last_hidden_state
    if not bool(hidden.isfinite().all()):
        raise ValueError(f"the peer's hidden states over {num_tokens} tokens are not finite")
    times = []
    for ids in prompts:
        _wait(device)
        started = time.perf_counter()
        forward(input_ids=ids, use_cache=False)
        _wait(device)
        times.append(time.perf_counter() - started)
    return 1e3 * median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
