"""flashinfer's kernels behind our shapes: optional, for comparison and prompts, imported only if asked for.

Plan on the host once a step, run in every layer: what a kernel cannot do is refused in ``plan``, with the
reason. What flashinfer 0.7 can do of this engine's work, and what not:

    attention of prompts     heads of 128 for keys and 128 for values, causal; its best supported shape
    MLA of decoded tokens    latents of 256 + 64 in bfloat16, without a mask or causal: chains and plain
                             decoding. A tree has a mask of its own, which its launcher does not take; FP8
                             latents are compiled for 512 + 64 alone; planning copies lengths to the host
    norms                    in bfloat16 and float16
    sampling                 a baseline to measure against: its random numbers depend on a row's place in the
                             batch, ours on (seed, position), so the engine never draws with it
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kernels.errors import UnsupportedError, require
from kernels.paged import TreeRows

_WORKSPACE: Final = 128 << 20  # bytes, as flashinfer's documentation advises
_HALVES: Final = (torch.bfloat16, torch.float16)
_PREFILL_DIMS: Final = ((64, 64), (128, 128), (192, 128), (256, 256))
_LATENTS: Final = ((512, 64), (256, 64))


def _library() -> Any:
    """The package. Raises UnsupportedError where it is not installed."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise UnsupportedError(
            f"flashinfer: the package cannot be imported ({error}); install haast[cuda]"
        ) from error


def _starts(lens: Sequence[int], device: torch.device) -> Tensor:
    """Where each of several runs begins and the last one ends, [n + 1] int32."""
    return torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)


class PromptAttention:
    """Causal attention of new tokens over their sequences' keys and values, unabsorbed and ragged."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        self._wrapper = _library().BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")

    def plan(
        self,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        heads: tuple[int, int],
        dims: tuple[int, int],
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        """For sequences whose last ``query_lens`` of ``key_lens`` tokens are new.

        heads: of queries and of keys; dims: of keys and of values. Raises UnsupportedError.
        """
        operation = "flashinfer prompt attention"
        require(dims in _PREFILL_DIMS, operation, f"head dims {dims}, expected one of {_PREFILL_DIMS}")
        require(dtype in _HALVES, operation, f"dtype {dtype}, expected bfloat16 or float16")
        require(heads[0] % heads[1] == 0, operation, f"{heads[0]} query heads on {heads[1]} key heads")
        fits = len(query_lens) == len(key_lens) and all(
            0 < new <= all_of for new, all_of in zip(query_lens, key_lens, strict=False)
        )
        found = f"{list(query_lens)} queries of {list(key_lens)} keys, expected 1 to as many of each"
        require(fits, operation, found)
        self._wrapper.plan(
            _starts(query_lens, self._device),
            _starts(key_lens, self._device),
            heads[0],
            heads[1],
            dims[0],
            head_dim_vo=dims[1],
            causal=True,
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [queries, H, K]; k: [keys, Hkv, K]; v: [keys, Hkv, V]; sequences behind one another -> [queries,
        H, V]."""
        out: Tensor = self._wrapper.run(q, k, v)
        return out


class LatentAttention:
    """Absorbed MLA over paged latents, for plain decoding and chains."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        self._wrapper = _library().mla.BatchMLAPagedAttentionWrapper(workspace)
        self._rank = self._page_size = 0

    def plan(
        self,
        rows: TreeRows,
        num_nodes: int,
        num_heads: int,
        latent: tuple[int, int],
        scale: float,
        dtype: torch.dtype,
        pool_dtype: torch.dtype,
    ) -> None:
        """latent: numbers of a row that are its value, and of the rotated key behind them. Waits for the
        device, since lengths are planned with on the host. Raises UnsupportedError."""
        operation = "flashinfer MLA"
        mask = "a tree, whose mask it does not take; expected plain decoding or a chain"
        require(rows.words is None or num_nodes == 1, operation, mask)
        require(rows.start == 0, operation, f"rows from {rows.start} on, expected all of them")
        require(latent in _LATENTS, operation, f"latents of {latent}, expected one of {_LATENTS}")
        require(dtype in _HALVES, operation, f"dtype {dtype}, expected bfloat16 or float16")
        found = f"a pool of {pool_dtype} for queries of {dtype}, expected the same of both"
        require(pool_dtype == dtype, operation, found)
        lens = [length + num_nodes for length in rows.kv_lens.tolist()]
        pages = [-(-length // rows.page_size) for length in lens]
        table = [row[:count] for row, count in zip(rows.page_table, pages, strict=True)]
        self._rank, self._page_size = latent[0], rows.page_size
        self._wrapper.plan(
            _starts([num_nodes] * len(lens), self._device),
            _starts(pages, self._device),
            torch.cat(table).int(),
            torch.tensor(lens, dtype=torch.int32, device=self._device),
            num_heads,
            *latent,
            rows.page_size,
            True,  # causal
            scale,
            dtype,
            pool_dtype,
        )

    def run(self, q: Tensor, pool: Tensor) -> Tensor:
        """q: [B, N, H, R + P]; pool: [S, R + P] -> [B, N, H, R]."""
        assert self._rank, "run follows plan"
        queries, paged = q.flatten(0, 1), pool.view(-1, self._page_size, pool.shape[-1])
        out: Tensor = self._wrapper.run(
            queries[..., : self._rank],
            queries[..., self._rank :],
            paged[..., : self._rank],
            paged[..., self._rank :],
        )
        return out.view(*q.shape[:-1], self._rank)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; bfloat16 or float16. Raises UnsupportedError."""
    require(x.dtype in _HALVES, "flashinfer rms_norm", f"x is {x.dtype}, expected bfloat16 or float16")
    out: Tensor = _library().norm.rmsnorm(x.reshape(-1, x.shape[-1]), weight, eps)
    return out.view(x.shape)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """A token for each row of logits [B, V], drawn from its nucleus -> [B] int32. A baseline; see above."""
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    chosen: Tensor = _library().sampling.top_p_sampling_from_probs(probs, top_p)
    return chosen
