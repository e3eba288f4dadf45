"""The exactness canary: now and then a step is decoded once more, plainly, and its tokens are compared.

Speculation promises the tokens of plain decoding. Here a step is held to that while the engine serves: the
target scores what the step emitted one node at a time, in a batch of one sequence, and where the sampler
chooses another token than the one that went out there is a *divergence*. It is a *tie* if rounding explains
it, otherwise a *bug*; see ``is_tie``.

Nothing is disturbed. The rows are written to free pages, which are given back at once, no draft is asked and
no sequence is touched, so tokens, committed rows and the pages of everybody are those of an engine without a
canary. Where free pages are missing the step is let go: cached pages are worth more.

What earlier steps left in the cache is under suspicion too, for a row that was not moved misleads the steps
behind it, and would mislead the canary alike. So the last rows before the step are written anew first, as a
chunk of a prompt would be, from the beginning of a page on. Example: pages of 16, a step with its root at
row 100 emitted 3 tokens. Rows 0 to 63 are read where they are; rows 64 to 99 go to free pages in one forward,
the root and the first two of the tokens, rows 100 to 102, in three of one node each.

The step that ends a request is not looked at: its pages are given back before its tokens are known here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.core import (
    SPECULATION_OFF,
    Batch,
    Delta,
    DraftTree,
    PromptChunk,
    SamplingTensors,
    Scores,
    Sequence,
)
from engine.pages import PagePool
from engine.roles import Target
from engine.sampler import Sampler, perturb, sampling_tensors
from kernels import gumbel_noise

log = logging.getLogger(__name__)

_REWRITTEN = 32  # rows before a step that are written anew, at least; no step commits more than 17
_NOISE = 4  # eps of the largest logit: see logit_noise
_NO_TOKEN = -1  # under whose noise the dice are thrown: no choice has to do with it


@dataclass(slots=True)
class CanaryCounts:
    """What the canary saw since the start."""

    num_steps: int = 0  # re-scored
    num_skipped: int = 0  # drawn, but there were no free pages
    num_ties: int = 0
    num_bugs: int = 0


@dataclass(frozen=True, slots=True)
class Divergence:
    """A token that plain decoding does not choose."""

    position: int  # of the token in prompt and answer, from 0
    emitted: int
    rescored: int  # what is chosen instead
    gap: float  # by which it leads, in processed and perturbed scores; infinite if a filter removed the other
    is_tie: bool


def draw(rate: float, request_ids: list[int], positions: list[int]) -> list[bool]:
    """Which steps to re-score: a share ``rate`` (0 excluded) of all, decided by request and position alone,
    so that runs repeat."""
    seeds, places = torch.tensor([request_ids, positions], dtype=torch.int64)
    noise = gumbel_noise(seeds, places[:, None], torch.tensor([_NO_TOKEN]))[:, 0, 0]
    drawn: list[bool] = (torch.exp(-noise) > -math.log(rate)).tolist()  # exp(-Gumbel) is -log(uniform)
    return drawn


def logit_noise(logits: Tensor, dtype: torch.dtype) -> float:
    """How far a logit may move when its node is scored in a batch of another shape. logits: [.., V].

    Another shape sums in another order, so results are rounded otherwise, each by up to eps / 2 of its size.
    The residual stream is rounded twice in a layer, and roundings add up as a random walk does: the 64 of 32
    layers to sqrt(64) * eps / 2 = 4 eps of a logit's size, for which the largest of them stands. For
    comparison, the logits of SmolLM2-135M (30 layers) in bfloat16 are 0.6 eps from those in float32 with the
    same weights, root mean square, and 3.4 eps at worst.

    What is discrete inside a model can amplify rounding beyond this: where two experts are almost equally
    good, it decides which of them is asked.
    """
    return _NOISE * torch.finfo(dtype).eps * float(logits.abs().max())


def is_tie(scores: Scores, sampling: SamplingTensors, token: int, noise: float) -> bool:
    """Whether a token would have been chosen had every logit been wrong by at most ``noise``, in its favour.

    scores: of a single node. Without filters it is enough that the token trails by at most twice the noise.
    With them, rounding also decides who is left: the token may just have been removed, so it alone is raised
    and all others are lowered; or those before it may just have been kept, so only they are lowered.
    """
    if not math.isfinite(noise):
        return False  # rounding makes no NaN
    logits, positions = scores.logits, scores.positions + 1
    token_ids = torch.arange(logits.shape[-1], device=logits.device)
    unfiltered = perturb(logits, positions, token_ids, dataclasses.replace(sampling, any_filter=False))
    alone = token_ids == token
    for favoured in (alone, alone | (unfiltered < unfiltered[..., token, None])):
        moved = logits + torch.where(favoured, noise, -noise)
        if int(perturb(moved, positions, token_ids, sampling).argmax()) == token:
            return True
    return False


def compare(
    scores: Scores, sampling: SamplingTensors, emitted: int, rescored: int, dtype: torch.dtype
) -> Divergence:
    """What to say of two different choices after one node. scores: of that node, on the one-token path."""
    token_ids = torch.arange(scores.logits.shape[-1], device=scores.logits.device)
    perturbed = perturb(scores.logits, scores.positions + 1, token_ids, sampling)[0, 0]
    return Divergence(
        int(scores.positions) + 1,
        emitted,
        rescored,
        float(perturbed[rescored] - perturbed[emitted]),
        is_tie(scores, sampling, emitted, logit_noise(scores.logits, dtype)),
    )


class Canary:
    """Re-scores steps after they are committed; ``counts`` says with what result."""

    def __init__(self, config: EngineConfig, target: Target, sampler: Sampler, pages: PagePool) -> None:
        self._config, self._target, self._sampler, self._pages = config, target, sampler, pages
        self.counts = CanaryCounts()

    def check(self, running: Items[Sequence], deltas: Items[Delta]) -> None:
        """Re-score some of the decodes that a step's deltas tell of. running: the sequences that go on."""
        num_emitted = {
            delta.request_id: len(delta.token_ids) - delta.num_forced for delta in deltas if delta.is_decode
        }
        seqs = [seq for seq in running if seq.request.id in num_emitted]
        drawn = draw(self._config.canary, [seq.request.id for seq in seqs], [len(seq.tokens) for seq in seqs])
        for seq, is_drawn in zip(seqs, drawn, strict=True):
            if is_drawn:
                self._check(seq, num_emitted[seq.request.id])

    def _check(self, seq: Sequence, num_emitted: int) -> None:
        divergences = self._rescore(seq, num_emitted)
        if divergences is None:
            self.counts.num_skipped += 1
            return
        self.counts.num_steps += 1
        for found in divergences:
            self.counts.num_ties += found.is_tie
            self.counts.num_bugs += not found.is_tie
            log.log(
                logging.INFO if found.is_tie else logging.ERROR,
                "canary: %s in request %d at position %d: token %d was emitted, decoded plainly it is %d, "
                "ahead by %.3g",
                "a tie" if found.is_tie else "a BUG",
                seq.request.id,
                found.position,
                found.emitted,
                found.rescored,
                found.gap,
            )

    def _rescore(self, seq: Sequence, num_emitted: int) -> list[Divergence] | None:
        """Decode a sequence's last tokens plainly; None, and nothing done, if free pages are missing."""
        page_size = self._pages.page_size
        root = seq.kv_len - num_emitted
        first = max(root - _REWRITTEN, 0) // page_size * page_size
        if self._pages.pages_for(seq.kv_len - first) > self._pages.num_free:
            return None
        # Under a name of its own, for what edits keep of the sequence is ahead of it.
        request = dataclasses.replace(seq.request, id=-1 - seq.request.id)
        shadow = Sequence(
            request, seq.tokens[: first + 1], seq.tokens[first + 1 :], seq.pages[: first // page_size]
        )
        self._pages.extend(shadow.pages, seq.kv_len)
        while shadow.kv_len < root:
            self._rewrite(shadow, min(root - shadow.kv_len, self._config.max_num_batched_tokens))
        divergences = []
        while shadow.forced:
            divergences += self._decode(shadow)
            _advance(shadow, 1)
        self._pages.shrink(shadow.pages, first)
        self._sampler.forget(shadow)
        return divergences

    def _rewrite(self, seq: Sequence, num_nodes: int) -> None:
        """Write the rows of known tokens, as a chunk of a prompt."""
        tokens = self._tensor([(seq.tokens[-1:] + seq.forced)[:num_nodes]])
        known = seq.forced[num_nodes - 1]
        chunk = PromptChunk(tokens, self._tensor([num_nodes]), self._tensor([known]), (num_nodes,))
        self._score(self._batch(seq, chunk), tokens)
        _advance(seq, num_nodes)

    def _decode(self, seq: Sequence) -> list[Divergence]:
        """Score the root alone; what is chosen after it is compared with the known next token."""
        batch = self._batch(seq, None)
        raw, tree = self._score(batch, self._tensor([seq.tokens[-1:]]))
        scores = self._sampler.edited(raw, batch, tree)
        choice, emitted = int(self._sampler.choose(scores, batch)), seq.forced[0]
        if choice == emitted:
            return []
        return [compare(scores, batch.sampling, emitted, choice, self._config.dtype)]

    def _score(self, batch: Batch, tokens: Tensor) -> tuple[Scores, DraftTree]:
        """Score a chain. tokens: [1, n]."""
        tree = DraftTree(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None] - 1)
        (scores,) = self._target.score([batch], [tree])
        return scores, tree

    def _batch(self, seq: Sequence, chunk: PromptChunk | None) -> Batch:
        return Batch(
            seqs=(seq,),
            kv_lens=self._tensor([seq.kv_len]),
            page_table=self._tensor([seq.pages]),
            page_size=self._pages.page_size,
            sampling=sampling_tensors([seq.request.sampling], self._config.device),
            speculation=(SPECULATION_OFF,),
            prompt=chunk,
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._config.device)


def _advance(seq: Sequence, num_tokens: int) -> None:
    """Take known tokens as committed."""
    seq.tokens += seq.forced[:num_tokens]
    del seq.forced[:num_tokens]
