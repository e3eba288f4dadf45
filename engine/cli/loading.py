"""From the flags to a loaded engine: the model and its head with a bar on stderr, and the first steps.

A model is served as its files store it; --quantization is a promise about them that is checked before.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch

from engine.build import Served, build
from engine.checkpoint import open_model
from engine.checkpoint.dummy import open_dummy
from engine.checkpoint.published import Quantised
from engine.cli.options import engine_config, model_name
from engine.cli.progress import LoadingBar, PhaseBar
from engine.cli.speculative import Asked, asked, check_method
from engine.config import EngineConfig, LlamaConfig
from engine.errors import ConfigError
from engine.memory import out_of_memory
from engine.step import Engine
from engine.warmup import warm_up

log = logging.getLogger("haast")

_QUANTIZATIONS: Final[Mapping[str, Quantised]] = {  # names that others have for how a checkpoint is stored
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "modelopt_fp4": "nvfp4",
    "compressed-tensors": "nvfp4",
}


def open_engine(args: argparse.Namespace) -> Served:
    """Load the model that the flags name, with a progress bar on stderr.

    Raises ConfigError or CheckpointError.
    """
    config, draft, model = engine_config(args), asked(args), model_name(args)
    _check_draft(draft, model, config)
    if args.quantization is not None:
        check_quantization(args.quantization, model, config.dummy_weights)
    num_read = 0
    started = time.perf_counter()
    with LoadingBar() as bar:

        def update(done: int, total: int) -> None:
            nonlocal num_read
            num_read = done
            bar.update(done, total)

        with enough_memory(config):
            served = build(model, draft.head, config, update)
    log.info(
        "Model loading took %.2f GiB and %.1f s: %s, %s, from %s",
        num_read / (1 << 30),
        time.perf_counter() - started,
        served.name,
        config.dtype_name,
        served.root,
    )
    with enough_memory(served.engine.config):
        prepare(served.engine)
    return served


@contextmanager
def enough_memory(config: EngineConfig) -> Iterator[None]:
    """Turns a failed allocation into a ConfigError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, config, *torch.cuda.mem_get_info(config.device)) from error


def prepare(engine: Engine) -> None:
    """Run the first steps; where they are captured, with a bar."""
    graphs = engine.graphs
    if not graphs.are_on:
        warm_up(engine)
        return
    with PhaseBar("Capturing graphs") as bar:
        warm_up(engine, bar.update)
    log.info(
        "Graph capturing took %.2f GiB and %.1f s: %d graphs, others when they are needed",
        graphs.num_bytes / (1 << 30),
        graphs.seconds,
        len(graphs.keys),
    )


def _check_draft(draft: Asked, model: str | None, config: EngineConfig) -> None:
    if draft.method in ("eagle", "eagle3") and draft.head is None and model is not None:
        raise ConfigError(f"--spec-method is {draft.method!r}, expected a draft head as --spec-model")
    check_method(draft, config.dummy_weights)


def check_quantization(name: str, model: str | None, dummy: bool = False) -> None:
    """ConfigError unless a model is stored in the way that --quantization names. Reads its headers, or for a
    dummy its config.
    """
    kind = quantization_kind(name)
    checkpoint = None if model is None else (open_dummy if dummy else open_model)(model)
    stored: set[str] = set()
    if checkpoint is not None and not isinstance(checkpoint.config, LlamaConfig):
        plan = checkpoint.plan
        stored = {planned.kind for planned in plan.weights.values() if planned.expected.is_linear}
    if kind not in stored:
        found = " and ".join(sorted(stored - {"plain"})) or "neither FP8 nor NVFP4"
        raise ConfigError(
            f"--quantization is {name!r}, but {model or 'the default model'} is stored as {found}; it is "
            "served as it is stored: leave the flag out"
        )


def quantization_kind(name: str) -> Quantised:
    """What a value of --quantization means. Raises ConfigError."""
    kind = _QUANTIZATIONS.get(name.lower())
    if kind is None:
        raise ConfigError(
            f"--quantization is {name!r}, expected {', '.join(_QUANTIZATIONS)}; a checkpoint is served as it "
            "is stored, so the flag can be left out"
        )
    return kind
