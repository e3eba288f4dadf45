"""Rotary position embeddings: the table of cosines and sines, once per model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[D / 2] float32 inverse frequencies (Su et al. 2021), with Llama-3 scaling where asked.

    Llama-3 scaling keeps wavelengths below ``original / high_freq_factor``, divides those above
    ``original / low_freq_factor`` by ``factor`` and interpolates between.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return inv_freq
    wavelength = 2 * math.pi / inv_freq
    original = scaling.original_max_position_embeddings
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


class RopeTable:
    """Cosines and sines of every position, in the layout that ``kernels.rope`` wants (signed first half of
    sin)."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
        max_positions: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        angles = torch.outer(
            torch.arange(max_positions).float(), inverse_frequencies(head_dim, theta, scaling)
        )
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), dim=-1).to(device=device, dtype=dtype)
        self.sin = torch.cat((-sin, sin), dim=-1).to(device=device, dtype=dtype)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [B, N] int64 -> cos, sin: [B, N, 1, D]."""
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
