"""The adapter to flashinfer without flashinfer: what it would be asked, and what is refused before."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import flashinfer
from kernels.errors import UnsupportedError
from kernels.paged import TreeRows, ancestor_words

CPU = torch.device("cpu")
BF16 = torch.bfloat16


class Recorder:
    """Takes note of what it is called with; ``run`` and norms return or do what the real ones would in
    shape."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def wrapper(self, *args: Any, **kwargs: Any) -> Recorder:
        self.calls["made"] = args, kwargs
        return self

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.calls["plan"] = args, kwargs

    def run(self, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        self.calls["run"] = (q, *others), {}
        return torch.zeros(*q.shape[:-1], others[-1].shape[-1] if len(others) == 2 else q.shape[-1])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = SimpleNamespace(
        BatchPrefillWithRaggedKVCacheWrapper=recorder.wrapper,
        mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=recorder.wrapper),
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return recorder


def chain_rows(lens: list[int], page_size: int = 4) -> TreeRows:
    table = torch.arange(len(lens) * 5).view(len(lens), 5) + 1
    return TreeRows(table, page_size, torch.tensor(lens), None, 2)


def test_without_flashinfer_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(UnsupportedError, match=r"cannot be imported .* install haast\[cuda\]"):
        flashinfer.LatentAttention(CPU)


def test_latents_are_planned_by_pages_with_the_new_rows_counted(fake: Recorder) -> None:
    attention = flashinfer.LatentAttention(CPU)
    attention.plan(chain_rows([5, 0, 14]), 2, 32, (256, 64), 0.125, BF16, BF16)
    args, _ = fake.calls["plan"]
    queries, pages, indices, lens = (argument.tolist() for argument in args[:4])
    assert queries == [0, 2, 4, 6]
    assert lens == [7, 2, 16], "committed rows and the two that were just written"
    assert pages == [0, 2, 3, 7]
    assert indices == [1, 2, 6, 11, 12, 13, 14]
    assert args[4:] == (32, 256, 64, 4, True, 0.125, BF16, BF16)

    pool = torch.randn(80, 320)
    q = torch.randn(3, 2, 32, 320)
    assert attention.run(q, pool).shape == (3, 2, 32, 256)
    (content, rotated, latents, keys), _ = fake.calls["run"]
    torch.testing.assert_close(torch.cat((content, rotated), -1).view(q.shape), q)
    torch.testing.assert_close(torch.cat((latents, keys), -1).view(pool.shape), pool)
    assert latents.shape == (20, 4, 256)


def test_what_its_mla_cannot_do_is_refused_in_plan(fake: Recorder) -> None:
    attention, chain = flashinfer.LatentAttention(CPU), chain_rows([5])
    words = ancestor_words(torch.tensor([[-1, 0, 0]]))
    tree = TreeRows(chain.page_table, 4, chain.kv_lens, words, 3)
    late = TreeRows(chain.page_table, 4, chain.kv_lens, None, 2, start=1)
    latent, fp8 = (256, 64), torch.float8_e4m3fn
    for given, reason in (
        ((tree, 3, 32, latent, 1.0, BF16, BF16), "a tree, whose mask it does not take"),
        ((late, 2, 32, latent, 1.0, BF16, BF16), "rows from 1 on"),
        ((chain, 2, 32, (128, 64), 1.0, BF16, BF16), r"latents of \(128, 64\)"),
        ((chain, 2, 32, latent, 1.0, BF16, fp8), "a pool of torch.float8_e4m3fn"),
        ((chain, 2, 32, latent, 1.0, torch.float32, torch.float32), "dtype torch.float32"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            attention.plan(*given)
    assert "plan" not in fake.calls


def test_a_root_alone_is_no_tree(fake: Recorder) -> None:
    chain = chain_rows([5])
    root = TreeRows(chain.page_table, 4, chain.kv_lens, torch.tensor([[1]]), 1)
    flashinfer.LatentAttention(CPU).plan(root, 1, 32, (256, 64), 1.0, BF16, BF16)
    assert "plan" in fake.calls


def test_prompts_are_ragged_and_causal(fake: Recorder) -> None:
    attention = flashinfer.PromptAttention(CPU)
    attention.plan([3, 5], [7, 5], (32, 32), (128, 128), 0.1, BF16)
    args, kwargs = fake.calls["plan"]
    assert [argument.tolist() for argument in args[:2]] == [[0, 3, 8], [0, 7, 12]]
    assert args[2:] == (32, 32, 128)
    assert kwargs["causal"] is True
    assert (kwargs["head_dim_vo"], kwargs["sm_scale"]) == (128, 0.1)
    for given, reason in (
        (([8], [7], (32, 32), (128, 128), 0.1, BF16), r"\[8\] queries of \[7\] keys"),
        (([3], [7], (32, 32), (96, 96), 0.1, BF16), r"head dims \(96, 96\)"),
        (([3], [7], (32, 5), (128, 128), 0.1, BF16), "32 query heads on 5"),
        (([3], [7], (32, 32), (128, 128), 0.1, torch.float32), "dtype torch.float32"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            attention.plan(*given)
