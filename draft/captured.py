"""A head's whole proposal as one graph (``engine.graphs``): take in what is pending, grow the trees, add what
lookups have found.

The work is that of ``draft.head``, done for a fixed batch with all its padding. Every sequence has as many
pairs as the one with the most: those it has not are written to the dummy page. A sequence that does not draft
has none at all, and a tree of its root. Once a step the host sends what is new to it, in one copy: the
tokens of the pairs, sizes of trees, chains; the features of the pairs come from where the step before left
them.

Sizes are in the key of the graph: a tree that is deeper takes another one.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from draft.growth import Growth, Rows
from draft.ngram import Lookup
from draft.tree import Limits, graft
from engine.core import Batch, DraftTree, Speculation
from engine.graphs import NODE_BUCKETS, Graphs, Mailbox, bucket
from engine.rows import RowPlan, tree_part
from kernels import MOST_OWN, TreeRows

_PAIR_BUCKETS = (4, 16)
_CHAIN_BUCKETS = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some pairs of one sequence: see ``draft.pending``."""

    tokens: list[int]
    features: Tensor  # [n, F]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is made for: sequences, pairs of each, tokens of a chain; nodes of the head's tree, its
    levels and the children of its nodes; and nodes of tree and chain together, as the target will score them.
    """

    num_seqs: int
    num_pairs: int
    num_chain: int
    num_drafted: int
    depth: int
    top_k: int
    num_nodes: int

    @classmethod
    def of(cls, num_seqs: int, num_pairs: int, num_chain: int, sizes: Items[Speculation]) -> Shape | None:
        """The least that holds a step's proposal, None where none does."""
        pairs = bucket(num_pairs, _PAIR_BUCKETS)
        chain = bucket(num_chain, _CHAIN_BUCKETS) if num_chain else 0
        if pairs is None or chain is None:
            return None
        most = max(size.nodes for size in sizes)
        drafted, nodes = bucket(most, NODE_BUCKETS), bucket(most + num_chain, NODE_BUCKETS)
        depth, top_k = max(size.depth for size in sizes), max(size.top_k for size in sizes)
        if drafted is None or nodes is None or (depth - 1) * top_k > MOST_OWN:
            return None
        return cls(num_seqs, pairs, chain, drafted, depth, top_k, nodes)


class CapturedProposals:
    """Proposes for fixed batches. growth: without masks, and growing as far as limits go."""

    def __init__(self, growth: Growth, graphs: Graphs, device: str) -> None:
        self._growth, self._graphs, self._device = growth, graphs, device
        self._mailboxes: dict[tuple[int, ...], Mailbox] = {}
        self._features: dict[tuple[int, int], Tensor] = {}  # [B, M, F]

    def __call__(
        self,
        batch: Batch,
        shape: Shape,
        sizes: Items[Speculation],
        pairs: Items[Pairs | None],
        chains: Items[Lookup | None],
    ) -> DraftTree:
        """Trees [B, shape.num_nodes]. sizes, pairs, chains: of each sequence; pairs up to its root's, or None
        if the head drafts nothing for it."""
        box = self._filled(shape, sizes, pairs, chains)
        features = self._gathered(shape, pairs)
        self._growth.calibration.send()
        key = ("propose", shape, batch.sampling.facts)
        return self._graphs(key, lambda: self._propose(batch, shape, box.device, features))

    def _filled(
        self,
        shape: Shape,
        sizes: Items[Speculation],
        pairs: Items[Pairs | None],
        chains: Items[Lookup | None],
    ) -> Mailbox:
        """What the host knows, on its way to the device."""
        num_seqs, num_pairs, num_chain = place = shape.num_seqs, shape.num_pairs, shape.num_chain
        box = self._mailboxes.get(place)
        if box is None:
            fields = dict.fromkeys(("nodes", "depth", "top_k", "counts"), ((num_seqs, 1), torch.int64))
            fields |= {"tokens": ((num_seqs, num_pairs), torch.int64)}
            fields |= {"chain": ((num_seqs, num_chain), torch.int64)}
            fields |= {"chances": ((num_seqs, num_chain), torch.float32)}
            box = self._mailboxes[place] = Mailbox(fields, self._device)
        host = box.host
        host["nodes"].fill_(1), host["depth"].fill_(0), host["top_k"].fill_(1), host["counts"].fill_(0)
        host["chain"].fill_(-1), host["chances"].fill_(0.0)
        for row, (size, own, chain) in enumerate(zip(sizes, pairs, chains, strict=True)):
            if own is not None:
                host["nodes"][row], host["depth"][row], host["top_k"][row] = (
                    size.nodes,
                    size.depth,
                    size.top_k,
                )
                host["counts"][row] = len(own.tokens)
                host["tokens"][row, : len(own.tokens)] = torch.tensor(own.tokens)
            if chain is not None:
                host["chain"][row, : len(chain.tokens)] = torch.tensor(chain.tokens)
                host["chances"][row, : len(chain.chances)] = torch.tensor(chain.chances)
        box.send()
        return box

    def _gathered(self, shape: Shape, pairs: Items[Pairs | None]) -> Tensor:
        """The features of all pairs, [B, M, F], where the graph expects them."""
        place = shape.num_seqs, shape.num_pairs
        given = [own.features for own in pairs if own is not None]
        if place not in self._features:
            self._features[place] = given[0].new_zeros(*place, given[0].shape[-1])
        gathered = self._features[place]
        for row, own in enumerate(pairs):
            if own is not None:
                gathered[row, : len(own.tokens)] = own.features
        return gathered

    def _propose(self, batch: Batch, shape: Shape, sent: dict[str, Tensor], features: Tensor) -> DraftTree:
        """What is captured."""
        rows = Rows(batch.kv_lens, batch.page_table, batch.page_size, batch.sampling)
        assert batch.roots is not None
        limits = Limits(
            sent["nodes"], sent["depth"], sent["top_k"], shape.num_drafted, shape.depth, shape.top_k
        )
        after_roots = self._extended(rows, sent["tokens"], sent["counts"], features)
        tree = self._growth.in_tensors(rows, batch.roots, limits, 0, after_roots)
        if shape.num_chain:
            tree = graft(tree, sent["chain"], sent["chances"])
        return tree.resized(shape.num_nodes)  # no sequence has more, and padding comes last

    def _extended(self, rows: Rows, tokens: Tensor, counts: Tensor, features: Tensor) -> Tensor:
        """Run the pairs, tokens [B, M] and features [B, M, F], of which the first ``counts`` [B, 1] are real:
        the feature after each root, [B, 1, H]. Row kv_len is the root's."""
        model, num_pairs = self._growth.model, tokens.shape[1]
        place = torch.arange(num_pairs, device=tokens.device)
        first, real = rows.kv_lens[:, None] + 1 - counts, place < counts
        write = torch.where(real, rows.slots(first + place), place % rows.page_size)
        chain = TreeRows(rows.page_table, rows.page_size, first[:, 0].contiguous(), None, num_pairs, start=1)
        out = model.extend(
            tokens.flatten(),
            features.flatten(0, 1),
            torch.where(real, first - 1 + place, 0).flatten(),
            RowPlan(write.flatten(), (tree_part(chain, num_pairs),)),
        )
        last = (counts - 1).clamp(min=0)[..., None].expand(-1, -1, out.shape[-1])
        return out.view(*tokens.shape, -1).gather(1, last)
