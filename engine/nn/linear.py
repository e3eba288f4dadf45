"""One Linear with a scheme: how the weight is stored and multiplied.

dense    any dtype and device
packed   CPU: the weight reordered once for oneDNN
half     CPU without bfloat16 units: float16 weight, float32 everything else; half the bytes of float32
bytes    the same with 255 values an output, for a head: what it rounds changes no token that is emitted
fp8      an Fp8Weight, W8A16: the codes as stored, one byte an element
nvfp4    an Nvfp4Weight, W4A16: codes and block scales as stored, 0.5625 bytes an element
mixed    several weights of different kinds: one product each, outputs side by side

The first and the quantised ones are ``kernels.linear``, which on a GPU does the norm before a product of few
rows and the addition behind it in the same launch.

Quantised weights are never requantised and their activations never rounded: an ``input_scale`` is ignored,
which is the more accurate reading of a W8A8 or W4A4 checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.nn.norm import Norm
from engine.nn.stack import kind_of, stack
from engine.nn.weight import Weight
from kernels import (
    Stored,
    half_linear,
    linear,
    pack_bytes,
    pack_half,
    pack_linear,
    packed_linear,
    panel_linear,
)

# Rows that a speculative step usually has: the hint for the packed layout.
_TYPICAL_ROWS = 8

# How a packed weight is multiplied: (x, what it was packed into) -> y.
_Product = Callable[[Tensor, Any], Tensor]


class Linear:
    """y = x @ weight.T, without bias. weight: [out, in], plain or quantised; y has x's dtype.

    half: round the weight to float16 where the device then multiplies it faster; without effect elsewhere
    and on quantised weights. coarse: with ``half``, round it to bytes if that is faster still. Several
    weights: see ``fuse``.

    ``weight`` is the plain matrix where it is held as one, else None.
    """

    def __init__(self, *weights: Weight, half: bool = False, coarse: bool = False) -> None:
        assert all(len(weight.shape) == 2 for weight in weights), "a stack of experts is no Linear's weight"
        assert len({weight.shape[1] for weight in weights}) == 1, "fused weights read the same input"
        self.out_features = sum(weight.shape[0] for weight in weights)
        self.in_features = weights[0].shape[1]
        self._multiply: _Product | None
        self.scheme, self._multiply, self._held = _choose(weights, half, coarse)
        self.weight: Tensor | None = self._held.codes if self.scheme == "dense" else None

    @property
    def packed(self) -> Any | None:
        """The weight as packed for products of few rows on a CPU, if it is."""
        return self._held if self.scheme in ("half", "bytes") else None

    def __call__(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + (x, normed) @ weight.T. x: [.., in] -> [.., out]."""
        if self._multiply is None:
            weight, eps = (None, 0.0) if norm is None else norm
            return linear(x, self._held, weight, eps, residual)
        y = self._multiply(x if norm is None else norm(x), self._held)
        return y if residual is None else residual + y


def fuse(*weights: Weight, half: bool = False, coarse: bool = False) -> Linear:
    """One Linear for several weights that read the same input: fewer, larger products.

    Its outputs are theirs side by side. Each quantised matrix keeps its codes and its own scale.
    """
    return Linear(*weights, half=half, coarse=coarse)


def _choose(weights: Sequence[Weight], half: bool, coarse: bool) -> tuple[str, _Product | None, Any]:
    """(scheme, product, what it holds of the weights); the product is None where that is a ``Stored``."""
    if len({kind_of(weight) for weight in weights}) > 1:
        parts = tuple(Linear(weight, half=half, coarse=coarse) for weight in weights)
        return "mixed", lambda x, parts: torch.cat([part(x) for part in parts], dim=-1), parts
    stored: Stored = stack(weights)
    if stored.kind != "plain":
        return stored.kind, None, stored
    for scheme, multiply, packed in _packings(stored.codes, half, coarse):
        if packed is not None:  # it replaces the weight: two copies would double a CPU server's memory
            return scheme, multiply, packed
    return "dense", None, stored


def _packings(weight: Tensor, half: bool, coarse: bool) -> Iterator[tuple[str, _Product, Any | None]]:
    """(name, product, packed weight or None) of what is worth trying, best first; packed when asked for."""
    if half and coarse:
        yield "bytes", panel_linear, pack_bytes(weight)
    if half:
        yield "half", half_linear, pack_half(weight)
    yield "packed", packed_linear, pack_linear(weight, _TYPICAL_ROWS)
