"""Mistakes that a graph makes easy, planted: each of them is seen.

A head's mistakes change no token, only how often it is right; see ``tests.engine.test_mutants``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import engine.batches
from engine.core import Batch, DraftTree, Scores
from engine.graphs import Graphs, Mailbox
from engine.models.decoder import Decoder
from engine.scheduler import Scheduler
from tests.engine.rig import Model, make_engine
from tests.engine.test_captured import PLAIN, PROMPTS, TREE, echo, gpu, params_of, run, tokens
from tests.simulated import DEVICE, Simulated, SimulatedTensor

__all__ = ["echo", "gpu"]  # fixtures


def stale(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """What a mailbox has under a name stays what it was when the graph was captured."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        send, kept = Mailbox.send, dict[int, Tensor]()

        def wrong(self: Mailbox) -> None:
            send(self)
            if name in self.device:
                self.device[name].copy_(kept.setdefault(id(self), self.device[name].clone()))

        patch.setattr(Mailbox, "send", wrong)

    return mutate


def padding_keeps_its_pages(patch: pytest.MonkeyPatch) -> None:
    """A sequence that has left goes on writing."""

    def wrong(table: Tensor, pages: Sequence[list[int]]) -> None:
        for row, own in enumerate(pages):
            table[row, : len(own)] = torch.tensor(own)

    patch.setattr(engine.batches, "_fill", wrong)


def a_length_as_a_number(patch: pytest.MonkeyPatch) -> None:
    """A length is read on the host, and what it was when the graph was captured is in the graph."""
    score = Decoder.score

    def wrong(self: Decoder, batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        if len(batches) == 1 and batches[0].is_fixed:
            assert isinstance(batches[0].kv_lens, SimulatedTensor)
            length = batches[0].kv_lens.numbers.tolist()[0]
            batches = [replace(batches[0], kv_lens=torch.full_like(batches[0].kv_lens, length))]
        return score(self, batches, trees)

    patch.setattr(Decoder, "score", wrong)


@pytest.mark.parametrize(
    "mutate",
    [
        *(stale(name) for name in ("kv_lens", "page_table", "roots", "seed", "temperature")),
        padding_keeps_its_pages,
        a_length_as_a_number,
    ],
    ids=["kv_lens", "page_table", "roots", "seed", "temperature", "padding", "number"],
)
def test_mistakes_show(
    gpu: Simulated, echo: Model, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    params = params_of(4)
    expected = tokens(run(make_engine(echo), params))
    mutate(monkeypatch)
    device = make_engine(echo, speculation=PLAIN, device=DEVICE, graphs=Graphs(gpu), prefix_caching=False)
    try:
        got = tokens(run(device, params))
    except (AssertionError, IndexError, RuntimeError):
        return  # it shows at once
    assert got != expected


@pytest.mark.parametrize("name", ["tokens", "counts"])
def test_mistakes_in_a_head_show_in_what_it_gets_right(
    gpu: Simulated, echo: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They change no token; but the head is hardly ever right again. Ahead of the host it is not the host who
    sends them: see ``test_ahead``."""
    monkeypatch.setattr(Scheduler, "next_ahead", lambda self, batch: None)

    def num_accepted() -> int:
        device = make_engine(echo, "eagle3", speculation=TREE, device=DEVICE, graphs=Graphs(gpu))
        return sum(delta.num_accepted for of in run(device, params_of(1, 20), PROMPTS[1:]) for delta in of)

    usual = num_accepted()
    stale(name)(monkeypatch)
    assert num_accepted() < usual / 2
