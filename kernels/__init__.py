"""Tensors in, tensors out. Knows nothing of requests.

Callers import the operations from here; which implementation runs follows from the tensors' device. Today
every device runs the plain torch reference in ``kernels.ref``, which is also the specification that other
implementations are tested against.
"""

from kernels.ref import (
    MAX_NOISE,
    compact_rows,
    gumbel_noise,
    half_linear,
    has_fast_bfloat16,
    int8_linear,
    pack_half,
    pack_int8,
    pack_linear,
    packed_linear,
    rms_norm,
    rope,
    silu_mul,
    tree_attention,
    write_rows,
)

__all__ = [
    "MAX_NOISE",
    "compact_rows",
    "gumbel_noise",
    "half_linear",
    "has_fast_bfloat16",
    "int8_linear",
    "pack_half",
    "pack_int8",
    "pack_linear",
    "packed_linear",
    "rms_norm",
    "rope",
    "silu_mul",
    "tree_attention",
    "write_rows",
]
