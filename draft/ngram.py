"""Prompt lookup: propose what followed the last occurrence of the current n-gram (Saxena 2023, "Prompt Lookup
Decoding").

No weights and hardly any time. Good where the answer repeats the prompt or itself (summaries, code edits,
lists), idle elsewhere. ``NgramDraft`` proposes nothing else; ``PromptLookup`` works beside a head, and says
how likely it is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from draft.masking import has_grammar, num_allowed
from draft.none import Unplanned, root_tokens
from engine.core import Batch, DraftTree, Sequence, Speculation, Verdict
from engine.roles import DraftMask

_SIZES = (4, 3, 2)  # lengths of the n-gram to look for, longest first


class NgramIndex:
    """Where each n-gram of a growing token list last ended. Only new tokens cost anything."""

    def __init__(self) -> None:
        self._last_end: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0  # ends up to here are known

    def find(self, tokens: list[int]) -> int | None:
        """Where the most recent earlier occurrence of the longest known suffix ended: the place of the token
        after it. tokens: the list of the last call with more at its end."""
        for end in range(
            self._num_indexed + 1, len(tokens)
        ):  # the suffix itself is not an earlier occurrence
            for size in _SIZES:
                if size <= end:
                    self._last_end[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(len(tokens) - 1, 0)
        for size in _SIZES:
            found = self._last_end.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if found is not None:
                return found
        return None

    def continuation(self, tokens: list[int], num_tokens: int) -> list[int]:
        """num_tokens tokens that followed that occurrence, or none. Past the end of the list they repeat, as
        the list would if it went on so.

        Example: [5, 6, 7, 8, 5, 6] continues after the earlier (5, 6) with [7, 8, 5, 6, 7, 8, ..].
        """
        found = self.find(tokens)
        if found is None:
            return []
        period = len(tokens) - found
        return [tokens[found + i % period] for i in range(num_tokens)]


class NgramDraft(Unplanned):
    """A draft (roles.Draft) that proposes one chain from the sequence's own tokens.

    It is as long as the deepest path of the tree it stands for, or as ``lookup`` if that is more.
    """

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    name = "ngram"
    rows = None

    def vocab_coverage(self) -> float | None:
        return None

    def scratch_rows(self, speculation: Speculation) -> int:
        return 0 if speculation.is_off else max(speculation.nodes - 1, speculation.lookup)

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        chains = [
            []
            if spec.is_off
            else self._indexes.setdefault(seq.request.id, NgramIndex()).continuation(
                seq.tokens, spec.most_accepted
            )
            for seq, spec in zip(batch.seqs, batch.speculation, strict=True)
        ]
        chains = [
            chain[: num_allowed(chain, seq, mask)] for seq, chain in zip(batch.seqs, chains, strict=True)
        ]
        roots, longest = root_tokens(batch), max(map(len, chains))
        tokens = torch.zeros(len(roots), 1 + longest, dtype=torch.int64)  # rows behind the chains are padding
        parents = torch.full_like(tokens, -1)
        for row, chain in enumerate(chains):
            tokens[row, 1 : 1 + len(chain)] = torch.tensor(chain, dtype=torch.int64)
            parents[row, 1 : 1 + len(chain)] = torch.arange(len(chain))
        tokens = tokens.to(roots.device)
        tokens[:, :1] = roots
        return DraftTree(tokens, parents.to(roots.device))

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        pass

    def forget(self, seq: Sequence) -> None:
        self._indexes.pop(seq.request.id, None)


MAX_MATCH = 16  # longer matches are counted with these
_PRIOR_TRIALS = 8.0  # how many observations the prior counts for
_DECAY = 0.998  # per settled proposal
_LEAST_LIKELY = 0.1  # a token less likely than this is worth its row on hardly any machine


class MatchRates:
    """How often the next token is the same, given that the last m were.

    The prior m / (m + 2) is close to what greedy answers of a small chat model show, m / (m + 3) to sampled
    ones. A chain's later tokens need no rates of their own: where its first was right, the match has grown by
    one.
    """

    def __init__(self, *, sampled: bool = False) -> None:
        length = torch.arange(MAX_MATCH + 1).double()
        self.trials = [_PRIOR_TRIALS] * (MAX_MATCH + 1)
        self.hits: list[float] = (_PRIOR_TRIALS * length / (length + 2 + sampled)).tolist()
        self._prior = self.hits.copy()

    def __call__(self, length: int) -> float:
        """Chance that a match of so many tokens goes on."""
        length = min(length, MAX_MATCH)
        return self.hits[length] / self.trials[length]

    def count(self, length: int, went_on: bool) -> None:
        """Learn from one match; what was learned before fades."""
        length = min(length, MAX_MATCH)
        self.trials[length] = _PRIOR_TRIALS + _DECAY * (self.trials[length] - _PRIOR_TRIALS) + 1
        self.hits[length] = self._prior[length] + _DECAY * (self.hits[length] - self._prior[length]) + went_on


@dataclass(frozen=True, slots=True)
class Lookup:
    """A chain that prompt lookup proposes, and the chance of every token that the chain is right so far."""

    tokens: list[int]
    chances: list[float]


@dataclass(slots=True)
class _State:
    """A sequence's index, and its last proposal until the outcome is known."""

    index: NgramIndex = field(default_factory=NgramIndex)
    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    start: int = 0  # which token of the sequence the proposal begins with
    length: int = 0  # of the match before it


class PromptLookup:
    """Chains from the sequences' own tokens, as long as they are likely to be right.

    Greedy and sampled answers have rates of their own, and so have those that match a grammar: what a grammar
    repeats (keys, quotes, commas) makes a match longer without making the next word likelier.
    """

    def __init__(self) -> None:
        self._rates = {
            (sampled, formal): MatchRates(sampled=sampled)
            for sampled in (False, True)
            for formal in (False, True)
        }
        self._states: dict[int, _State] = {}

    def rates(self, seq: Sequence) -> MatchRates:
        """How often matches go on in answers of a sequence's kind."""
        sampling = seq.request.sampling
        return self._rates[sampling.temperature > 0, has_grammar(seq)]

    def propose(self, seq: Sequence, most: int) -> Lookup | None:
        """Up to ``most`` tokens after the sequence's last, or None where nothing is found.

        Asked again before the sequence has grown, it gives the first of the same tokens, and whatever is
        taken of them, all are judged.
        """
        if most < 1:
            return None
        state, tokens = self._states.setdefault(seq.request.id, _State()), seq.tokens
        if state.tokens and state.start == len(tokens):
            return Lookup(state.tokens[:most], state.chances[:most])
        rates = self.rates(seq)
        _settle(state, tokens, rates)
        found = state.index.find(tokens)
        if found is None:
            return None
        length = _match_length(tokens, found)
        period, chance = len(tokens) - found, 1.0
        chain, chances = list[int](), list[float]()
        while len(chain) < most:
            chance *= rates(length + len(chain))
            if chance < _LEAST_LIKELY:
                break
            chain.append(tokens[found + len(chain) % period])
            chances.append(chance)
        state.tokens, state.chances, state.start, state.length = chain, chances, len(tokens), length
        return Lookup(chain.copy(), chances.copy()) if chain else None

    def forget(self, seq: Sequence) -> None:
        """Drop what is kept of a sequence."""
        self._states.pop(seq.request.id, None)


def _settle(state: _State, tokens: list[int], rates: MatchRates) -> None:
    """Count how far the last proposal was right."""
    for place, (proposed, token) in enumerate(zip(state.tokens, tokens[state.start :], strict=False)):
        rates.count(state.length + place, proposed == token)
        if proposed != token:
            break
    state.tokens = []


def _match_length(tokens: list[int], found: int) -> int:
    """How many tokens before ``found`` equal those at the end, at most MAX_MATCH."""
    length = 0
    while length < min(found, MAX_MATCH) and tokens[found - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
