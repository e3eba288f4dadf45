"""What a checkpoint consists of, counted from its headers: parameters and bytes of each group of weights.

Three numbers belong to a group. *parameters* are those of the model, whatever their encoding. *stored_bytes*
are in the files. *memory_bytes* are in a GPU's memory once loaded: quantised matrices as stored, all others
in bfloat16, each scale a float32 number. Scales are a group of their own, and so is what is never loaded, so
that the groups of a checkpoint sum to all elements and bytes of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Protocol

import torch

from draft.load import HeadCheckpoint, check_shapes, eagle3_shapes, eagle_shapes
from engine.checkpoint import Checkpoint, MistralCheckpoint, expected_tensors
from engine.checkpoint.mistral_hf import MistralHfCheckpoint
from engine.checkpoint.native import MistralHead, NativeCheckpoint
from engine.checkpoint.plan import Copy, Plan
from engine.checkpoint.safetensors_header import Stored, read_header
from engine.cli.roofline import Reads
from engine.config import LlamaConfig, Mistral4Config
from engine.errors import CheckpointError
from engine.kvcache import KVPool, LatentPool
from engine.text.tokenizer import read_json

ROUTED: Final = "routed experts"
EMBEDDINGS: Final = "embeddings and output"
SCALES: Final = "scales"
UNLOADED: Final = "vision, not loaded"
OTHER: Final = "not loaded"

_ORDER: Final = (
    "input projection", ROUTED, "shared experts", "dense MLP", "attention", EMBEDDINGS, "norms and router",
    "draft vocabulary", SCALES, UNLOADED, OTHER,
)  # fmt: skip
_WIDTH: Final = 2  # bytes of a number in bfloat16
_SCALE_WIDTH: Final = 4
_WHOLE: Final = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")
_FORMATS: Final = {"fp8": "FP8", "nvfp4": "NVFP4"}


@dataclass(slots=True)
class Group:
    """Counts of one group; of scales, ``parameters`` is how many numbers they are."""

    name: str
    parameters: int = 0
    stored_as: list[str] = field(default_factory=list)
    stored_bytes: int = 0
    memory_bytes: int = 0

    def add(self, parameters: int, stored_as: str, stored_bytes: int, memory_bytes: int) -> None:
        self.parameters += parameters
        self.stored_bytes += stored_bytes
        self.memory_bytes += memory_bytes
        if stored_as not in self.stored_as:
            self.stored_as.append(stored_as)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The groups of one checkpoint in a fixed order, and what a step reads of them."""

    groups: tuple[Group, ...]
    elements: Mapping[str, int]  # stored numbers by type, scales and all; GGUF's blocks count what they hold
    stored_bytes: int
    routed_bytes: int  # in memory, with their scales
    table_bytes: int  # of the embedding in memory, where it is not the output matrix as well

    @property
    def parameters(self) -> int:
        """Of the model, vision included; neither scales nor what else is not loaded."""
        return sum(group.parameters for group in self.groups if group.name not in (SCALES, OTHER))

    @property
    def memory_bytes(self) -> int:
        return sum(group.memory_bytes for group in self.groups)

    def reads(self, config: LlamaConfig | Mistral4Config, kv_row: int) -> Reads:
        """What a step of the model reads. kv_row: bytes of cached rows per token."""
        moe = config if isinstance(config, Mistral4Config) else None
        return Reads(
            always=self.memory_bytes - self.routed_bytes - self.table_bytes,
            experts=self.routed_bytes,
            num_experts=0 if moe is None else moe.num_experts,
            num_experts_per_token=0 if moe is None else moe.num_experts_per_tok,
            token_row=config.hidden_size * _WIDTH,
            kv_row=kv_row,
        )


class _Counted(Protocol):
    """What a header says of a tensor, in any format."""

    @property
    def dtype(self) -> str: ...

    @property
    def num_elements(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


class _Tally:
    """Groups while they are counted."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.elements: dict[str, int] = {}
        self.stored_bytes = self.routed_bytes = 0

    def add(self, group: str, stored: _Counted, parameters: int, stored_as: str, memory_bytes: int) -> None:
        self.groups.setdefault(group, Group(group)).add(parameters, stored_as, stored.num_bytes, memory_bytes)
        self.elements[stored.dtype] = self.elements.get(stored.dtype, 0) + stored.num_elements
        self.stored_bytes += stored.num_bytes

    def finish(self, table_bytes: int) -> Footprint:
        ordered = tuple(self.groups[name] for name in _ORDER if name in self.groups)
        assert len(ordered) == len(self.groups), sorted(self.groups)
        return Footprint(ordered, self.elements, self.stored_bytes, self.routed_bytes, table_bytes)


def target_footprint(checkpoint: Checkpoint | MistralCheckpoint) -> Footprint:
    """Count an open target. Raises CheckpointError for a header that cannot be read."""
    config = checkpoint.config
    table_bytes = config.vocab_size * config.hidden_size * _WIDTH
    if isinstance(checkpoint, NativeCheckpoint | MistralHfCheckpoint):
        return _of_plan(checkpoint.plan, UNLOADED, table_bytes)
    assert isinstance(config, LlamaConfig), checkpoint
    shapes = expected_tensors(config)
    untied_bytes = 0 if config.tie_word_embeddings else table_bytes
    stored: Mapping[str, _Counted]
    if checkpoint.path.is_file():
        from engine.checkpoint.gguf import GgufCheckpoint  # here, because importing gguf takes long

        assert isinstance(checkpoint, GgufCheckpoint), checkpoint
        stored = checkpoint.stored
    else:
        stored = {entry.name: entry for file in _hf_files(checkpoint.path) for entry in read_header(file)}
    return _of_tensors(stored, stored.keys() - shapes.keys(), untied_bytes)


def head_footprint(head: HeadCheckpoint | MistralHead) -> Footprint:
    """Count a draft head. Raises CheckpointError for headers that cannot be read or do not fit its config."""
    if isinstance(head, MistralHead):
        own = head.plan.weights.get("tok_embeddings.weight")
        return _of_plan(head.plan, OTHER, 0 if own is None else math.prod(own.expected.shape) * _WIDTH)
    files = sorted(head.path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"head {head.path}: no *.safetensors file, expected one beside config.json")
    stored = {entry.name.removeprefix("model."): entry for file in files for entry in read_header(file)}
    _check_llama_head(head, stored)
    unloaded = {"t2d"} if head.kind == "eagle3" else {"lm_head.weight"}
    table = stored.get("embed_tokens.weight")
    return _of_tensors(stored, unloaded, 0 if table is None else table.num_elements * _WIDTH)


def kv_token_bytes(
    config: LlamaConfig | Mistral4Config, num_gpus: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of a token's cached rows, on each of so many GPUs."""
    if isinstance(config, Mistral4Config):
        return LatentPool.bytes_per_slot(config.num_layers, config.latent_dim, dtype)
    heads = -(-config.num_kv_heads // num_gpus)
    return KVPool.bytes_per_slot(config.num_layers, heads, config.head_dim, dtype)


def _check_llama_head(head: HeadCheckpoint, stored: Mapping[str, Stored]) -> None:
    """CheckpointError unless the tensors are those of such a head; the rules of ``draft.load``."""
    optional = ("embed_tokens.weight", "t2d", "lm_head.weight", "d2t")
    shapes = {name: entry.shape for name, entry in stored.items()}
    if head.kind == "eagle3":
        shapes = {
            "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name: shape
            for name, shape in shapes.items()
        }
    found = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if head.kind == "eagle3":
        expected = eagle3_shapes(head.config, head.draft_vocab_size)
        expected = {name: shape for name, shape in expected.items() if name in found or name not in optional}
    else:
        expected = eagle_shapes(head.config, found)
    known = {name: tensor for name, tensor in found.items() if name in expected or name not in optional}
    check_shapes(head.path, known, expected)


def _of_plan(plan: Plan, unloaded: str, table_bytes: int) -> Footprint:
    tally = _Tally()
    for copy in (*plan.data, *plan.scales):
        name, part = copy.places[0].name, copy.places[0].part
        memory_bytes, num_elements = _memory_bytes(copy), copy.stored.num_elements
        if _group_of(name) == ROUTED:
            tally.routed_bytes += memory_bytes
        if part not in ("values", "codes"):
            tally.add(SCALES, copy.stored, num_elements, copy.stored.dtype, memory_bytes)
            continue
        kind = plan.weights[name].kind
        per_element = 2 if kind == "nvfp4" else 1  # two numbers in a byte
        tally.add(
            _group_of(name),
            copy.stored,
            num_elements * per_element,
            _FORMATS.get(kind, copy.stored.dtype),
            memory_bytes,
        )
    for stored in plan.unread.values():
        group = SCALES if stored.num_elements == 1 else unloaded
        tally.add(group, stored, stored.num_elements, stored.dtype, 0)
    return tally.finish(table_bytes)


def _memory_bytes(copy: Copy) -> int:
    """Of one stored tensor, once loaded. A scale that two matrices share is there for each."""
    match copy.places[0].part:
        case "values":
            return copy.stored.num_elements * _WIDTH
        case "codes" | "block_scales":
            return copy.stored.num_bytes
        case "scale" | "input_scale" | "divisor":
            return copy.stored.num_elements * _SCALE_WIDTH * len(copy.places)


def _of_tensors(stored: Mapping[str, _Counted], unloaded: Set[str], table_bytes: int) -> Footprint:
    """Tensors by their Hugging Face names. On loading all numbers but whole ones become bfloat16, those of
    GGUF's blocks too.
    """
    tally = _Tally()
    for name, entry in stored.items():
        if name in unloaded:
            tally.add(OTHER, entry, entry.num_elements, entry.dtype, 0)
            continue
        width = entry.num_bytes // entry.num_elements if entry.dtype in _WHOLE else _WIDTH
        tally.add(_group_of(name), entry, entry.num_elements, entry.dtype, entry.num_elements * width)
    return tally.finish(table_bytes)


@cache
def _group_of(name: str) -> str:
    """The group of a weight by its name, native or Hugging Face."""
    plain = name.removesuffix(".weight")
    if plain.endswith(("norm", ".gate")):
        return "norms and router"
    for part, group in _parts():
        if part in f".{plain}.":
            return group
    raise AssertionError(f"no group for {name}")


def _parts() -> Iterator[tuple[str, str]]:
    yield ".shared_experts.", "shared experts"
    yield ".experts.", ROUTED
    yield from ((part, "dense MLP") for part in (".feed_forward.", ".mlp."))
    yield from ((part, "attention") for part in (".attention.", ".self_attn."))
    yield from (
        (part, EMBEDDINGS) for part in (".tok_embeddings.", ".output.", ".embed_tokens.", ".lm_head.")
    )
    yield from ((part, "input projection") for part in (".eagle_linear.", ".fc."))
    yield from ((part, "draft vocabulary") for part in (".d2t.", ".t2d."))


def _hf_files(directory: Path) -> list[Path]:
    """The weight files of a Llama directory, which its reader has checked."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = read_json(directory / "model.safetensors.index.json")
    return sorted({directory / file for file in index["weight_map"].values()})
