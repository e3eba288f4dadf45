"""Products of a few tokens: linear layers, the router, and the experts that it chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import moe, stored
from kernels.moe import Routing
from kernels.ops.base import BFLOAT16, Arguments, Case, Cost, Operation, Source, Tolerance, size_of
from kernels.stored import Stored

_EPS = 1e-6
_KINDS = ("plain", "fp8", "nvfp4", "e4m3")
_INPUT_SCALE = 2.0**-4
_BF16, _F32 = torch.bfloat16, torch.float32

# Mistral Small 4: experts, shared ones, chosen a token, hidden and inner width
_REAL = (128, 1, 4, 4096, 2048)
_TOKENS = (1, 2, 4, 8, 16, 64)
_CHUNK = 2048  # of a prompt


def weight(
    source: Source, kind: str, *shape: int, groups: int, dtype: torch.dtype = torch.bfloat16
) -> Stored:
    """A random stored matrix or stack that maps unit-variance inputs to outputs of about one. dtype: of a
    plain one."""
    *stack, rows, width = shape
    gain = source.uniform(*stack, groups) + 0.5
    if kind == "plain":
        return Stored(source.normal(*shape, dtype=dtype, scale=width**-0.5))
    if kind == "nvfp4":
        codes = source.integers(0, 256, *stack, rows, width // 2, dtype=torch.uint8)
        blocks = source.normal(*stack, rows, width // 16, dtype=torch.float8_e4m3fn)
        return Stored(codes, gain * (3 * width**0.5), blocks)
    codes = source.normal(*shape, dtype=torch.float8_e4m3fn)
    inputs = source.uniform(*stack) * 0 + _INPUT_SCALE if kind == "e4m3" else None
    return Stored(codes, gain * width**-0.5, None, inputs)


def _rows(source: Source, *shape: int, exact: bool, dtype: torch.dtype) -> Tensor:
    """Activations. exact: e4m3 numbers times the input scale, which any rounding leaves alone."""
    x = source.normal(*shape)
    if exact:
        x = (x / _INPUT_SCALE).to(torch.float8_e4m3fn).float() * _INPUT_SCALE
    return x.to(dtype)


def _norm(source: Source, width: int, dtype: torch.dtype) -> Tensor:
    return source.normal(width, scale=0.2).add_(1).to(dtype)


def _route(
    source: Source,
    num_tokens: int,
    sizes: tuple[int, ...],
    normed: bool,
    tile: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Arguments:
    num_experts, num_shared, num_chosen, hidden, _ = sizes
    x = source.normal(num_tokens, hidden, dtype=dtype)
    gate = source.normal(num_experts, hidden, dtype=_BF16, scale=hidden**-0.5)
    norm = _norm(source, hidden, dtype) if normed else None
    return x, gate, num_chosen, 1.5, num_shared, norm, _EPS, tile


def routing(source: Source, num_tokens: int, sizes: tuple[int, ...], tile: int) -> Routing:
    """Every token chooses on its own, and all experts are as likely."""
    return moe.route(*_route(source, num_tokens, sizes, normed=False, tile=tile))


def _gate_up(
    source: Source,
    kind: str,
    num_tokens: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    tile: int,
    normed: bool,
) -> Arguments:
    num_experts, num_shared, _, hidden, inner = sizes
    x = _rows(source, num_tokens, hidden, exact=kind == "e4m3", dtype=dtype)
    matrices = weight(source, kind, num_experts + num_shared, 2 * inner, hidden, groups=2, dtype=dtype)
    norm = _norm(source, hidden, dtype) if normed and kind != "e4m3" else None
    return x, matrices, routing(source, num_tokens, sizes, tile), norm, _EPS, tile


def _down(
    source: Source, kind: str, num_tokens: int, sizes: tuple[int, ...], dtype: torch.dtype, tile: int
) -> Arguments:
    num_experts, num_shared, num_chosen, hidden, inner = sizes
    y = _rows(source, num_tokens * (num_chosen + num_shared), inner, exact=kind == "e4m3", dtype=dtype)
    matrices = weight(source, kind, num_experts + num_shared, hidden, inner, groups=1, dtype=dtype)
    residual = source.normal(num_tokens, hidden, dtype=dtype)
    return y, matrices, routing(source, num_tokens, sizes, tile), residual, tile


def _linear(
    source: Source,
    kind: str,
    num_tokens: int,
    rows: int,
    width: int,
    fused: bool,
    groups: int,
    dtype: torch.dtype,
    apart: int,
) -> Arguments:
    """apart: numbers between the rows of x."""
    x = _rows(source, num_tokens, width + apart, exact=kind == "e4m3", dtype=dtype)[:, :width]
    norm = _norm(source, width, dtype) if fused and kind != "e4m3" else None
    residual = source.normal(num_tokens, rows, dtype=dtype) if fused else None
    return x, weight(source, kind, rows, width, groups=groups, dtype=dtype), norm, _EPS, residual


# --- what has to be moved


def _route_cost(x: Tensor, gate: Tensor, num_chosen: int, *rest: Any) -> Cost:
    return Cost(size_of(x, gate), 2 * x.shape[0] * gate.numel())


def _expert_cost(matrices: Stored, routed: Routing, *moved: Tensor | None) -> Cost:
    """Each expert that is used is read once."""
    num_used = len(set(routed.tiles[: int(routed.num_tiles), 0].tolist()))
    read = size_of(*matrices.tensors) * num_used // len(matrices.codes)
    return Cost(read + size_of(*moved), 2 * len(routed.entries) * matrices.shape[1] * matrices.shape[2])


def _gate_up_cost(x: Tensor, matrices: Stored, routed: Routing, *rest: Any) -> Cost:
    written = len(routed.entries) * matrices.shape[1] // 2 * x.element_size()
    cost = _expert_cost(matrices, routed, x)
    return Cost(cost.num_bytes + written, cost.flops)


def _down_cost(y: Tensor, matrices: Stored, routed: Routing, residual: Tensor, *rest: Any) -> Cost:
    return _expert_cost(matrices, routed, y, residual, residual)


def _linear_cost(x: Tensor, matrix: Stored, norm: Tensor | None, eps: float, residual: Tensor | None) -> Cost:
    rows, width = matrix.shape
    written = len(x) * rows * x.element_size()
    return Cost(size_of(x, norm, residual, *matrix.tensors) + written, 2 * len(x) * rows * width)


# --- cases

_SMALL = (16, 1, 2, 128, 64)
_WIDE_SHARED = (32, 2, 4, 64, 32)
_FLOAT32 = Tolerance(1e-5, 1e-4)  # of sums in another order
_LOGITS = Tolerance(1e-5, 1e-4)  # softmax weights; ids and places are whole numbers and so exact


def _prefix(dtype: torch.dtype) -> str:
    """Of a case's name."""
    return "float32 " if dtype == _F32 else ""


def _routes(tiny: bool) -> tuple[Case, ...]:
    def case(
        num_tokens: int, sizes: tuple[int, ...], normed: bool, tile: int = 16, dtype: torch.dtype = _BF16
    ) -> Case:
        name = f"{_prefix(dtype)}{num_tokens} tokens{', normed' if normed else ''}, tiles of {tile}"
        return Case(name, lambda source: _route(source, num_tokens, sizes, normed, tile, dtype), _LOGITS)

    if tiny:
        return (
            case(1, _SMALL, True),
            case(5, _SMALL, False),
            case(37, _WIDE_SHARED, True),
            case(40, _SMALL, False, 32),
            case(3, _SMALL, True, dtype=_F32),
        )
    return tuple(case(num, _REAL, True) for num in _TOKENS)


def _expert_cases(kernel: str, make: Any, tiny: bool, *rest: Any) -> tuple[Case, ...]:
    def case(
        kind: str, num_tokens: int, sizes: tuple[int, ...], dtype: torch.dtype = _BF16, tile: int = 0
    ) -> Case:
        wgmma = () if tiny else (kernel,)
        name = f"{_prefix(dtype)}{kind}, {num_tokens} tokens{f', tiles of {tile}' if tile else ''}"
        given = kind, num_tokens, sizes, dtype, tile or moe.tile_tokens_for(num_tokens), *rest
        tolerance = _FLOAT32 if dtype == _F32 else BFLOAT16
        return Case(name, lambda source: make(source, *given), tolerance, wgmma)

    if tiny:
        few = tuple(case(kind, 3, _SMALL) for kind in _KINDS)
        return (
            *few,
            case("plain", 3, _SMALL, _F32),
            case("fp8", 1, _SMALL),
            case("nvfp4", 20, _WIDE_SHARED),
            case("fp8", 20, _WIDE_SHARED, tile=32),
        )
    return tuple(case(kind, num, _REAL) for kind in _KINDS for num in (*_TOKENS, _CHUNK))


def _linears(tiny: bool) -> tuple[Case, ...]:
    def case(
        kind: str,
        num_tokens: int,
        rows: int,
        width: int,
        fused: bool,
        groups: int = 1,
        dtype: torch.dtype = _BF16,
        apart: int = 0,
    ) -> Case:
        name = f"{_prefix(dtype)}{kind}, {num_tokens} x {width} -> {rows}{', fused' if fused else ''}"
        wgmma = () if tiny else ("_linear",)

        def make(source: Source) -> Arguments:
            return _linear(source, kind, num_tokens, rows, width, fused, groups, dtype, apart)

        return Case(name, make, _FLOAT32 if dtype == _F32 else BFLOAT16, wgmma)

    if tiny:
        fused = tuple(
            case(kind, 3, 128, 128, fused=True, groups=128, dtype=dtype)
            for dtype in (_BF16, _F32)
            for kind in _KINDS
        )
        return (
            *fused,
            case("nvfp4", 3, 48, 64, True, apart=6),
            case("plain", 3, 48, 64, True, dtype=_F32, apart=5),
            case("plain", 1, 48, 96, False),
            case("fp8", 17, 64, 256, False, 2),
            case("nvfp4", 70, 64, 64, True),
        )
    shapes = (1344, 4096, True), (4096, 1024, True), (4096, 4096, True), (131072, 4096, False)
    return tuple(
        case(kind, num, rows, width, fused, 1)
        for rows, width, fused in shapes
        for kind in (("plain",) if rows == 131072 else _KINDS)
        for num in (1, 4, 16, 64)
    )


OPERATIONS = (
    Operation("route", moe.route, "router:route", _routes(True), _routes(False), _route_cost),
    Operation(
        "gate_up", moe.gate_up, "experts:gate_up", _expert_cases("_gate_up", _gate_up, True, True),
        _expert_cases("_gate_up", _gate_up, False, False), _gate_up_cost,
    ),
    Operation(
        "down", moe.down, "experts:down", _expert_cases("_down", _down, True),
        _expert_cases("_down", _down, False), _down_cost,
    ),
    Operation("linear", stored.linear, "linear:linear", _linears(True), _linears(False), _linear_cost),
)  # fmt: skip
