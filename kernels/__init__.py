"""Tensors in, tensors out. Knows nothing of requests.

Callers import the operations from here; which implementation runs follows from the tensors' device. Today
every device runs the plain torch reference in ``kernels.ref`` and ``kernels.quant``, which is also the
specification that other implementations are tested against.
"""

from kernels.quant import (
    dequantise_fp8,
    dequantise_nvfp4,
    fp8_linear,
    nvfp4_linear,
    quantise_fp8,
    quantise_nvfp4,
)
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
    "dequantise_fp8",
    "dequantise_nvfp4",
    "fp8_linear",
    "gumbel_noise",
    "half_linear",
    "has_fast_bfloat16",
    "int8_linear",
    "nvfp4_linear",
    "pack_half",
    "pack_int8",
    "pack_linear",
    "packed_linear",
    "quantise_fp8",
    "quantise_nvfp4",
    "rms_norm",
    "rope",
    "silu_mul",
    "tree_attention",
    "write_rows",
]
