"""What safetensors files say about their tensors, read without their data.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header naming each tensor's
dtype, shape and place, and the data. The header is read and checked here by itself: files of more than 100 GB
are described within a second and no memory is mapped, and a loader that knows where a tensor's bytes lie can
read them straight into their final place (``checkpoint/stream.py``).

    >>> header of x.safetensors: {"a": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [0, 8]}}
    {"a": Stored(file=x.safetensors, name="a", dtype="F8_E4M3", shape=(2, 4), offset=8 + header's length)}

A file must be exactly as long as its header says, without holes or overlaps. ``read_shards`` puts the files
of a directory together, with or without their index.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from engine.errors import CheckpointError
from engine.text.tokenizer import read_json

Shape = tuple[int, ...]

# safetensors' names of the element types that some checkpoint of ours may hold, and their bytes
ITEM_BYTES: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

_LENGTH_BYTES: Final = 8
_MOST_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_MOST_DIMENSIONS: Final = 8
_SHARD = re.compile(r"[\w][\w.-]*\.safetensors")
# what is found under a .safetensors name when it is not one
_OTHER_FORMATS: Final[Mapping[bytes, str]] = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, as pickled PyTorch weights are",
    b"\x80\x02": "a pickle",
    b"version ": "a Git LFS pointer instead of the file it stands for",
    b"<!DOCTYP": "an HTML page",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    file: Path
    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: Shape
    offset: int  # of its first byte in the file

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(file: Path) -> list[Stored]:
    """The tensors of one file in the order of their data.

    Raises CheckpointError for a file that is missing, truncated, too long or no safetensors file at all, and
    for a tensor whose place contradicts its shape.
    """
    try:
        with file.open("rb") as opened:
            file_bytes = os.fstat(opened.fileno()).st_size
            start = opened.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            for magic, what in _OTHER_FORMATS.items():
                if start.startswith(magic):
                    raise CheckpointError(f"{file}: found {what}, expected a safetensors file")
            if len(start) < _LENGTH_BYTES or length > min(file_bytes - _LENGTH_BYTES, _MOST_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: not a complete safetensors file: its first bytes {start!r} announce a header "
                    f"of {length} bytes, the file has {file_bytes}"
                )
            text = opened.read(length)
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        parsed = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in entries.items()}
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error
    stored = _locate(file, parsed, _LENGTH_BYTES + length)
    end = stored[-1].offset + stored[-1].num_bytes if stored else _LENGTH_BYTES + length
    if end != file_bytes:
        raise CheckpointError(
            f"{file}: not a complete safetensors file: it has {file_bytes} bytes, its header describes {end}"
        )
    return stored


def _locate(file: Path, entries: Mapping[str, _Entry], data_start: int) -> list[Stored]:
    """The entries of a header as tensors, sorted by place and checked to follow each other without holes."""
    stored, end = [], 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{file}: tensor {name} has type {entry.dtype}, supported: {', '.join(ITEM_BYTES)}"
            )
        if len(entry.shape) > _MOST_DIMENSIONS or min(entry.shape, default=1) < 0:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {str(entry.shape):.80}, expected up to {_MOST_DIMENSIONS} "
                "sizes, none negative"
            )
        tensor = Stored(file, name, entry.dtype, tuple(entry.shape), data_start + end)
        start, end = end, end + tensor.num_bytes
        if entry.data_offsets != (start, end):
            raise CheckpointError(
                f"{file}: tensor {name} lies at {list(entry.data_offsets)}, expected [{start}, {end}] behind "
                "the tensor before it, from its type and shape"
            )
        stored.append(tensor)
    return stored


def read_shards(directory: Path, stem: str) -> dict[str, Stored]:
    """Every tensor of the files ``stem*.safetensors`` by name, each found exactly once.

    With ``stem.safetensors.index.json`` its files are read and must hold what it says; without it, all files
    with that stem are. Raises CheckpointError.
    """
    index = read_index(directory / f"{stem}.safetensors.index.json")
    files = (
        sorted(directory / name for name in set(index.values())) if index else shard_files(directory, stem)
    )
    if not files:
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        found = sorted(entry.name for entry in directory.iterdir() if entry.suffix in weights)
        raise CheckpointError(
            f"{directory}: no {stem}*.safetensors, found {', '.join(found[:4]) or 'no weights'}"
        )
    stored: dict[str, Stored] = {}
    for entry in (entry for file in files for entry in read_header(file)):
        if entry.name in stored:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is also in {stored[entry.name].file.name}, expected in "
                "one file"
            )
        stored[entry.name] = entry
    if index:
        _check_index(index, stored, directory / f"{stem}.safetensors.index.json")
    return stored


def shard_files(directory: Path, stem: str) -> list[Path]:
    """``stem.safetensors``, or all of the numbered shards ``stem-00001-of-0000N.safetensors``; none if there
    are none. Raises CheckpointError where some of the shards are not there.
    """
    numbered = re.compile(rf"{re.escape(stem)}(?:-\d+-of-(\d+))?\.safetensors")
    names = sorted(file.name for file in directory.glob(f"{stem}*.safetensors"))
    matches = [match for match in map(numbered.fullmatch, names) if match is not None]
    for match in matches:
        if match[1] is not None and len(matches) != int(match[1]):
            raise CheckpointError(
                f"{directory}: found {len(matches)} files {stem}*.safetensors, expected {int(match[1])} "
                f"according to the name of {match[0]}"
            )
    return [directory / match[0] for match in matches]


def read_index(file: Path) -> dict[str, str] | None:
    """Tensor name -> plain name of its shard; None if there is no index. Raises CheckpointError."""
    if not file.is_file():
        return None
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{file}: weight_map is {str(weight_map)[:40]}, expected tensor names and their files"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{file}: tensor {name} is in {shard!r}, expected the plain name of a .safetensors file in "
                "this directory"
            )
    return weight_map


def _check_index(index: Mapping[str, str], stored: Mapping[str, Stored], file: Path) -> None:
    for name, entry in stored.items():
        if index.get(name) != entry.file.name:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is here, expected in {index.get(name, 'no file')} according "
                f"to {file.name}"
            )
    missing = [name for name in index if name not in stored]
    if missing:
        raise CheckpointError(
            f"{file.parent / index[missing[0]]}: {some(missing)} missing, expected here according to "
            f"{file.name}"
        )


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few of some names, for a message."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
