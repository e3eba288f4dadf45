"""Growing trees from the features that a head has after their roots, level by level.

All that a head does for a tree is to say which tokens may follow a node (``Offers``) and to run the nodes
that are chosen, whose rows are scratch. How the best of them become a tree is ``draft.tree`` and
``draft.solo``; which rows a level writes and reads is settled here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from draft.calibration import Calibration
from draft.masking import FrontierMask
from draft.solo import Children, SoloRows, grow_one
from draft.tree import IsWorth, Limits, Offers, grow
from engine.core import Batch, DraftTree, SamplingTensors, Speculation, slots_of
from engine.kvcache import KVPool, LatentPool
from engine.rows import RowPlan, plan_own
from engine.sampler import candidates
from kernels import TreeRows, gumbel_noise

_NUM_CANDIDATES = 128  # tokens among which noise picks the children of a node


class HeadModel(Protocol):
    """The network of a head; shapes as in core."""

    feature_layers: tuple[int, ...]
    token_ids: Tensor  # [Vd] int64: which token each column of the logits stands for

    @property
    def pool(self) -> KVPool | LatentPool:
        """The head's rows; its slots are the target's."""
        ...

    def extend(self, tokens: Tensor, features: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        """tokens, positions: [T]; features: [T, F] of the target. Writes KV rows, returns [T, H]: the next
        feature."""
        ...

    def forward(self, tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        """As ``extend``, behind features of the head's own: [T, H]."""
        ...

    def logits(self, feature: Tensor) -> Tensor:
        """[.., H] as returned by forward -> [.., Vd] float32."""
        ...

    def offers(self, feature: Tensor, count: int) -> Offers:
        """The children with the largest logits: feature as for ``logits`` -> ``Offers.best`` of those."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Some sequences of a batch, seen by the head."""

    kv_lens: Tensor  # [b]
    page_table: Tensor  # [b, P]
    page_size: int
    sampling: SamplingTensors

    @classmethod
    def of(cls, batch: Batch, places: list[int]) -> Rows:
        """The sequences at some places of a batch."""
        if places == list(range(len(batch.kv_lens))):
            return cls(batch.kv_lens, batch.page_table, batch.page_size, batch.sampling)
        index = torch.tensor(places, dtype=torch.int64).to(batch.kv_lens.device)
        return cls(
            batch.kv_lens[index], batch.page_table[index], batch.page_size, batch.sampling.select(index)
        )

    def slots(self, rows: Tensor) -> Tensor:
        """[b, n] row numbers -> [b, n] slots."""
        return slots_of(rows, self.page_table, self.page_size)


@dataclass(slots=True)
class _ScratchRows:
    """Where the rows of growing trees lie: as ``SoloRows``, for several sequences, in tensors.

    Scratch row s of a sequence with k children a level holds node s % k of level s // k.
    """

    rows: Rows
    limits: Limits
    longest: int  # rows before the scratch rows of the longest sequence, row 0 included
    _seen: Tensor | None = None  # [b, F, nodes expanded so far] bool: the last level's ancestors and selves

    def expand(self, parents: Tensor, depth: int) -> tuple[RowPlan, Tensor]:
        """The plan for a level of scratch rows, and their positions [b, F]. parents: [b, F], in the level
        before."""
        rows, limits, kv_lens, device = self.rows, self.limits, self.rows.kv_lens[:, None], parents.device
        width, level = parents.shape[1], depth - 1
        own = torch.eye(width, dtype=torch.bool, device=device).expand(len(parents), -1, -1)
        inherited = own[..., :0]
        if self._seen is not None:
            inherited = self._seen.gather(1, parents[..., None].expand(-1, -1, level * width))
        self._seen = torch.cat((inherited, own), dim=-1)
        # A sequence keeps as many rows a level as it has children: it has reserved no more. What others of
        # the batch need beyond that is written to the dummy page, and is no candidate of this one.
        num_scratch = (limits.depth - 1).clamp(max=depth) * limits.top_k
        scratch = torch.arange(depth * width, device=device)[None]
        column = (scratch // limits.top_k * width + scratch % limits.top_k).clamp(max=depth * width - 1)
        own_path = self._seen.gather(2, column[:, None].expand(-1, width, -1))
        place = torch.arange(width, device=device)
        kept = (place < limits.top_k) & (limits.depth > depth)
        # Whatever is not kept sees something too, the first scratch row: of nothing it would make NaN, and
        # leave that on the dummy page, where there are rows that others see not, but read.
        seen = own_path & (scratch < num_scratch)[:, None] | (~kept[..., None] & (scratch == 0))
        plan = plan_own(
            torch.where(kept, rows.slots(kv_lens + 1 + level * limits.top_k + place), place % rows.page_size),
            TreeRows(rows.page_table, rows.page_size, rows.kv_lens + 1, None, depth * width, start=1),
            seen,
            self.longest,
        )
        # The others' depths may lie past the end of this one's context, where there are no positions.
        return plan, torch.where(kept, kv_lens + depth - 1, 0)


@dataclass(frozen=True, slots=True)
class Growth:
    """What the trees of one step grow by.

    shared_noise: rank candidates with the sampler's own noise; masked: what grammars allow, at the roots;
    is_worth: asked before every level, None to grow as far as the limits go.
    """

    model: HeadModel
    calibration: Calibration
    shared_noise: bool
    masked: FrontierMask
    is_worth: IsWorth | None

    def together(self, batch: Batch, active: list[int], roots: Tensor, features: Tensor) -> DraftTree:
        """Trees of some sequences of a batch: active: their places; roots: [B, 1], of all; features:
        [b, 1, H], after the roots of those. Returns [b, N]."""
        limits = Limits.of([self.bounded(batch.speculation[row]) for row in active], str(roots.device))
        longest = max(batch.seqs[row].kv_len for row in active) + 1
        return self.in_tensors(Rows.of(batch, active), roots[active, 0], limits, longest, features)

    def in_tensors(
        self, rows: Rows, roots: Tensor, limits: Limits, longest: int, features: Tensor
    ) -> DraftTree:
        """Trees of all of ``rows``: roots: [b]; longest: as for ``_ScratchRows``; features as for
        ``together``."""
        scratch, frontier = _ScratchRows(rows, limits, longest), features
        sampled = rows.sampling.temperature > 0

        def expand(tokens: Tensor, parents: Tensor, depth: int) -> Offers:
            nonlocal frontier
            given = frontier.gather(1, parents[..., None].expand(-1, -1, frontier.shape[-1]))
            plan, positions = scratch.expand(parents, depth)
            out = self.model.forward(tokens.flatten(), given.flatten(0, 1), positions.flatten(), plan)
            frontier = out.view(*tokens.shape, -1)
            self.masked.descend(tokens, parents)
            return self._offers(frontier, rows, depth, limits.max_top_k)

        first = self._offers(frontier, rows, 0, limits.max_top_k)
        return grow(
            roots,
            first,
            limits,
            expand,
            lambda raw, depth: self.calibration(raw, depth, sampled),
            self.is_worth,
        )

    def alone(self, batch: Batch, row: int, start: int, features: Tensor) -> DraftTree:
        """The tree of one sequence of a batch on a CPU, the one at ``row``, whose own row 0 lies at slot
        ``start``; features as for ``together``."""
        seq, spec, rows = batch.seqs[row], self.bounded(batch.speculation[row]), Rows.of(batch, [row])
        places, frontier = SoloRows(start, seq.kv_len), features
        sampled = seq.request.sampling.temperature > 0

        def children(depth: int) -> list[Children]:
            offers = self._offers(frontier, rows, depth, spec.top_k)
            both = zip(*offers.tokens.tolist(), *offers.raw.tolist(), strict=True)
            return [list(zip(tokens, raw, strict=True)) for tokens, raw in both]

        def expand(tokens: list[int], parents: list[int], depth: int) -> list[Children]:
            nonlocal frontier
            frontier = self.model.forward(
                torch.tensor(tokens),
                frontier[0] if parents == list(range(frontier.shape[1])) else frontier[0, parents],
                torch.full((len(tokens),), seq.kv_len + depth - 1),
                places.expand(parents),
            )[None]
            if self.masked.applies:
                self.masked.descend(torch.tensor([tokens]), torch.tensor([parents]))
            return children(depth)

        return grow_one(
            seq.tokens[-1],
            children(0)[0],
            spec,
            expand,
            lambda raw, depth, rank: self.calibration.one(raw, depth, rank, sampled),
            self.is_worth,
        )

    def bounded(self, spec: Speculation) -> Speculation:
        """A node cannot have more children than the head has tokens."""
        return replace(spec, top_k=min(spec.top_k, len(self.model.token_ids)))

    def _offers(self, feature: Tensor, rows: Rows, depth: int, top_k: int) -> Offers:
        """The best children of nodes at one depth: feature [b, F, H] -> offers [b, F, k]."""
        sampling = rows.sampling
        is_noisy = self.shared_noise and not sampling.all_greedy
        if not is_noisy and not self.masked.applies:
            return self.model.offers(feature, top_k)
        logits = self.masked(self.model.logits(feature))
        if not is_noisy:
            return Offers.best(logits, self.model.token_ids, top_k)
        few = candidates(logits, sampling, max(_NUM_CANDIDATES, top_k))
        tokens = self.model.token_ids[few.columns]
        positions = (rows.kv_lens + depth + 1)[:, None].expand(logits.shape[:2])
        greedy = (sampling.temperature == 0)[:, None, None]
        noise = gumbel_noise(sampling.seed, positions, tokens).masked_fill(greedy, 0.0)
        scores = few.scaled + noise
        chosen = scores.topk(top_k, dim=-1)
        # Greedy scores are shares of the whole vocabulary, sampled ones of the candidates: noise drowns the
        # rest.
        mass = torch.where(greedy[..., 0], logits.logsumexp(dim=-1), scores.logsumexp(dim=-1))
        raw = torch.exp(chosen.values - mass[..., None])
        return Offers(tokens.gather(-1, chosen.indices), raw.nan_to_num(0.0))
