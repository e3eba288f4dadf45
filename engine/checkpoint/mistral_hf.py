"""Mistral Small 4 in Hugging Face's format: config.json and model*.safetensors, FP8 or plain.

Three spellings of where the language model begins are read (``language_model.model.``, as published,
``model.language_model.``, as transformers names it in memory, and ``model.`` of a text-only model), two of
the scales (``*_scale_inv`` multiplies, in spite of its name), and experts fused or one by one.

    mlp.experts.gate_up_proj [E, 2I, H]    per expert I rows of w1 (gate), then I rows of w3 (up)
    mlp.experts.down_proj    [E, H, I]     w2

Fusing gave gate and up one scale: the writer of these files took the larger of the two and rounded again. So
the numbers differ from those of Mistral's own files by up to one FP8 step; nothing is requantised here. Not
for: AWQ, GPTQ, compressed-tensors (NVFP4 is read from Mistral's own format, ``checkpoint/native.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from engine.checkpoint.base import Progress, check_dtype
from engine.checkpoint.mistral import read_hf_config
from engine.checkpoint.mistral_tables import VisionShape, expected_weights
from engine.checkpoint.native import read_tokenizer
from engine.checkpoint.plan import FP8, PLAIN, Expected, Kind, Place, Plan, Planned, Planner, common_kind
from engine.checkpoint.safetensors_header import Shape, Stored, read_shards
from engine.checkpoint.stream import load
from engine.config import Fields, Mistral4Config
from engine.errors import CheckpointError
from engine.nn.weight import Weight
from engine.text.tokenizer import read_json

if TYPE_CHECKING:
    from engine.text.mistral import MistralTokenizer

MODEL_TYPES: Final = ("mistral3", "mistral4")

_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_HEAD_NAMES = ("language_model.lm_head.weight", "lm_head.weight")
_LAYER = re.compile(r"layers\.\d+\.")
_VISION = re.compile(r"(?:model\.)?((?:vision_tower|multi_modal_projector)\..+)")

# Canonical module -> theirs; behind ``layers.N.`` unless at the top.
_MODULES: Final[Mapping[str, str]] = {
    "tok_embeddings": "embed_tokens",
    "norm": "norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
}
_EXPERT_PARTS: Final[Mapping[str, str]] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# What follows a module's name; a fused one has no ``.weight``. The published spelling stands first.
_WEIGHT_SCALES: Final = (".weight_scale_inv", ".weight_scale")
_INPUT_SCALES: Final = (".activation_scale", ".input_scale")
_FUSED_WEIGHT_SCALES: Final = ("_scale_inv", "_weight_scale")
_FUSED_INPUT_SCALES: Final = ("_activation_scale", "_input_scale")


class MistralHfCheckpoint:
    """A directory with a Mistral Small 4 target in Hugging Face's format."""

    def __init__(self, path: Path, name: str) -> None:
        """Read config.json and all headers and decide what becomes of every tensor. Raises CheckpointError,
        ConfigError.
        """
        self.path, self.name = path, name
        raw = read_json(path / "config.json")
        where = str(path / "config.json")
        self.config: Mistral4Config = read_hf_config(raw, where)
        vision = VisionShape.from_hf(raw, self.config.hidden_size, where)
        self.stored: Mapping[str, Stored] = read_shards(path, "model")
        plain, prefix = _without_prefixes(self.stored)
        planner = Planner(plain, path, lambda name: _with_prefix(name, prefix))
        planner.expect_at_least(self.config.num_layers)
        static_inputs = _static_input_scales(raw, where)
        _plan_weights(planner, self.config, static_inputs)
        if vision is not None and any(map(planner.peek, vision.hf_tensors())):
            for tensor, shape in vision.hf_tensors().items():
                planner.unread(tensor, shape, PLAIN)
        self.plan: Plan = planner.finish("a Mistral Small 4 with this config.json")

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
        """Every weight of ``expected_weights(config)``. See ``MistralCheckpoint.load``."""
        check_dtype(dtype)
        return load(self.plan, dtype, device, progress)

    def tokenizer(self) -> MistralTokenizer:
        """The tokenizer beside the weights, tekken.json. Raises CheckpointError."""
        return read_tokenizer(self.path, self.config)


def announced_weights(config: Mistral4Config, raw: Mapping[str, Any], path: Path) -> dict[str, Planned]:
    """Every weight of a model without files, stored as its config.json announces: products in FP8 if it has a
    quantization_config, else plain. path: of the config.json. Raises ConfigError.
    """
    has_inputs = _static_input_scales(raw, str(path))
    fp8: Kind = "fp8" if Fields(raw, str(path)).inner("quantization_config").raw else "plain"
    return {
        name: Planned(weight, fp8, has_inputs) if weight.is_linear else Planned(weight, "plain")
        for name, weight in expected_weights(config).items()
    }


def _static_input_scales(raw: Mapping[str, Any], where: str) -> bool:
    """Whether FP8 matrices come with the scales of their inputs. Refuses quantisation we do not implement."""
    quantization = Fields(raw, where).inner("quantization_config")
    if not quantization.raw:
        return False
    if quantization.text("quant_method", "") != "fp8":
        raise quantization.error(
            "quant_method", "'fp8'; NVFP4 is read from params.json and consolidated files"
        )
    quantization.refuse_all_but({"activation_scheme": ("static", "dynamic"), "weight_block_size": ()})
    return quantization.text("activation_scheme", "dynamic") == "static"


def _without_prefixes(stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], str]:
    """Tensors by their names inside the language model (``layers.0...``), and the prefix that most had."""
    plain: dict[str, Stored] = {}
    prefixes = dict.fromkeys(_TEXT_PREFIXES, 0)
    for name, tensor in stored.items():
        short = name
        vision = _VISION.fullmatch(name)
        prefix = next((prefix for prefix in _TEXT_PREFIXES if name.startswith(prefix)), None)
        if vision is not None:
            short = vision[1]
        elif name in _HEAD_NAMES:
            short = _HEAD_NAMES[-1]
        elif prefix is not None:
            short = name.removeprefix(prefix)
            prefixes[prefix] += 1
        if short in plain:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is also stored as {plain[short].name}, expected once"
            )
        plain[short] = tensor
    return plain, max(prefixes, key=lambda prefix: prefixes[prefix])


def _with_prefix(name: str, prefix: str) -> str:
    """The stored name of a tensor that is not there, for a message."""
    if name == _HEAD_NAMES[-1]:
        return _HEAD_NAMES[0] if prefix == _TEXT_PREFIXES[0] else name
    return name if _VISION.fullmatch(name) else prefix + name


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A stored matrix, or with ``fused`` those of all experts of a layer."""

    module: str
    fused: bool = False

    @property
    def is_gate_up(self) -> bool:
        return self.module.endswith(".gate_up_proj")

    @property
    def data(self) -> str:
        return self.module if self.fused else f"{self.module}.weight"

    @property
    def weight_scales(self) -> list[str]:
        """Names that its scale may have."""
        return [self.module + name for name in (_FUSED_WEIGHT_SCALES if self.fused else _WEIGHT_SCALES)]

    @property
    def input_scales(self) -> list[str]:
        return [self.module + name for name in (_FUSED_INPUT_SCALES if self.fused else _INPUT_SCALES)]


def _plan_weights(planner: Planner, config: Mistral4Config, static_inputs: bool) -> None:
    """Find the stored tensors of every weight. static_inputs: FP8 matrices must have scales of their inputs,
    which are used where they happen to exist otherwise.
    """
    sources: dict[str, list[_Matrix]] = {}
    for name, weight in expected_weights(config).items():  # look first: a fused matrix serves two weights
        matrices = sources[name] = _matrices(planner, name, weight)
        kind = _common_kind(planner, matrices) if weight.is_linear else "plain"
        has_inputs = static_inputs or any(map(planner.peek, matrices[0].input_scales))
        planner.weight(name, weight, kind, has_input_scale=kind == "fp8" and has_inputs)
    for name, matrices in sources.items():
        planned = planner.announced(name)
        shape, num_experts = planned.expected.shape, planned.expected.num_experts
        if matrices[0].is_gate_up:
            if name.endswith(".w1"):
                names, fused = (name, name.removesuffix("1") + "3"), (num_experts, 2 * shape[0], shape[1])
                _plan_matrix(planner, matrices[0], fused, num_experts, names, None)
        elif matrices[0].fused:
            _plan_matrix(planner, matrices[0], planned.expected.stacked, num_experts, (name,), None)
        else:
            for expert, matrix in enumerate(matrices):
                _plan_matrix(planner, matrix, shape, 0, (name,), expert if num_experts else None)


def _matrices(planner: Planner, name: str, weight: Expected) -> list[_Matrix]:
    """Where the numbers of a weight are stored: in one place, or in one for each expert."""
    layer, module = _split(name)
    if not weight.num_experts:
        return [_Matrix(layer + _MODULES[module.removesuffix(".weight")])]
    part, stack = _EXPERT_PARTS[module.removeprefix("experts.")], f"{layer}mlp.experts."
    if planner.peek(f"{stack}0.{part}.weight") is not None:
        return [_Matrix(f"{stack}{expert}.{part}") for expert in range(weight.num_experts)]
    return [_Matrix(stack + ("down_proj" if part == "down_proj" else "gate_up_proj"), fused=True)]


def _split(name: str) -> tuple[str, str]:
    """A canonical name as (``layers.N.`` or nothing, the rest)."""
    found = _LAYER.match(name)
    return ("", name) if found is None else (found[0], name[found.end() :])


def _common_kind(planner: Planner, matrices: Sequence[_Matrix]) -> Kind:
    kinds: dict[str, Kind] = {}
    for matrix in matrices:
        stored = planner.peek(matrix.data)
        if any(map(planner.peek, matrix.weight_scales)) or (stored is not None and stored.dtype in FP8):
            kinds[matrix.data] = "fp8"
        elif stored is not None:
            kinds[matrix.data] = "plain"
    return common_kind(kinds, planner.where)


def _plan_matrix(
    planner: Planner,
    matrix: _Matrix,
    shape: Shape,
    num_scales: int,
    names: tuple[str, ...],
    expert: int | None,
) -> None:
    """Use the stored tensors of one matrix. num_scales: with one for each expert, their number, otherwise 0;
    names: the weights it belongs to, which have been announced.
    """
    planned = planner.announced(names[0])
    if planned.kind == "plain":
        planner.data(matrix.data, shape, PLAIN, *(Place(name, "values", expert) for name in names))
        return
    planner.data(matrix.data, shape, FP8, *(Place(name, "codes", expert) for name in names))
    scale = planner.first(matrix.weight_scales)
    planner.scale(scale, num_scales, *(Place(name, "scale", expert) for name in names))
    if planned.has_input_scale:
        scale = planner.first(matrix.input_scales)
        planner.scale(scale, num_scales, *(Place(name, "input_scale", expert) for name in names))
