"""Tensors in, tensors out. Knows nothing of requests.

Callers import the operations from here; which implementation runs follows from the tensors
(``kernels.dispatch``). The plain torch reference in ``kernels.ref``, ``kernels.mla`` and ``kernels.quant``
runs everywhere and is the specification; ``kernels.cpu`` has small compiled kernels for a CPU, and
``kernels.triton`` those for a GPU, which ``kernels.ops`` lists.
"""

from kernels.cpu import kernels_for
from kernels.cpu_head import FusedHead, fused_head
from kernels.cpu_layer import FusedLayer, FusedStack, LayerRows, LayerSizes, fused_layer
from kernels.dispatch import (
    ancestor_words,
    best,
    choose,
    compact_path,
    half_linear,
    layer_rows,
    mha_tree_attention,
    mla_tree_attention,
    pack_bytes,
    pack_half,
    panel_linear,
    rms_norm,
    rope_latent_write,
    rope_write,
    silu_mul,
    tree_attention,
)
from kernels.errors import UnsupportedError
from kernels.launches import LEAST_CAPABILITY, can_be_dependent, dependent_launches
from kernels.paged import MOST_OWN, TreeRows
from kernels.products import absorb_queries, down, expand_values, gate_up, linear, route
from kernels.quant import dequantise_fp8, dequantise_nvfp4, quantise_fp8, quantise_nvfp4
from kernels.ref import (
    compact_rows,
    gumbel_noise,
    has_fast_bfloat16,
    nucleus,
    pack_linear,
    packed_linear,
    rope,
    write_rows,
)
from kernels.stored import Stored

__all__ = [
    "LEAST_CAPABILITY",
    "MOST_OWN",
    "FusedHead",
    "FusedLayer",
    "FusedStack",
    "LayerRows",
    "LayerSizes",
    "Stored",
    "TreeRows",
    "UnsupportedError",
    "absorb_queries",
    "ancestor_words",
    "best",
    "can_be_dependent",
    "choose",
    "compact_path",
    "compact_rows",
    "dependent_launches",
    "dequantise_fp8",
    "dequantise_nvfp4",
    "down",
    "expand_values",
    "fused_head",
    "fused_layer",
    "gate_up",
    "gumbel_noise",
    "half_linear",
    "has_fast_bfloat16",
    "kernels_for",
    "layer_rows",
    "linear",
    "mha_tree_attention",
    "mla_tree_attention",
    "nucleus",
    "pack_bytes",
    "pack_half",
    "pack_linear",
    "packed_linear",
    "panel_linear",
    "quantise_fp8",
    "quantise_nvfp4",
    "rms_norm",
    "rope",
    "rope_latent_write",
    "rope_write",
    "route",
    "silu_mul",
    "tree_attention",
    "write_rows",
]
