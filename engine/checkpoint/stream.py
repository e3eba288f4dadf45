"""From a plan to weights: every tensor is read straight into its final place.

Files are read with ``pread`` and not mapped, so that pages of a file do not count as this process's memory.
Final buffers are taken once, experts stacked. Where buffer and file agree in type and the buffer is in this
machine's memory, the bytes land in it directly; otherwise they pass through one staging area of 32 MiB, which
is all that loading needs besides its result. Scales come first: they are few, and a bad one is told
before the large buffers exist.

Values are checked where they lie: no NaN or infinity, scales finite and positive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from engine.checkpoint.base import Progress, check_finite
from engine.checkpoint.plan import NVFP4_BLOCK, Copy, Part, Plan, Planned
from engine.checkpoint.safetensors_header import ITEM_BYTES, Shape, Stored
from engine.errors import CheckpointError
from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight

TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
STAGE_BYTES: Final = 32 << 20
_FP8_NAN: Final = 0x7F  # e4m3fn: the seven bits below the sign; there is no infinity

Buffers = dict[tuple[str, Part], Tensor]


def load(plan: Plan, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
    """Read everything. dtype: of unquantised weights. progress(bytes read, bytes in all).

    Raises CheckpointError naming file and tensor for values that are not finite, scales that are not positive
    and files that changed since their headers were read.
    """
    meter = _Meter(plan.num_bytes, progress)
    buffers = _read_scales(plan, meter)
    for name, planned in plan.weights.items():
        buffers |= allocate(name, planned, dtype, device)
    stage = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for fd, copy in _opened(plan.data):
        _copy(fd, copy, _pieces(copy, buffers), stage, meter)
        for piece in _pieces(copy, buffers):
            _check_values(copy, piece)
    return {name: assemble(name, planned, buffers, device) for name, planned in plan.weights.items()}


class _Meter:
    """Counts bytes for whoever watches."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def allocate(name: str, planned: Planned, dtype: torch.dtype, device: str) -> Buffers:
    """The final buffers of one weight, all but its scales of whole matrices; not filled yet."""
    shape = planned.expected.stacked
    parts: dict[Part, tuple[Shape, torch.dtype]]
    if planned.kind == "plain":
        parts = {"values": (shape, dtype)}
    elif planned.kind == "fp8":
        parts = {"codes": (shape, torch.float8_e4m3fn)}
    else:
        parts = {
            "codes": ((*shape[:-1], shape[-1] // 2), torch.uint8),
            "block_scales": ((*shape[:-1], shape[-1] // NVFP4_BLOCK), torch.float8_e4m3fn),
        }
    return {
        (name, part): torch.empty(size, dtype=kind, device=device) for part, (size, kind) in parts.items()
    }


def _read_scales(plan: Plan, meter: _Meter) -> Buffers:
    """All scales in host memory as float32, [] or [E], checked."""
    buffers: Buffers = {}
    for fd, copy in _opened(plan.scales):
        stored = copy.stored
        found = torch.empty(stored.num_elements, dtype=TORCH_DTYPES[stored.dtype])
        _read(fd, stored, 0, found)
        numbers = found.float()
        if not bool((torch.isfinite(numbers) & (numbers > 0)).all()):
            bad = numbers[~(torch.isfinite(numbers) & (numbers > 0))][0].item()
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} holds the scale {bad}, expected a positive number"
            )
        for place in copy.places:
            num_experts = plan.weights[place.name].expected.num_experts
            shape = (num_experts,) if num_experts else ()
            buffer = buffers.setdefault((place.name, place.part), torch.empty(shape))
            row = buffer.view(-1) if place.expert is None else buffer[place.expert : place.expert + 1]
            row.copy_(numbers)
        meter.add(stored.num_bytes)
    return buffers


def _pieces(copy: Copy, buffers: Buffers) -> list[Tensor]:
    """Contiguous tensors that the stored one fills in turn."""
    if len(copy.places) == 1:
        [place] = copy.places
        buffer = buffers[place.name, place.part]
        return [buffer if place.expert is None else buffer[place.expert]]
    shared = [buffers[place.name, place.part] for place in copy.places]
    return [buffer[expert] for expert in range(shared[0].shape[0]) for buffer in shared]


def _copy(fd: int, copy: Copy, pieces: list[Tensor], stage: Tensor, meter: _Meter) -> None:
    """Fill the pieces, at most a staging area at a time."""
    stored = copy.stored
    dtype, item = TORCH_DTYPES[stored.dtype], ITEM_BYTES[stored.dtype]
    staged, position = stage.view(dtype), 0
    for piece in pieces:
        flat = piece.view(-1)
        direct = flat.dtype == dtype and flat.device.type == "cpu"
        for part in torch.split(flat, staged.numel()):
            landing = part if direct else staged[: part.numel()]
            _read(fd, stored, position, landing)
            if not direct:
                part.copy_(landing)
            position += part.numel() * item
            meter.add(part.numel() * item)
    assert position == stored.num_bytes, stored


def _read(fd: int, stored: Stored, position: int, into: Tensor) -> None:
    """Bytes of a stored tensor from ``position`` on, until a contiguous host tensor is full."""
    view = into.view(torch.uint8).numpy().data
    offset, done = stored.offset + position, 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{stored.file}: tensor {stored.name} cannot be read: {error}") from error
        if count == 0:
            raise CheckpointError(
                f"{stored.file}: the file ends inside tensor {stored.name}, at byte {offset + done}; "
                "it changed since its header was read"
            )
        done += count


def _opened(copies: tuple[Copy, ...]) -> Iterator[tuple[int, Copy]]:
    """(descriptor, copy) for every copy, which are in file order; one file is open at a time."""
    for file, in_file in groupby(copies, key=lambda copy: copy.stored.file):
        with _open(file) as fd:
            for copy in in_file:
                yield fd, copy


@contextmanager
def _open(file: Path) -> Iterator[int]:
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _check_values(copy: Copy, piece: Tensor) -> None:
    """Refuse NaN and infinity. Every NVFP4 code is a number, so those pass unseen."""
    stored, part = copy.stored, copy.places[0].part
    if part == "values":
        check_finite(piece, stored.name, stored.file)
    elif piece.dtype == torch.float8_e4m3fn:
        codes = piece.view(torch.uint8)
        largest = torch.stack([codes.amax(), codes.view(torch.int8).amax().view(torch.uint8)]).tolist()
        if part == "block_scales" and largest[0] >= _FP8_NAN:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} holds NaN or a negative number, expected block scales "
                "of at least 0"
            )
        if part == "codes" and (largest[0] == 0x80 | _FP8_NAN or largest[1] == _FP8_NAN):
            raise CheckpointError(f"{stored.file}: tensor {stored.name} holds NaN, expected finite values")


def assemble(name: str, planned: Planned, buffers: Buffers, device: str) -> Weight:
    """One weight from its filled buffers and its scales, [] or [E] float32."""
    if planned.kind == "plain":
        return buffers[name, "values"]
    codes = buffers[name, "codes"]
    if planned.kind == "nvfp4":
        return Nvfp4Weight(codes, buffers[name, "block_scales"], buffers[name, "divisor"].to(device))
    input_scale = buffers[name, "input_scale"].to(device) if planned.has_input_scale else None
    return Fp8Weight(codes, buffers[name, "scale"].to(device), input_scale)
