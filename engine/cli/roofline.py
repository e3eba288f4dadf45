"""How fast a step could be: bytes that must be read, divided by the bandwidth of a GPU's memory.

At batch 1 a step of decoding reads every weight that it uses once and computes next to nothing, so memory is
the bound, and no engine on that GPU can be faster. What a mixture of experts reads depends on how many tokens
are scored at once, because each chooses its own experts:

    128 experts, 4 a token, tokens that choose independently and uniformly:
    tokens     1      2      4      8     16
    experts  4.0    7.9   15.3   28.7   51.0      128 (1 - (1 - 4/128)^tokens)

Real tokens share more than that, so the bound is a little too high for several tokens. It counts reading
weights and cached rows; not launching kernels, not arithmetic (the bound for prompts), not several GPUs.
``perf/roofline.py`` puts a measured step beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's memory: what the maker calls it and what there is.

    memory_bytes is what ``nvidia-smi`` reports as total: the maker counts neither in powers of ten nor in all
    of two. bandwidth: bytes per second, from the datasheet.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    source: str


GPUS: Final = (
    Gpu("L40S 48GB", 46_068 * _MIB, 0.864e12, "NVIDIA L40S datasheet: 48 GB GDDR6, 864 GB/s"),
    Gpu("A100 80GB", 81_920 * _MIB, 2.039e12, "NVIDIA A100 datasheet, SXM: 80 GB HBM2e, 2,039 GB/s"),
    Gpu("H100 80GB", 81_559 * _MIB, 3.35e12, "NVIDIA H100 datasheet, SXM: 80 GB HBM3, 3.35 TB/s"),
    Gpu("RTX PRO 6000 96GB", 97_887 * _MIB, 1.792e12,
        "NVIDIA RTX PRO 6000 Blackwell datasheet: 96 GB GDDR7, 1,792 GB/s"),
    Gpu("H200 141GB", 143_771 * _MIB, 4.8e12, "NVIDIA H200 datasheet, SXM: 141 GB HBM3e, 4.8 TB/s"),
    Gpu("B200 180GB", 183_359 * _MIB, 8.0e12,
        "NVIDIA DGX B200 datasheet: 1,440 GB HBM3e and 64 TB/s for 8 GPUs"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reads:
    """What a step reads, in bytes as held in memory."""

    always: int  # weights that every step reads once, however many tokens
    experts: int  # all routed experts of all layers
    num_experts: int  # of a layer; 0 without
    num_experts_per_token: int
    token_row: int  # of the embedding, for each token
    kv_row: int  # cached rows of all layers, for each token of context


def distinct_experts(num_experts: int, num_chosen: int, num_tokens: int) -> float:
    """Expected number of a layer's experts that at least one of the tokens chose, if they choose
    independently and uniformly.
    """
    return num_experts * (1 - (1 - num_chosen / num_experts) ** num_tokens) if num_experts else 0.0


def routing_overlap(num_experts: int, num_chosen: int, num_tokens: int, distinct: float) -> float:
    """The share of a further token's choice that falls on experts that others chose already, on top of what
    independent tokens share: 0 if they are independent, 1 if all choose alike.

    distinct: experts that ``num_tokens`` (more than one) chose, as counted. So many independent tokens would
    choose as many: 1 + (num_tokens - 1) * (1 - overlap).
    """
    missed = max(1 - distinct / num_experts, 1e-9)  # all of them: any number of tokens may have done that
    independent = math.log(missed) / math.log(1 - num_chosen / num_experts)
    return 1 - (independent - 1) / (num_tokens - 1)


def step_bytes(
    reads: Reads, num_nodes: int, batch: int = 1, context: int = 1024, distinct: float | None = None
) -> float:
    """Expected bytes read by one step that scores ``num_nodes`` tokens of each of ``batch`` sequences.

    context: cached tokens of each sequence, read once for all of its nodes; distinct: experts of a layer that
    are read, if they were counted.
    """
    num_tokens = num_nodes * batch
    if distinct is None:
        distinct = distinct_experts(reads.num_experts, reads.num_experts_per_token, num_tokens)
    experts = reads.experts * distinct / reads.num_experts if reads.num_experts else 0.0
    return reads.always + experts + reads.token_row * num_tokens + reads.kv_row * context * batch


def floor_seconds(num_bytes: float, gpu: Gpu) -> float:
    """The time it takes to read that many bytes at all of the datasheet's bandwidth."""
    return num_bytes / gpu.bandwidth
