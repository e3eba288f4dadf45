"""Deliberate mistakes, and which of the two oracles sees each of them (ARCHITECTURE.md section 6).

An oracle that has never failed proves nothing. ``tokens`` is speculative == plain, ``state`` is pools == from
scratch. The mistake in the head's features is why both are needed: it costs acceptance and changes no token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import engine.decoding
import engine.models.decoder
import engine.rows
import verify.accept
from draft.head import FeatureDraft
from engine.core import Batch, DraftTree, SamplingParams, Speculation, Verdict
from engine.kvcache import KVPool
from engine.rows import chain_bias
from tests.engine.rig import Model, Prophet, echo_model, make_engine, plain_tokens, prompts_of, record
from tests.engine.state import state_matches

PROMPTS = prompts_of([3, 9, 2])
Mutate = Callable[[pytest.MonkeyPatch], None]


def params_of(temperature: float) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, seed=i, max_tokens=20) for i in range(len(PROMPTS))]


def compaction_skipped(patch: pytest.MonkeyPatch) -> None:
    def nothing(pool: KVPool, batch: Batch, verdict: Verdict) -> None:
        pass

    patch.setattr(engine.models.decoder, "compact", nothing)


def causal_mask(patch: pytest.MonkeyPatch) -> None:
    """Only the target's mask is wrong; acceptance walks the true tree."""
    patch.setattr(engine.rows, "tree_bias", lambda parents: chain_bias(len(parents)))


def first_rows_to_the_head(patch: pytest.MonkeyPatch) -> None:
    observe = FeatureDraft.observe

    def wrong(self: FeatureDraft, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        shifted = features.clone()
        for row, length in enumerate(verdict.length.tolist()):
            shifted[row, verdict.path[row, :length]] = features[row, :length]
        observe(self, batch, tree, verdict, shifted)

    patch.setattr(FeatureDraft, "observe", wrong)


def bonus_at_the_root(patch: pytest.MonkeyPatch) -> None:
    def wrong(tree: DraftTree, choice: Tensor) -> Verdict:
        verdict = verify.accept.accept(tree, choice)
        return Verdict(verdict.path, verdict.length, choice[:, 0])

    patch.setattr(engine.decoding, "accept", wrong)


def ancestors_not_checked(patch: pytest.MonkeyPatch) -> None:
    """Every node that agrees with its own parent's choice is taken, whether the parent was or not."""

    def wrong(tree: DraftTree, choice: Tensor) -> Verdict:
        agrees = (tree.parents >= 0) & (tree.tokens == choice.gather(1, tree.parents.clamp(min=0)))
        path = torch.full_like(tree.parents, -1)
        lengths, bonuses = [], []
        for row in range(len(path)):
            nodes = [0, *agrees[row].nonzero()[:, 0].tolist()]
            path[row, : len(nodes)] = torch.tensor(nodes)
            lengths.append(len(nodes))
            bonuses.append(int(choice[row, nodes[-1]]))
        return Verdict(path, torch.tensor(lengths), torch.tensor(bonuses))

    patch.setattr(engine.decoding, "accept", wrong)


def no_mistake(patch: pytest.MonkeyPatch) -> None:
    pass


TABLE = [  # the mistake; do the tokens still match, does the state
    (no_mistake, True, True),
    (compaction_skipped, False, False),
    (causal_mask, False, False),
    (first_rows_to_the_head, True, False),
    (bonus_at_the_root, False, True),
    (ancestors_not_checked, False, False),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return echo_model(8)


def oracles(model: Model, draft: str, temperature: float, mutate: Mutate) -> tuple[bool, bool]:
    """(tokens match, state matches) of a run with a mistake; the plain tokens are made before it."""
    params = params_of(temperature)
    expected = plain_tokens(model, PROMPTS, params)
    proposer = Prophet(dict(enumerate(expected)), model.config.vocab_size) if draft == "prophet" else draft
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        speculating = make_engine(model, proposer, speculation=Speculation(12, 5, 4))
        recording = record(speculating, PROMPTS, params)
    tokens = [completion.token_ids for completion in recording.completions]
    return tokens == expected, state_matches(model, recording, draft)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("mutate", "tokens", "state"), TABLE, ids=[entry[0].__name__ for entry in TABLE])
def test_which_oracle_sees_it(
    model: Model, mutate: Mutate, tokens: bool, state: bool, temperature: float
) -> None:
    assert oracles(model, "eagle", temperature, mutate) == (tokens, state)


WITHOUT_A_HEAD = [
    entry for entry in TABLE if entry[0] in (no_mistake, compaction_skipped, causal_mask, bonus_at_the_root)
]


@pytest.mark.parametrize(
    ("mutate", "tokens", "state"), WITHOUT_A_HEAD, ids=[e[0].__name__ for e in WITHOUT_A_HEAD]
)
def test_which_oracle_sees_it_in_random_trees(
    model: Model, mutate: Mutate, tokens: bool, state: bool
) -> None:
    assert oracles(model, "prophet", 0.0, mutate) == (tokens, state)


def test_the_eagle_3_head_too(model: Model) -> None:
    assert oracles(model, "eagle3", 0.0, no_mistake) == (True, True)
    assert oracles(model, "eagle3", 0.0, first_rows_to_the_head) == (True, False)
