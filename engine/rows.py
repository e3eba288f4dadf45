"""The rows of one forward: which nodes they are, where their KV goes, and what each of them reads.

A step has up to two batches, its decodes and its chunks of prompts, each padded to [B, N]. The layers of a
model see neither: the nodes of all batches lie side by side as T *rows*, and everything but attention works
row by row. Attention goes through the *parts* of the plan: neighbouring rows of one shape that read the pool
alike.

Padding is no row where the host knows it without asking a device: on a CPU always, elsewhere in chunks of
prompts. Trees on a device keep theirs, and it is written to the dummy page.

Example: page size 4. Sequence A has pages [3, 4] and kv_len 5, its tree is a root with two children;
sequence B has page [6] and is given the first 2 tokens of its prompt. A's nodes are rows 0, 1 and 2, written
to slots 17, 18 and 19; they read slots 12 to 19, where each sees the first six and itself. B's are rows 3 and
4, written to slots 24 and 25, which they read. The plan writes [17, 18, 19, 24, 25] and has two parts, of one
sequence each, with 3 and 2 rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.core import Batch, DraftTree, Packing, slots_of
from kernels import MOST_OWN, FusedLayer, LayerRows, TreeRows, ancestor_words, layer_rows

Slots = Tensor | slice  # a list of slots, or a run of them


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows that attend together: b sequences of n rows each.

    read: [b, L] slots, or one run per sequence of at most L; bias: [b, n, L] of 0 and -inf, or None where
    every row sees all that its sequence reads. On a device ``tree`` says both instead, where it can: then
    nothing has the size of rows times rows read.
    """

    num_seqs: int
    num_nodes: int
    read: Tensor | tuple[slice, ...]
    bias: Tensor | None
    tree: TreeRows | None = None

    @property
    def num_rows(self) -> int:
        return self.num_seqs * self.num_nodes


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Made once per forward, used by every layer. write: [T] slots, or a run; parts: all T rows, in order."""

    write: Slots
    parts: tuple[Part, ...]
    _for_layers: list[tuple[tuple[Tensor, Tensor] | None, LayerRows | None]] = field(
        default_factory=list, repr=False, compare=False
    )

    def for_layers(
        self, layer: FusedLayer, rotation: tuple[Tensor, Tensor] | None, pool: tuple[Tensor, Tensor]
    ) -> LayerRows | None:
        """The plan as fused layers of one forward take it, or None if they do not take it: see
        ``kernels.layer_rows``. The first layer makes it, the others find it."""
        if any(part.tree is not None for part in self.parts):
            return None
        if not self._for_layers or self._for_layers[0][0] is not rotation:
            self._for_layers[:] = [(rotation, layer_rows(layer, rotation, self.write, self.parts, pool))]
        return self._for_layers[0][1]

    def attend(self, q: Tensor, attention: Callable[[Tensor, Part], Tensor]) -> Tensor:
        """Attention of every part. q: [T, H, D]; attention: ([b, n, H, D], part) -> [b, n, H, V]. Returns
        [T, H * V]."""
        outs, first = [], 0
        for part in self.parts:
            rows = q[first : first + part.num_rows].view(part.num_seqs, part.num_nodes, *q.shape[1:])
            outs.append(attention(rows, part).reshape(part.num_rows, -1))
            first += part.num_rows
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def join_plans(plans: Sequence[RowPlan]) -> RowPlan:
    """One forward for the rows of several, in order."""
    if len(plans) == 1:
        return plans[0]
    return RowPlan(
        _join_slots([plan.write for plan in plans]), tuple(part for plan in plans for part in plan.parts)
    )


def _join_slots(slots: Sequence[Slots]) -> Slots:
    """Slots behind one another: a run if that is what they are."""
    runs = [run for run in slots if isinstance(run, slice)]
    if len(runs) == len(slots) and all(one.stop == other.start for one, other in itertools.pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop)
    device = next((part.device for part in slots if isinstance(part, Tensor)), torch.device("cpu"))
    return torch.cat(
        [
            torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part
            for part in slots
        ]
    )


# --- planned on the host: sequence by sequence, without padding


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence: what they write, what they read (themselves last), and ``own``, the
    [n, n] bias among themselves, None for a single one."""

    num_rows: int
    write: Slots
    read: Slots
    own: Tensor | None


def first_slot(pages: list[int], page_size: int) -> int | None:
    """Where row 0 of a sequence lies if its pages are consecutive, as they usually are, else None."""
    if not pages or pages != list(range(pages[0], pages[0] + len(pages))):
        return None
    return pages[0] * page_size


def span(pages: list[int], page_size: int, first: int, own: Tensor | None, start: int = 0) -> Span:
    """Rows ``first``, ``first + 1``, .. of a sequence, one for each row of ``own``; they read from row
    ``start``."""
    num_rows = 1 if own is None else len(own)
    end = first + num_rows
    assert end <= len(pages) * page_size, f"rows up to {end} on {len(pages)} pages of {page_size}"
    begin = first_slot(pages, page_size)
    if begin is not None:
        return Span(num_rows, slice(begin + first, begin + end), slice(begin + start, begin + end), own)
    slots = (torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)).flatten()
    return Span(num_rows, slots[first:end], slots[start:end], own)


def tree_bias(parents: list[int]) -> Tensor | None:
    """What nodes of a tree see of one another, themselves and their ancestors: [n, n] of 0 and -inf, or None
    for a single node. parents: of every node, -1 for none."""
    if len(parents) == 1:
        return None
    hidden = [[float("-inf")] * len(parents)]  # of "no parent"
    for node, parent in enumerate(parents):
        row = hidden[parent + 1].copy()
        row[node] = 0.0
        hidden.append(row)
    return torch.tensor(hidden[1:])


def chain_bias(num_nodes: int, device: str | torch.device = "cpu") -> Tensor | None:
    """As ``tree_bias`` for a chain."""
    if num_nodes == 1:
        return None
    return torch.full((num_nodes, num_nodes), float("-inf"), device=device).triu_(1)


def plan_spans(spans: Sequence[Span], device: torch.device) -> RowPlan:
    """The plan of spans; neighbours of one size share a part if all their rows lie side by side."""

    def kind(numbered: tuple[int, Span]) -> tuple[int, int]:
        number, one = numbered
        return one.num_rows, -1 if isinstance(one.read, slice) else number

    groups = [[one for _, one in group] for _, group in itertools.groupby(enumerate(spans), kind)]
    write = _join_slots([one.write for one in spans])
    return RowPlan(
        write.to(device) if isinstance(write, Tensor) else write,
        tuple(_part_of(group, device) for group in groups),
    )


def _part_of(spans: Sequence[Span], device: torch.device) -> Part:
    """Spans of one size as a part; more than one only if all of them read runs."""
    num_rows = spans[0].num_rows
    read_lens = [
        one.read.stop - one.read.start if isinstance(one.read, slice) else len(one.read) for one in spans
    ]
    bias = None
    if num_rows > 1:
        bias = torch.zeros(len(spans), num_rows, max(read_lens), device=device)
        for row, (one, read_len) in enumerate(zip(spans, read_lens, strict=True)):
            assert one.own is not None
            bias[row, :, read_len - num_rows : read_len] = one.own
    runs = tuple(one.read for one in spans if isinstance(one.read, slice))
    if len(runs) == len(spans):
        return Part(len(spans), num_rows, runs, bias)
    (listed,) = (one.read for one in spans if isinstance(one.read, Tensor))
    return Part(1, num_rows, listed[None].to(device), bias)


# --- planned in tensors: padded, whatever a device holds


def make_plan(write: Tensor, read: Tensor, read_lens: list[int], visible: Tensor) -> RowPlan:
    """The plan of a forward over B sequences of N rows each, padding among them.

    write: [B, N] slots; read: [B, L] slots, of which the first read_lens[b] concern sequence b; visible: [B,
    N, L] bool. On a CPU, runs of consecutive slots become slices and an all-visible mask is dropped; a device
    is never waited for.
    """
    num_seqs, num_nodes = write.shape
    flat = write.reshape(-1)
    if write.device.type != "cpu":
        return RowPlan(flat, (Part(num_seqs, num_nodes, read, _bias(visible)),))
    slots = read.numpy()
    lens = np.array(read_lens)
    # Pages ascend within a run only, so slots are consecutive exactly if every step between neighbours is
    # one.
    steps_ok = (np.diff(slots, axis=1) == 1) | (np.arange(1, slots.shape[1])[None] >= lens[:, None])
    runs: Tensor | tuple[slice, ...] = read
    if steps_ok.all():
        firsts = slots[:, 0].tolist()
        runs = tuple(slice(first, first + length) for first, length in zip(firsts, read_lens, strict=True))
    inside = torch.arange(read.shape[1])[None] < torch.from_numpy(lens)[:, None]
    needed = visible if isinstance(runs, Tensor) else visible | ~inside[:, None]
    bias = None if bool(needed.all()) else _bias(visible)
    written = flat.numpy()
    first = int(written[0])
    is_run = bool((np.diff(written) == 1).all())
    return RowPlan(
        slice(first, first + len(written)) if is_run else flat, (Part(num_seqs, num_nodes, runs, bias),)
    )


def _bias(visible: Tensor) -> Tensor:
    """[B, N, L] bool -> additive float32 mask."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))


# --- planned on a device: through page tables


def tree_part(rows: TreeRows, num_nodes: int) -> Part:
    """Nodes that see what ``rows`` says."""
    return Part(len(rows.kv_lens), num_nodes, (), None, rows)


def plan_chains(
    page_table: Tensor, page_size: int, firsts: Tensor, counts: Sequence[int], start: int = 0
) -> RowPlan:
    """Rows ``firsts[b]``, ``firsts[b] + 1``, .. of every sequence, ``counts[b]`` of them, one behind the
    other; they read from row ``start``. firsts: [B] int64; neighbours of one size share a part."""
    parts, writes, first = [], [], 0
    for count, group in itertools.groupby(counts):
        seqs = slice(first, first := first + len(list(group)))
        table, begin = page_table[seqs], firsts[seqs].contiguous()
        rows = begin[:, None] + torch.arange(count, device=firsts.device)
        writes.append(slots_of(rows, table, page_size).flatten())
        parts.append(tree_part(TreeRows(table, page_size, begin, None, count, start), count))
    return RowPlan(_join_slots(writes), tuple(parts))


def plan_own(write: Tensor, rows: TreeRows, own: Tensor, longest: int) -> RowPlan:
    """Nodes [B, N] that see the committed rows, and of those behind what ``own`` [B, N, num_own] says.

    write: [B, N] slots; rows: without words, which are made of ``own``; longest: the largest of kv_lens. On a
    CPU, and where there are more own rows than a word has bits, the plan holds slots and a mask.
    """
    if write.device.type != "cpu" and rows.num_own <= MOST_OWN:
        return _own_words(write, rows, own)
    row = torch.arange(rows.start, longest + rows.num_own, device=write.device).expand(len(write), -1)
    offset = row - rows.kv_lens[:, None]
    inside = offset.clamp(0, rows.num_own - 1)[:, None].expand(-1, own.shape[1], -1)
    visible = (offset < 0)[:, None] | (own.gather(2, inside) & (offset < rows.num_own)[:, None])
    read_lens = (rows.kv_lens + rows.num_own - rows.start).tolist()
    return make_plan(write, slots_of(row, rows.page_table, rows.page_size), read_lens, visible)


def _own_words(write: Tensor, rows: TreeRows, own: Tensor) -> RowPlan:
    """As ``plan_own``, with a word for every node."""
    words = (own.long() << torch.arange(rows.num_own, device=own.device)).sum(-1)
    part = tree_part(dataclasses.replace(rows, words=words), write.shape[1])
    return RowPlan(write.flatten(), (part,))


# --- the batches of a step


@dataclass(frozen=True, slots=True)
class BatchRows:
    """One batch, padded to [B, N], as T rows of a forward: its nodes in order, known padding left out."""

    shape: tuple[int, int]  # B, N
    plan: RowPlan
    packing: Packing | None = None  # None where there is no padding

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.plan.parts)

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, ..] -> [T, ..]."""
        flat = x.flatten(0, 1)
        return flat if self.packing is None else flat[self.packing.nodes]

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, ..] -> [B, N, ..]; padding repeats its sequence's last node."""
        return rows.view(*self.shape, *rows.shape[1:]) if self.packing is None else rows[self.packing.places]

    def last(self, rows: Tensor) -> Tensor:
        """[T, ..] -> [B, ..]: the last node of every sequence."""
        return self.unpack(rows)[:, -1] if self.packing is None else rows[self.packing.places[:, -1]]


def batch_rows(batch: Batch, tree: DraftTree) -> BatchRows:
    """Where the nodes of a batch are written, and what each of them reads: the committed rows, itself and its
    ancestors."""
    device = tree.tokens.device
    if device.type != "cpu":
        return _prompt_rows(batch, tree) if batch.prompt is not None else _padded_rows(batch, tree)
    own: list[Tensor | None]
    if batch.prompt is not None:
        counts = list(batch.prompt.lengths)
        own = [chain_bias(count) for count in counts]
    else:
        parents = tree.parents.tolist()
        counts = [len(row) + 1 - row.count(-1) for row in parents]  # the root has no parent either
        own = [tree_bias(row[:count]) for row, count in zip(parents, counts, strict=True)]
    spans = [
        span(seq.pages, batch.page_size, seq.kv_len, among)
        for seq, among in zip(batch.seqs, own, strict=True)
    ]
    return _without_padding(tree, plan_spans(spans, device), counts)


def _without_padding(tree: DraftTree, plan: RowPlan, counts: Sequence[int]) -> BatchRows:
    """Rows of which every sequence has the first ``counts[b]`` nodes alone."""
    num_seqs, width = tree.tokens.shape
    if min(counts) == width:
        return BatchRows((num_seqs, width), plan)
    real = torch.arange(width) < torch.tensor(counts)[:, None]
    nodes = real.flatten().nonzero()[:, 0]
    places = (real.flatten().cumsum(0) - 1).view(num_seqs, width)
    device = tree.tokens.device
    return BatchRows((num_seqs, width), plan, Packing(nodes.to(device), places.to(device)))


def _prompt_rows(batch: Batch, tree: DraftTree) -> BatchRows:
    """Chunks of prompts on a device."""
    assert batch.prompt is not None
    counts = batch.prompt.lengths
    plan = plan_chains(batch.page_table, batch.page_size, batch.kv_lens, counts)
    return _without_padding(tree, plan, counts)


def _padded_rows(batch: Batch, tree: DraftTree) -> BatchRows:
    """All nodes of trees whose padding only the device knows."""
    num_seqs, num_nodes = tree.tokens.shape
    node = torch.arange(num_nodes, device=tree.tokens.device)
    rows = batch.kv_lens[:, None] + node
    write = torch.where(
        tree.real(), batch.slots(rows), node % batch.page_size
    )  # padding goes to the dummy page
    seen = TreeRows(batch.page_table, batch.page_size, batch.kv_lens, None, num_nodes)
    if num_nodes > MOST_OWN:
        longest = max(seq.kv_len for seq in batch.seqs)
        return BatchRows((num_seqs, num_nodes), plan_own(write, seen, tree.ancestors(), longest))
    seen = dataclasses.replace(seen, words=ancestor_words(tree.parents.contiguous()))
    return BatchRows((num_seqs, num_nodes), RowPlan(write.flatten(), (tree_part(seen, num_nodes),)))
