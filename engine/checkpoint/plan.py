"""What becomes of every tensor of a checkpoint: decided from headers, before memory is taken.

A reader walks through the weights its config asks for and says where each stored tensor goes: ``data`` into a
final buffer or one expert's part of it, ``scale`` into a row of float32 numbers, or ``unread`` if it is known
but of no use here (vision, scales of activations that stay wide). ``finish`` then knows that every stored
tensor was used exactly once. Everything that does not fit is a CheckpointError that names file, tensor, found
and expected.

    stored tensor                             places
    layers.0.experts.5.w1.weight  [I, H]      codes of layers.0.experts.w1, expert 5
    ...mlp.experts.gate_up_proj  [E, 2I, H]   codes of .w1 and of .w3, half an expert to each in turn
    ...mlp.experts.gate_up_proj_scale_inv     scale of .w1 and of .w3, the same numbers to both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from engine.checkpoint.safetensors_header import Shape, Stored, some
from engine.errors import CheckpointError

Kind = Literal["plain", "fp8", "nvfp4"]  # of a weight: Tensor, Fp8Weight, Nvfp4Weight
Part = Literal["values", "codes", "block_scales", "scale", "input_scale", "divisor"]  # their tensors

PLAIN: Final = ("BF16", "F16", "F32")
FP8: Final = ("F8_E4M3",)
PACKED: Final = ("U8",)  # two NVFP4 codes a byte
NVFP4_BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class Expected:
    """One weight that a model consists of."""

    shape: Shape  # of one matrix [out, in], or of a vector
    num_experts: int = 0  # 0: not stacked
    is_linear: bool = False  # may be stored quantised

    @property
    def stacked(self) -> Shape:
        return (self.num_experts, *self.shape) if self.num_experts else self.shape


@dataclass(frozen=True, slots=True)
class Place:
    """A final buffer, or one expert's part of it."""

    name: str  # of the weight, canonical
    part: Part
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A stored tensor and where it goes. Several places share data expert by expert, and get scales whole."""

    stored: Stored
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """One weight to be delivered."""

    expected: Expected
    kind: Kind
    has_input_scale: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything ``stream.load`` needs. Its lists are in the order in which files are read best."""

    weights: Mapping[str, Planned]  # by canonical name, in the model's order
    data: tuple[Copy, ...]
    scales: tuple[Copy, ...]
    unread: Mapping[str, Stored] = field(default_factory=dict)  # by stored name

    @property
    def num_bytes(self) -> int:
        """To be read from files."""
        return sum(copy.stored.num_bytes for copy in (*self.data, *self.scales))


class Planner:
    """Hands out the stored tensors of one checkpoint, each once."""

    def __init__(self, stored: Mapping[str, Stored], where: Path, spell: Callable[[str], str] = str) -> None:
        """stored: by the names that the reader uses; where: the directory; spell: the name in a file that one
        of the reader's names would have. Both are for messages.
        """
        self.where, self._spell = where, spell
        self._left = dict(stored)
        self._num_stored = len(stored)
        self._weights: dict[str, Planned] = {}
        self._data: list[Copy] = []
        self._scales: list[Copy] = []
        self._unread: dict[str, Stored] = {}
        self._missing: list[str] = []

    def peek(self, name: str) -> Stored | None:
        """A stored tensor that has not been handed out yet."""
        return self._left.get(name)

    def first(self, names: Sequence[str]) -> str:
        """Which of several spellings is there; the first if none is."""
        return next((name for name in names if name in self._left), names[0])

    def weight(self, name: str, expected: Expected, kind: Kind, has_input_scale: bool = False) -> None:
        """Announce a weight whose parts follow."""
        self._weights[name] = Planned(expected, kind, has_input_scale)

    def announced(self, name: str) -> Planned:
        return self._weights[name]

    def expect_at_least(self, num_tensors: int) -> None:
        """Refuse a config that asks for far more than there is, before its table is written down."""
        if num_tensors > self._num_stored:
            raise CheckpointError(
                f"{self.where}: found {self._num_stored} tensors, expected at least the {num_tensors} that "
                "the config's layers and experts need"
            )

    def data(self, name: str, shape: Shape, dtypes: Sequence[str], *places: Place) -> None:
        """Use a stored tensor of exactly this shape and one of these types. Several places: see ``Copy``."""
        stored = self._take(name)
        if stored is not None:
            _check(stored, shape, dtypes)
            self._data.append(Copy(stored, places))

    def scale(self, name: str, num_experts: int, *places: Place) -> None:
        """Use a stored scale: one number, or with num_experts > 0 also one for each expert."""
        stored = self._take(name)
        if stored is not None:
            _check_scale(stored, num_experts)
            self._scales.append(Copy(stored, places))

    def unread(self, name: str, shape: Shape, dtypes: Sequence[str]) -> None:
        """Know a stored tensor, and do not read it."""
        stored = self._take(name)
        if stored is not None:
            _check(stored, shape, dtypes)
            self._unread[stored.name] = stored

    def unread_scale(self, name: str) -> None:
        """Know a scale of activations that we do not round; nothing happens where it is absent."""
        stored = self._left.pop(name, None)
        if stored is not None:
            _check_scale(stored, 0)
            self._unread[stored.name] = stored

    def finish(self, model: str) -> Plan:
        """The plan, if nothing is missing and nothing left. model: what it is, for messages."""
        num_known = self._num_stored - len(self._left)
        unknown = [stored.name for stored in self._left.values()]
        if self._missing:
            raise CheckpointError(
                f"{self.where}: {len(self._missing)} of {num_known + len(self._missing)} expected tensors "
                f"are missing: {some(map(self._spell, self._missing))}; found {self._num_stored} tensors"
                + (f", among them unknown ones: {some(unknown)}" if unknown else "")
            )
        if unknown:
            raise CheckpointError(
                f"{next(iter(self._left.values())).file}: {len(unknown)} unexpected tensors: "
                f"{some(unknown)}; expected the {num_known} of {model}"
            )
        return Plan(self._weights, _in_file_order(self._data), _in_file_order(self._scales), self._unread)

    def _take(self, name: str) -> Stored | None:
        stored = self._left.pop(name, None)
        if stored is None:
            self._missing.append(name)
        return stored


def common_kind(kinds: Mapping[str, Kind], where: Path) -> Kind:
    """How the matrices of one weight are stored: all in the same way, or it is a CheckpointError. With none
    there it is plain, and their plain names will be missing.
    """
    first = next(iter(kinds), None)
    for name, kind in kinds.items():
        if first is not None and kind != kinds[first]:
            raise CheckpointError(
                f"{where}: {name} is stored as {kind}, expected {kinds[first]} like {first}"
            )
    return "plain" if first is None else kinds[first]


def check_blocks(name: str, shape: Shape, where: Path) -> None:
    """CheckpointError for a matrix [out, in] whose rows do not divide into blocks of NVFP4."""
    if shape[-1] % NVFP4_BLOCK:
        raise CheckpointError(
            f"{where}: matrix {name} has {shape[-1]} columns, expected a multiple of {NVFP4_BLOCK} for NVFP4"
        )


def _in_file_order(copies: list[Copy]) -> tuple[Copy, ...]:
    return tuple(sorted(copies, key=lambda copy: (str(copy.stored.file), copy.stored.offset)))


def _check(stored: Stored, shape: Shape, dtypes: Sequence[str]) -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, expected {list(shape)} "
            "from the config"
        )
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has type {stored.dtype}, expected {' or '.join(dtypes)}"
        )


def _check_scale(stored: Stored, num_experts: int) -> None:
    """One number in up to three dimensions; for experts also [E], [E, 1] or [E, 1, 1]."""
    sizes = {(), (1,), (1, 1), (1, 1, 1)}
    if num_experts:
        sizes |= {(num_experts,), (num_experts, 1), (num_experts, 1, 1)}
    if stored.shape not in sizes:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, expected [] or [1]"
            + (f" or [{num_experts}] or [{num_experts}, 1, 1]" if num_experts else "")
        )
    if stored.dtype not in PLAIN:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has type {stored.dtype}, expected {' or '.join(PLAIN)}"
        )
