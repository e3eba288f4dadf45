"""How the products of a few tokens are cut, by GPU, operation, kind of weight and number of tokens.

The tables are where a search on a GPU ends: its result is written here, so that no start of a server begins
with one. Rows that no GPU has confirmed are said to be so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from triton.runtime.driver import driver

Use = Literal["route", "gate_up", "down", "linear"]
Kind = Literal["plain", "fp8", "nvfp4", "e4m3"]  # e4m3: FP8 whose activations are rounded too


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program multiplies.

    rows: of the matrix; step: of its columns at a time; tokens: at most; swap: the matrix is M (see
    ``kernels.triton.product``); splits: programs among which the columns are divided, at most.
    """

    rows: int
    step: int
    tokens: int = 16
    swap: bool = False
    splits: int = 1
    warps: int = 4
    stages: int = 4

    def fitted(self, num_rows: int, width: int) -> Tile:
        """The same, no larger than divides the matrix, whose width is a multiple of 32."""
        splits = self.splits
        while width % (splits * 32):
            splits //= 2
        rows, step = _divisor(num_rows, self.rows), _divisor(width // splits, self.step)
        # a whole warp group multiplies 64 rows of the matrix, or there is nothing to swap for
        swap = self.swap and rows >= 64
        return Tile(rows, step, self.tokens, swap, splits, self.warps, self.stages)

    @property
    def launch(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def _divisor(number: int, most: int) -> int:
    """The largest power of two that divides a number and is at most ``most``."""
    return min(number & -number, most)


Rows = tuple[tuple[int, Tile], ...]  # up to so many tokens, this tile; the last for any number

# Not confirmed by a GPU: chosen by what the compiler makes of them (registers, shared memory, instructions
# for each weight), which is why all take the layout that needs fewest.
_FEW, _MANY = Tile(64, 256, swap=True, splits=4), Tile(64, 128, 64, swap=True, splits=4, stages=3)
_HOPPER: Final[dict[tuple[Use, Kind], Rows]] = {
    ("route", "plain"): ((16, Tile(16, 128, splits=16, warps=8)), (64, Tile(16, 64, splits=8, warps=8))),
    ("gate_up", "plain"): ((64, Tile(64, 128, swap=True)),),
    ("gate_up", "fp8"): ((64, Tile(64, 256, swap=True)),),
    ("gate_up", "e4m3"): ((64, Tile(64, 256, swap=True)),),
    ("gate_up", "nvfp4"): ((64, Tile(64, 256, swap=True)),),
    ("down", "plain"): ((64, Tile(64, 128, swap=True)),),
    ("down", "fp8"): ((64, Tile(64, 256, swap=True)),),
    ("down", "e4m3"): ((64, Tile(64, 256, swap=True)),),
    # tiles of 64 tokens, as chunks of prompts have, leave fewer registers for so many nibbles
    ("down", "nvfp4"): ((1024, Tile(64, 256, swap=True)), (2048, Tile(64, 128, swap=True))),
    ("linear", "plain"): ((16, Tile(64, 128, swap=True, splits=4)), (64, _MANY)),
    ("linear", "fp8"): ((16, _FEW), (64, _MANY)),
    ("linear", "e4m3"): ((16, _FEW), (64, _MANY)),
    ("linear", "nvfp4"): ((16, _FEW), (64, _MANY)),
}

# There an epilogue as long as down's leaves fewer registers for the loop.
_BLACKWELL: Final[dict[tuple[Use, Kind], Rows]] = _HOPPER | {
    ("down", "fp8"): ((64, Tile(64, 128, swap=True)),),
    ("down", "nvfp4"): ((64, Tile(64, 128, swap=True)),),
}

# Activations in float32 run on no matrix unit: small enough for registers, wide enough for NVFP4's quarters.
_FLOAT32: Final = Tile(32, 64, stages=1)

# By compute capability, times ten. A GPU that is not listed takes Hopper's.
_TABLES: Final = {90: _HOPPER, 100: _BLACKWELL}


@functools.cache
def _arch_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _arch(device: torch.device) -> int:
    """Of the GPU, or of the one that is compiled for; the interpreter is taken for Hopper."""
    if device.type == "cuda":
        return _arch_of(device)
    return int(driver.active.get_current_target().arch) if device.type == "meta" else 90


def tile_for(device: torch.device, use: Use, kind: Kind, num_tokens: int, dtype: torch.dtype) -> Tile:
    """The table's row for so many tokens. dtype: of what is multiplied, where it has to be float32."""
    if dtype == torch.float32:
        return _FLOAT32
    rows = _TABLES.get(_arch(device), _HOPPER)[use, kind]
    return next((tile for most, tile in rows if num_tokens <= most), rows[-1][1])
