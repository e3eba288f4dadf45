"""What kernels for GPUs refuse, before anything is launched: on shapes alone, so on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import UnsupportedError
from kernels.ops import OPERATIONS, Source

NAMED = {operation.name: operation for operation in OPERATIONS}


def arguments_of(name: str) -> list[Any]:
    return list(NAMED[name].real[0].make(Source("meta")))


def refusal(name: str, arguments: list[Any]) -> str:
    with pytest.raises(UnsupportedError) as refused:
        NAMED[name].load()(*arguments)
    assert refused.value.code == "unsupported_operation"
    return str(refused.value)


def strided(x: Tensor) -> Tensor:
    """The same shape, its numbers two apart."""
    return torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)[..., 0]


@pytest.mark.parametrize(
    ("name", "index", "change", "message"),
    [
        ("mla_tree_attention", 0, lambda q: q.double(), "q is float64, expected float32, bfloat16, float16"),
        ("mla_tree_attention", 0, strided, "q has strides"),
        ("mla_tree_attention", 1, lambda pool: pool.half(), "the pool is float16, expected bfloat16, float8"),
        ("mla_tree_attention", 1, lambda pool: pool[:, :300], r"pool has shape \[.*\], expected \[S, 320\]"),
        ("mla_tree_attention", 4, lambda dim: 50, r"rows have 50 \+ 270 numbers, expected 1 to 256 each"),
        ("mha_tree_attention", 0, lambda q: q[..., :7, :], "7 query heads, expected a multiple of 3"),
        ("mha_tree_attention", 2, strided, "values has strides"),
        ("rms_norm", 0, lambda x: x.double(), "x is float64"),
        ("rms_norm", 0, strided, "x has rows of stride 2, expected 1"),
        ("rms_norm", 1, lambda weight: weight[:-1], r"weight has shape \[4095\], expected \[4096\]"),
        ("silu_mul", 0, lambda gate_up: gate_up.double(), "gate_up is float64"),
        ("silu_mul", 0, lambda gate_up: gate_up[:, 1:], "gate_up has 3071 columns, expected an even number"),
        ("silu_mul", 0, strided, "gate_up has rows of stride 2, expected 1"),
        ("rope_write", 0, strided, "heads has strides"),
        ("rope_write", 6, lambda slots: slots.int(), "slots is int32, expected int64"),
        ("rope_latent_write", 1, lambda latents: latents[:, 1:], "latents"),
        ("rope_latent_write", 4, lambda cos: cos.bfloat16(), "cos is bfloat16, expected float32"),
        ("compact_path", 0, strided, "pools has strides"),
        ("compact_path", 2, lambda slots: slots[:, 1:], "path .* and slots .*, expected the same"),
        ("choose", 0, lambda logits: logits.bfloat16(), "logits is bfloat16, expected float32"),
        ("choose", 0, strided, "logits has strides"),
        ("choose", 1, lambda positions: positions[:, 1:], r"positions has shape \[1, 3\], expected \[1, 4\]"),
        ("choose", 2, lambda temperature: temperature[:0], r"temperature has shape \[0\], expected \[1\]"),
        ("choose", 5, lambda seeds: seeds[:, None], r"seeds has shape \[1, 1\], expected \[1\]"),
        ("best", 1, lambda num: 65, "65 columns of 32768, expected 1 to 64"),
    ],
)
def test_refusals(name: str, index: int, change: Any, message: str) -> None:
    arguments = arguments_of(name)
    arguments[index] = change(arguments[index])
    with pytest.raises(UnsupportedError, match=f"^{name}: .*{message}"):
        NAMED[name].load()(*arguments)


def test_more_nodes_than_a_word_has_bits() -> None:
    """Trees have at most 64 nodes, wherever they appear; chains have no words and no such limit."""
    arguments = arguments_of("mla_tree_attention")
    q, _, rows = arguments[:3]
    arguments[0] = q.expand(-1, 65, -1, -1).contiguous()
    words = rows.words.expand(-1, 65).contiguous()
    arguments[2] = replace(rows, words=words, num_own=65)
    assert "65 own rows, expected 1 to 64" in refusal("mla_tree_attention", arguments)
    assert "65 nodes" in refusal("ancestor_words", [torch.empty(1, 65, dtype=torch.int64, device="meta")])
    path = torch.empty(2, 65, dtype=torch.int64, device="meta")
    assert "65 nodes" in refusal("compact_path", [arguments_of("compact_path")[0], path, path])


def test_tables_of_the_wrong_shape() -> None:
    arguments = arguments_of("mla_tree_attention")
    rows = arguments[2]
    for wrong, message in (
        (replace(rows, page_table=rows.page_table.float()), "page_table is float32, expected int64, int32"),
        (replace(rows, kv_lens=rows.kv_lens.expand(2)), "kv_lens"),
        (replace(rows, page_size=0), "a page size of 0"),
        (replace(rows, words=rows.words.repeat(2, 1)), "words of shape [2, 1], expected [1, 1]"),
        (replace(rows, words=None, num_own=9), "9 own rows of chains, expected one for each of 1 nodes"),
    ):
        arguments[2] = wrong
        assert message in refusal("mla_tree_attention", arguments)
