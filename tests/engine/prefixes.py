"""What the tests of the prefix cache share: requests with a common prefix, and what they get alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from draft.head import FeatureDraft
from engine.core import Delta, Request, SamplingParams, Speculation
from engine.step import Engine
from tests.engine.rig import Model, echo_model, make_engine, pool_rows, prompts_of
from tests.engine.test_scheduler import check_pages

MODEL: Model = echo_model(11)
TEXT = prompts_of([60], seed=5)[0]
OTHER = prompts_of([60], seed=6)[0]
PAGE = 4
DRAFTS = ["none", "ngram", "eagle3", "eagle"]


def sampled(max_tokens: int = 10, temperature: float = 0.8, seed: int = 3) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)


ALONE: dict[tuple[tuple[int, ...], SamplingParams], tuple[int, ...]] = {}


def alone(prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
    """What a request gets on an engine of its own, without cache and speculation."""
    key = (tuple(prompt), params)
    if key not in ALONE:
        ALONE[key] = make_engine(MODEL, prefix_caching=False).generate([prompt], params)[0].token_ids
    return ALONE[key]


def run(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    speculation: Speculation | None = None,
    salt: str = "",
) -> tuple[tuple[int, ...], int]:
    """The answer to one request on an idle engine, and how many tokens of its prompt were cached."""
    engine.add(Request(0, tuple(prompt), params, speculation, cache_salt=salt))
    tokens: list[int] = []
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
        check_pages(engine)
    for delta in deltas:
        tokens += delta.token_ids
    assert len({delta.num_cached for delta in deltas}) == 1
    return tuple(tokens), deltas[-1].num_cached


@contextmanager
def unwritten(engine: Engine) -> Iterator[None]:
    """Pages that can be found now keep every byte, in both pools, as long as they can be found."""
    pages = engine.scheduler.pages
    entries = dict(pages._entries)
    pools = [pool_rows(engine)]
    if isinstance(engine.draft, FeatureDraft):
        pools.append(engine.draft.model.pool.rows)

    def rows_of(pool: Tensor, page: int) -> Tensor:
        return pool[:, :, :, page * pages.page_size : (page + 1) * pages.page_size]

    kept = {page: [rows_of(pool, page).clone() for pool in pools] for page in entries}
    yield
    for page, entry in entries.items():
        if pages._entries.get(page) is not entry:
            continue  # given up, or taken over, since then
        head_rows_too = entry.has_draft_rows
        for pool, before in list(zip(pools, kept[page], strict=True))[: 1 + head_rows_too]:
            assert torch.equal(rows_of(pool, page), before), f"page {page} was written"


def share(engine: Engine) -> None:
    """Share pages as a GPU does, where rows need not lie side by side."""
    engine.scheduler.prefixes._side_by_side = False
