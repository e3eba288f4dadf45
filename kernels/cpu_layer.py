"""Whole decoder layers in one call: ``cpu_layer.h``, for Llama-style layers with matrices in panels.

A layer of a small model is ten operations of ten to a hundred microseconds, and a third of its time is the
way to them: through the interpreter, and through threads that fall asleep and wake up. A ``FusedLayer`` holds
what never changes, ``LayerRows`` what is the same for all layers of one forward, and a ``FusedStack`` runs
them. The bits are those of the operations one by one.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import cpu

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "post_norm")),
        *((name, cpu.Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *(
            (name, _LONG)
            for name in ("hidden", "num_heads", "num_kv_heads", "head_dim", "inner", "qkv_inputs")
        ),
        *((name, _FLOAT) for name in ("eps", "scale")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("num_rows", "num_parts", "longest", "num_slots", "threads")),
        *((name, _POINTER) for name in ("parts", "cos", "sin", "slots")),
        ("first_slot", _LONG),
        ("space", _POINTER),
    )


_SIGNATURE = (_POINTER,) * 2 + (_LONG,) + (_POINTER,) * 4


class Part(Protocol):
    """Neighbouring rows that attend together: b sequences of n rows each."""

    @property
    def num_seqs(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def read(self) -> Tensor | tuple[slice, ...]:
        """[b, L] int64 slots, or one run per sequence of at most L."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[b, n, L] of 0 and -inf, or None where every row sees all that its sequence reads."""
        ...


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Widths of a layer; ``inner`` is that of its feed-forward block."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int

    def space(self, num_rows: int, longest: int, threads: int) -> int:
        """Floats of scratch memory of a call: see ``space_of`` in cpu_layer.h."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        attention = cpu.WIDTH * (longest + 2 * self.head_dim)
        return num_rows * (3 * self.hidden + heads + 3 * self.inner) + threads * attention


class LayerRows:
    """The rows of one forward, for all of its layers: where they are written and what they read."""

    def __init__(
        self,
        sizes: LayerSizes,
        rotation: tuple[Tensor, Tensor] | None,
        write: Tensor | slice,
        parts: Sequence[Part],
        num_slots: int,
    ) -> None:
        """rotation: cos and sin, [T, .., D] float32, the first half of sin negated, or None for a head, which
        looks them up (``kernels.cpu_head``); write: [T] slots, or a run; parts: all T rows, in order;
        num_slots: S of the pools."""
        table = array("q")  # of haast_part, seven numbers each
        for part in parts:
            _append_sequences(table, part)
        num_rows, num_sequences, longest = sum(table[1::7]), len(table) // 7, max(table[4::7])
        assert num_rows > 0, "nobody has any rows"
        cos_at = sin_at = None
        if rotation is not None:
            cos, sin = rotation
            assert len(cos) == num_rows, "the parts have other rows"
            assert cos.numel() == sin.numel() == num_rows * sizes.head_dim, "a rotation of other heads"
            cos_at, sin_at = cos.data_ptr(), sin.data_ptr()
        if isinstance(write, slice):
            assert 0 <= write.start == write.stop - num_rows <= num_slots - num_rows, "rows without a slot"
        else:
            assert write.numel() == num_rows, "rows without a slot"
        threads = torch.get_num_threads()
        # The dtype is named: torch's default is whatever somebody has made it.
        space = torch.empty(sizes.space(num_rows, longest, threads), dtype=torch.float32)
        self.num_rows, self.num_slots, self.has_rotation = num_rows, num_slots, rotation is not None
        self.is_long = num_rows > cpu.FEW_ROWS
        self._held = (rotation, write, parts, table, space)  # what the addresses below lead to
        self._struct = _Rows(
            num_rows,
            num_sequences,
            longest,
            num_slots,
            threads,
            table.buffer_info()[0],
            cos_at,
            sin_at,
            None if isinstance(write, slice) else write.data_ptr(),
            write.start if isinstance(write, slice) else 0,
            space.data_ptr(),
        )
        self.address = ctypes.addressof(self._struct)


def _append_sequences(table: array[int], part: Part) -> None:
    """Append each sequence of a part as ``haast_part`` has it."""
    bias, bias_stride = 0, 0
    if part.bias is not None:
        assert part.bias.shape[:2] == (part.num_seqs, part.num_nodes), "a mask of other rows"
        bias, bias_stride = part.bias.data_ptr(), part.bias.shape[2]
    assert len(part.read) == part.num_seqs, "some sequences read nothing"
    for read in part.read:
        first_row = table[-7] + table[-6] if table else 0
        if isinstance(read, slice):
            own = 0, read.start, read.stop - read.start
        else:
            own = read.data_ptr(), 0, len(read)
        table.extend((first_row, part.num_nodes, *own, bias, bias_stride))
        if bias:
            bias += 4 * part.num_nodes * bias_stride


class FusedLayer:
    """x + attention(norm x), then that + mlp(norm of that). See ``fused_layer``."""

    def __init__(
        self,
        functions: tuple[Callable[..., None], Callable[..., None]],
        norms: tuple[Tensor | None, Tensor],
        matrices: tuple[cpu.PanelMatrix, ...],
        sizes: LayerSizes,
        eps: float,
        scale: float,
    ) -> None:
        self.sizes, self.has_norm = sizes, norms[0] is not None
        self.short, self.long = functions
        self.num_given = matrices[0].num_inputs
        heads, inner = sizes.num_heads * sizes.head_dim, sizes.inner
        outputs = heads + 2 * sizes.num_kv_heads * sizes.head_dim, sizes.hidden, 2 * inner, sizes.hidden
        assert tuple(matrix.num_outputs for matrix in matrices) == outputs
        assert [matrix.num_inputs for matrix in matrices[1:]] == [heads, sizes.hidden, inner]
        assert all(norm is None or len(norm) == sizes.hidden for norm in norms)
        self._held = norms, matrices  # what the addresses below lead to
        self._struct = _Layer(
            *(None if norm is None else norm.data_ptr() for norm in norms),
            *(matrix.struct for matrix in matrices),
            sizes.hidden,
            sizes.num_heads,
            sizes.num_kv_heads,
            sizes.head_dim,
            sizes.inner,
            self.num_given,
            eps,
            scale,
        )
        self.address = ctypes.addressof(self._struct)

    def __call__(
        self, x: Tensor, pool: tuple[Tensor, Tensor], rows: LayerRows, given: Tensor | None = None
    ) -> Tensor:
        """This layer alone: as ``FusedStack``, with its pool."""
        return FusedStack([self], [pool])(x, rows, given)


class FusedStack:
    """Layers of one size behind one another. pools: K and V of each, [Hkv, S, D]."""

    def __init__(self, layers: Sequence[FusedLayer], pools: Sequence[tuple[Tensor, Tensor]]) -> None:
        assert len(layers) == len(pools) > 0
        first, (keys, _) = layers[0], pools[0]
        assert all(layer.sizes == first.sizes for layer in layers)
        assert all(layer.num_given == first.sizes.hidden and layer.has_norm for layer in layers[1:])
        assert all(part.shape == keys.shape and part.is_contiguous() for pool in pools for part in pool)
        self.first, self._num_slots, self._count = first, keys.shape[1], len(layers)
        self._held = tuple(layers), tuple(pools)  # what the addresses below lead to
        self._layers = array("q", [layer.address for layer in layers])
        self._pools = array("q", [part.data_ptr() for pool in pools for part in pool])

    def __call__(self, x: Tensor, rows: LayerRows, given: Tensor | None = None) -> Tensor:
        """x: [T, hidden] float32; given: [T, in] what the first layer's attention reads instead of norm x;
        both contiguous. Returns [T, hidden]."""
        assert x.is_contiguous()
        assert len(x) == rows.num_rows
        assert rows.has_rotation
        assert self._num_slots == rows.num_slots
        if given is None:
            assert self.first.has_norm
        else:
            assert given.is_contiguous()
            assert given.shape == (len(x), self.first.num_given)
        out = torch.empty_like(x)
        # Few rows of one layer are over too soon to hand over the interpreter's lock; several layers are not.
        run = self.first.long if rows.is_long or self._count > 1 else self.first.short
        run(
            self._layers.buffer_info()[0],
            self._pools.buffer_info()[0],
            self._count,
            rows.address,
            x.data_ptr(),
            None if given is None else given.data_ptr(),
            out.data_ptr(),
        )
        return out


def fused_layer(
    norms: tuple[Tensor | None, Tensor],
    matrices: Sequence[object],
    sizes: LayerSizes,
    eps: float,
    scale: float,
) -> FusedLayer | None:
    """A layer made of its parts, or None where it cannot be one call.

    norms: before attention (None if what it reads is always given) and before the feed-forward block,
    [hidden] float32; matrices: query, key and value together, output, gate and up together, down, each as
    packed by ``dispatch.pack_half`` or ``dispatch.pack_bytes``; scale: of the scores.
    """
    functions = cpu.threaded("decoder_layers", _SIGNATURE)
    packed = tuple(matrix for matrix in matrices if isinstance(matrix, cpu.PanelMatrix))
    widths = sizes.hidden, sizes.inner, (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    fits = all(width % cpu.PANEL == 0 for width in widths) and sizes.head_dim % cpu.WIDTH == 0
    plain = all(norm is None or (norm.dtype is torch.float32 and norm.is_contiguous()) for norm in norms)
    if functions is None or len(packed) < len(matrices) or not (fits and plain):
        return None
    return FusedLayer(functions, norms, packed, sizes, eps, scale)
