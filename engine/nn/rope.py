"""Rotary position embeddings: cosines and sines of a forward's positions.

``RopeTable`` holds those of every position of a model with a short context, for rotations of two halves.
``PairRope`` computes them for the positions at hand, for rotations of neighbouring pairs: a table of Mistral
Small 4's million positions would take 256 MB, and one forward needs a few rows of it, once for all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import Mistral4Config, RopeScaling, YarnScaling


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
        """positions: [..] int64 -> cos, sin: [.., 1, D]."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)


def yarn_frequencies(head_dim: int, theta: float, scaling: YarnScaling | None) -> Tensor:
    """[D / 2] float32 inverse frequencies with YaRN (arXiv 2309.00071, section 3.2) where asked.

    Pairs that turn more than ``beta_fast`` times within the original context stay, those that turn less than
    ``beta_slow`` times are slowed down by ``factor``, and the pairs between are blended by their index.
    """
    inv_freq = inverse_frequencies(head_dim, theta, None)
    if scaling is None:
        return inv_freq

    def pair_of(turns: float) -> float:
        """Index, not yet whole, of the pair that turns so often within the original context."""
        wavelength = scaling.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), head_dim - 1)
    width = max(high - low, 0.001)  # a step where both fall on one pair
    ramp = ((torch.arange(head_dim // 2).float() - low) / width).clamp(0.0, 1.0)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)


@dataclass(frozen=True, slots=True)
class PairRotation:
    """How the rows of one forward are turned, and how their queries are scaled."""

    cos: Tensor  # [.., 1, D / 2] float32, for the pair of components 2i and 2i + 1
    sin: Tensor  # [.., 1, D / 2] float32
    query_scale: Tensor | None  # [.., 1, 1] float32; None where it is 1 everywhere


class PairRope:
    """Rotations of neighbouring pairs with YaRN frequencies, and Llama 4's scale of queries far into a
    context.

    Angles, cosines and sines are float32 whatever the model's dtype: bfloat16 cannot tell late positions
    apart.
    """

    def __init__(self, config: Mistral4Config, device: str) -> None:
        self._inv_freq = yarn_frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn).to(device)
        self._beta, self._original = config.llama_4_beta, config.llama_4_original_positions

    def __call__(self, positions: Tensor) -> PairRotation:
        """positions: [..] int64."""
        angles = (positions[..., None].float() * self._inv_freq).unsqueeze(-2)
        return PairRotation(angles.cos(), angles.sin(), self._query_scale(positions))

    def _query_scale(self, positions: Tensor) -> Tensor | None:
        """1 + beta ln(1 + floor(position / original)), which is 1 within the original context."""
        if self._beta == 0.0:
            return None
        contexts = torch.div(positions, self._original, rounding_mode="floor").float()
        return (1.0 + self._beta * torch.log1p(contexts))[..., None, None]
