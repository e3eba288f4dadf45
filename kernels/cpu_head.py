"""A draft head's level in two calls: ``cpu_head.h``, for EAGLE-3 heads with matrices in panels.

A head's level is a hundredth of the target's step, and as operations one by one it spends most of its time
on the way to them: the target's weights have just swept every cache, and the interpreter finds nothing where
it left it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import cpu
from kernels.cpu_layer import FusedLayer, LayerRows

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class _Head(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("embedding", "input_norm", "hidden_norm", "norm", "cos", "sin")),
        ("token_ids", _POINTER),
        *((name, cpu.Matrix) for name in ("fc", "logits")),
        *((name, _LONG) for name in ("num_features", "vocab")),
        ("eps", ctypes.c_float),
    )


_FORWARD = (_POINTER,) * 6 + (_LONG,) + (_POINTER,) * 4
_OFFERS = (_POINTER,) * 5 + (_LONG,) * 4


class FusedHead:
    """A head around one decoder layer that is given [norm of the embedding, norm of the feature].

    norms: of embeddings, of features, and of the layer's output before the logits, [H] each; embedding:
    [V, H]; rotation: cos and sin of every position, [P, D], the first half of sin negated; fc: from features
    of the target, F wide, to H; token_ids: [Vd] int64, what the logits stand for. See ``fused_head``.
    """

    def __init__(
        self,
        layer: FusedLayer,
        norms: tuple[Tensor, Tensor, Tensor],
        embedding: Tensor,
        rotation: tuple[Tensor, Tensor],
        fc: cpu.PanelMatrix,
        logits: cpu.PanelMatrix,
        token_ids: Tensor,
        eps: float,
    ) -> None:
        assert fc.num_outputs == layer.sizes.hidden
        assert len(token_ids) == logits.num_outputs
        forward, offers = cpu.threaded("head_forward", _FORWARD), cpu.threaded("head_offers", _OFFERS)
        assert forward is not None
        assert offers is not None
        self.layer, self.num_features, self.vocab_size = layer, fc.num_inputs, logits.num_outputs
        (self._short, self._long), (self._offers, _) = forward, offers
        self._held = norms, embedding, rotation, fc, logits, token_ids  # what the addresses below lead to
        self._struct = _Head(
            *(part.data_ptr() for part in (embedding, *norms, *rotation, token_ids)),
            fc.struct,
            logits.struct,
            self.num_features,
            self.vocab_size,
            eps,
        )
        self._address = ctypes.addressof(self._struct)

    def forward(
        self,
        tokens: Tensor,
        feature: Tensor,
        positions: Tensor,
        rows: LayerRows,
        pool: tuple[Tensor, Tensor],
        *,
        is_target: bool = False,
    ) -> Tensor:
        """As the layer's call, with what it is given and the rotation looked up. tokens, positions: [T]
        int64, within the tables; feature: [T, H], or [T, F] of the target's if ``is_target``; rows: without a
        rotation."""
        sizes, num_rows = self.layer.sizes, rows.num_rows
        assert not rows.has_rotation
        assert tokens.shape == positions.shape == (num_rows,)
        assert feature.shape == (num_rows, self.num_features if is_target else sizes.hidden)
        assert all(part.shape[1] == rows.num_slots for part in pool)
        feature, tokens, positions = feature.contiguous(), tokens.contiguous(), positions.contiguous()
        out = feature.new_empty(num_rows, sizes.hidden)
        space = feature.new_empty(num_rows * (3 * sizes.hidden + 2 * sizes.head_dim))
        (self._long if rows.is_long else self._short)(
            self._address,
            self.layer.address,
            rows.address,
            tokens.data_ptr(),
            positions.data_ptr(),
            feature.data_ptr(),
            is_target,
            out.data_ptr(),
            pool[0].data_ptr(),
            pool[1].data_ptr(),
            space.data_ptr(),
        )
        return out

    def offers(self, feature: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The tokens of the ``count`` largest logits after features [.., H], best first, and their shares of
        the logits' mass, [.., count] each."""
        hidden, shape = self.layer.sizes.hidden, feature.shape[:-1]
        assert 0 < count <= self.vocab_size
        feature = feature.contiguous()
        num_rows = feature.numel() // hidden
        space = feature.new_empty(num_rows * (hidden + self.vocab_size))
        tokens, shares = torch.empty(*shape, count, dtype=torch.int64), feature.new_empty(*shape, count)
        self._offers(
            self._address,
            feature.data_ptr(),
            space.data_ptr(),
            tokens.data_ptr(),
            shares.data_ptr(),
            num_rows,
            hidden,
            count,
            torch.get_num_threads(),
        )
        return tokens, shares


def fused_head(
    layer: FusedLayer | None,
    norms: tuple[Tensor, Tensor, Tensor],
    embedding: Tensor,
    rotation: tuple[Tensor, Tensor],
    fc: object,
    logits: object,
    token_ids: Tensor,
    eps: float,
) -> FusedHead | None:
    """A head made of its parts, or None where it cannot be two calls. fc, logits: as packed by
    ``dispatch.pack_half`` or ``dispatch.pack_bytes``."""
    tensors = (*norms, embedding, *rotation)
    if (
        layer is None
        or not isinstance(fc, cpu.PanelMatrix)
        or not isinstance(logits, cpu.PanelMatrix)
        or logits.num_outputs % cpu.PANEL
        or layer.num_given != 2 * layer.sizes.hidden
        or not (token_ids.dtype is torch.int64 and token_ids.is_contiguous())
        or not all(x.is_cpu and x.dtype is torch.float32 and x.is_contiguous() for x in tensors)
    ):
        return None
    return FusedHead(layer, norms, embedding, rotation, fc, logits, token_ids, eps)
