"""Mistral's own format: params.json and consolidated*.safetensors, of the target and of its Eagle head.

How a matrix is stored is told by its tensors, not by the config: ``weight_packed`` with its scales is NVFP4,
a ``weight`` of type F8_E4M3 with ``qscale_weight`` is FP8, a ``weight`` by itself is plain. A file may mix
them (the published NVFP4 files quantise experts only); the experts of one layer's stack may not. The config's
quantisation block is read for what we do not implement. Tensors of one matrix may lie in different shards.

Every expert has its own file tensors and scales here, and they stay as stored. The vision encoder and the
input scales of NVFP4 are known and not read. Not for: AWQ or other compressed-tensors formats, consolidated
PyTorch pickles.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from engine.checkpoint.base import Progress, check_dtype
from engine.checkpoint.hub import local_directory, wants_native
from engine.checkpoint.mistral import read_head_params, read_params
from engine.checkpoint.mistral_tables import EAGLE_LINEAR, VisionShape, expected_weights
from engine.checkpoint.plan import (
    FP8,
    NVFP4_BLOCK,
    PACKED,
    PLAIN,
    Expected,
    Kind,
    Place,
    Plan,
    Planned,
    Planner,
    check_blocks,
    common_kind,
)
from engine.checkpoint.safetensors_header import Stored, read_shards, some
from engine.checkpoint.stream import load
from engine.config import Fields, Mistral4Config
from engine.errors import CheckpointError
from engine.nn.weight import Weight
from engine.text.tokenizer import read_json

if TYPE_CHECKING:
    from engine.text.mistral import MistralTokenizer

STEM: Final = "consolidated"
PARAMS: Final = "params.json"
NVFP4_FORMAT: Final = "nvfp4-pack-quantized"
_NVFP4_PARTS: Final = (".experts.", ".shared_experts.", ".feed_forward.")

_log = logging.getLogger(__name__)


def is_native(directory: Path) -> bool:
    """Whether a directory is best read in Mistral's format: it has the files, and no other way is better."""
    return wants_native(directory) and any(directory.glob(f"{STEM}*.safetensors"))


class NativeCheckpoint:
    """A directory with a Mistral Small 4 target in Mistral's format."""

    def __init__(self, path: Path, name: str) -> None:
        """Read params.json and all headers and decide what becomes of every tensor. Raises CheckpointError,
        ConfigError.
        """
        self.path, self.name = path, name
        params = read_json(path / PARAMS)
        where = str(path / PARAMS)
        self.config: Mistral4Config = read_params(params, where)
        vision = VisionShape.from_params(params, where)
        self.stored: Mapping[str, Stored] = read_shards(path, STEM)
        planner = Planner(self.stored, path)
        _plan_weights(planner, self.config, _static_input_scales(params, where))
        if vision is not None and any(map(planner.peek, vision.native_tensors())):
            for tensor, shape in vision.native_tensors().items():
                planner.unread(tensor, shape, PLAIN)
        self.plan: Plan = planner.finish("a Mistral Small 4 with this params.json")

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
        """Every weight of ``expected_weights(config)``. See ``MistralCheckpoint.load``."""
        check_dtype(dtype)
        return load(self.plan, dtype, device, progress)

    def tokenizer(self) -> MistralTokenizer:
        """The tokenizer beside the weights, tekken.json. Raises CheckpointError."""
        return read_tokenizer(self.path, self.config)


@dataclass(frozen=True, slots=True)
class MistralHead:
    """An Eagle head on disk; its config and headers are read, its weights are not."""

    path: Path
    config: Mistral4Config  # num_experts is 0
    stored: Mapping[str, Stored]
    plan: Plan

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
        """``eagle_linear.weight``, the layers, ``norm.weight`` unless the file has none (the identity), and
        ``tok_embeddings.weight`` or ``output.weight`` where the file repeats them in the config's shapes.

        dtype: of unquantised weights. Raises CheckpointError.
        """
        check_dtype(dtype)
        return load(self.plan, dtype, device, progress)


def read_mistral_head(path: str | Path) -> MistralHead:
    """Read params.json and headers of an Eagle head in Mistral's format: a directory or a hub name.

    Tolerant where published heads may differ: without ``norm.weight`` (logged as a warning),
    ``eagle_linear`` plain or with scales, with a copy of the target's embedding or output. Anything else that
    is missing, extra or misshapen is a CheckpointError; an unsupported config value a ConfigError.
    """
    directory, _ = local_directory(path)
    if not (directory / PARAMS).is_file():
        raise CheckpointError(f"head {directory}: no {PARAMS}, expected it beside {STEM}.safetensors")
    params = read_json(directory / PARAMS)
    where = str(directory / PARAMS)
    config = read_head_params(params, where)
    stored = read_shards(directory, STEM)
    if EAGLE_LINEAR not in stored:
        raise CheckpointError(
            f"{directory}: tensor {EAGLE_LINEAR} is missing, expected in an Eagle head; found "
            f"{some(stored) or 'no tensors'}"
        )
    planner = Planner(stored, directory)
    expected = expected_weights(config)
    if "norm.weight" not in stored:
        _log.warning("%s: the head has no norm.weight; its output is used as it is", directory)
        del expected["norm.weight"]
    for name in ("tok_embeddings.weight", "output.weight"):
        shape = (config.vocab_size, config.hidden_size)
        if name in stored and stored[name].shape == shape:
            expected[name] = Expected(shape)
        elif name in stored:
            _log.warning(
                "%s: tensor %s has shape %s, not %s; the target's is used instead",
                stored[name].file, name, list(stored[name].shape), list(shape),
            )  # fmt: skip
            planner.unread(name, stored[name].shape, PLAIN)
    _plan_weights(planner, config, _static_input_scales(params, where), expected)
    return MistralHead(directory, config, stored, planner.finish("an Eagle head with this params.json"))


def read_tokenizer(directory: Path, config: Mistral4Config) -> MistralTokenizer:
    """tekken.json of a Mistral Small 4 directory, whichever its weights' format. Raises CheckpointError."""
    from engine.text.mistral import MistralTokenizer  # here, because mistral-common is slow to import

    file = directory / "tekken.json"
    if not file.is_file():
        found = sorted(entry.name for entry in directory.glob("*token*"))
        raise CheckpointError(f"{directory}: no tekken.json, found {', '.join(found) or 'no tokenizer file'}")
    tokenizer = MistralTokenizer.from_file(file)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{file}: the tokenizer has {tokenizer.vocab_size} tokens, expected at most the "
            f"{config.vocab_size} that the model has embeddings for"
        )
    return tokenizer


def announced_weights(config: Mistral4Config, params: Mapping[str, Any], path: Path) -> dict[str, Planned]:
    """Every weight of a model without files, stored as its params.json announces: with ``quantization`` all
    products in FP8, with ``quantization_config`` those of experts and MLPs in NVFP4, else plain.

    path: of the params.json. Raises ConfigError for quantisation that we do not implement.
    """
    fields = Fields(params, str(path))
    has_inputs = _static_input_scales(params, str(path))
    is_fp8, is_nvfp4 = bool(fields.inner("quantization").raw), bool(fields.inner("quantization_config").raw)
    if is_fp8 and is_nvfp4:
        raise fields.error("quantization_config", "only one of quantization and quantization_config")
    planned: dict[str, Planned] = {}
    for name, weight in expected_weights(config).items():
        kind: Kind = "plain"
        if weight.is_linear and is_fp8:
            kind = "fp8"
        elif weight.is_linear and is_nvfp4 and any(part in name for part in _NVFP4_PARTS):
            kind = "nvfp4"
            check_blocks(name, weight.shape, path)
        planned[name] = Planned(weight, kind, has_input_scale=kind == "fp8" and has_inputs)
    return planned


def _static_input_scales(params: Mapping[str, Any], where: str) -> bool:
    """Whether FP8 matrices come with the scales of their inputs. Refuses quantisation we do not implement."""
    fields = Fields(params, where)
    ours = fields.inner("quantization")
    ours.refuse_all_but({"qformat_weight": ("fp8_e4m3",), "qscheme_act": ("TENSOR", "NO_SCALES")})
    compressed = fields.inner("quantization_config")
    if compressed.raw:
        for key, expected in (("quant_method", "compressed-tensors"), ("format", NVFP4_FORMAT)):
            if compressed.text(key, "") != expected:
                raise compressed.error(key, f"{expected!r}")
        compressed.refuse_all_but({"kv_cache_scheme": ()})
        groups = compressed.inner("config_groups")
        for group in groups.raw:
            groups.inner(group).inner("weights").refuse_all_but(
                {"num_bits": (4,), "type": ("float",), "group_size": (NVFP4_BLOCK,)}
            )
    return ours.raw.get("qscheme_act") != "NO_SCALES"


def _plan_weights(
    planner: Planner,
    config: Mistral4Config,
    static_inputs: bool,
    expected: Mapping[str, Expected] | None = None,
) -> None:
    """Find the stored tensors of every weight. expected: of what, all that the config asks for if None."""
    planner.expect_at_least(config.num_layers * max(config.num_experts, 1))
    for name, weight in (expected_weights(config) if expected is None else expected).items():
        modules = _modules(name, weight)
        kinds = {module: kind for module in modules if (kind := _kind(planner, module)) is not None}
        kind = common_kind(kinds, planner.where) if weight.is_linear else "plain"
        planner.weight(name, weight, kind, has_input_scale=kind == "fp8" and static_inputs)
        for expert, module in enumerate(modules):
            _plan_matrix(planner, name, module, expert if weight.num_experts else None)


def _modules(name: str, weight: Expected) -> list[str]:
    """Stored names without ``.weight``: one, or one for each expert of ``layers.N.experts.w1``."""
    if not weight.num_experts:
        return [name.removesuffix(".weight")]
    stack, _, part = name.rpartition(".")
    return [f"{stack}.{expert}.{part}" for expert in range(weight.num_experts)]


def _kind(planner: Planner, module: str) -> Kind | None:
    """How one matrix is stored, None if it is not there."""
    if planner.peek(f"{module}.weight_packed") is not None:
        return "nvfp4"
    weight = planner.peek(f"{module}.weight")
    if planner.peek(f"{module}.qscale_weight") is not None or (weight is not None and weight.dtype in FP8):
        return "fp8"
    return None if weight is None else "plain"


def _plan_matrix(planner: Planner, name: str, module: str, expert: int | None) -> None:
    """Use the stored tensors of one matrix or vector; its weight has been announced."""
    planned = planner.announced(name)
    shape = planned.expected.shape
    if planned.kind == "plain":
        planner.data(f"{module}.weight", shape, PLAIN, Place(name, "values", expert))
    elif planned.kind == "fp8":
        planner.data(f"{module}.weight", shape, FP8, Place(name, "codes", expert))
        planner.scale(f"{module}.qscale_weight", 0, Place(name, "scale", expert))
        if planned.has_input_scale:
            planner.scale(f"{module}.qscale_act", 0, Place(name, "input_scale", expert))
    else:
        rows, columns = shape
        check_blocks(module, shape, planner.where)
        planner.data(f"{module}.weight_packed", (rows, columns // 2), PACKED, Place(name, "codes", expert))
        blocks = (rows, columns // NVFP4_BLOCK)
        planner.data(f"{module}.weight_scale", blocks, FP8, Place(name, "block_scales", expert))
        planner.scale(f"{module}.weight_global_scale", 0, Place(name, "divisor", expert))
        planner.unread_scale(f"{module}.input_global_scale")
