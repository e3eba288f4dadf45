"""The prefix cache: a sequence begins behind the rows that an earlier one with the same tokens left.

A full page is named by the hash of its tokens and of all tokens before them, so that equal names mean equal
rows. The hash is chained,

    key of page i = sha256(key of page i - 1, tokens of page i),    key of page -1 = sha256(cache_salt)

and cryptographic: whoever chooses prompts must not be able to make two of them collide.

Target and draft share the page table, so a page is one thing for both pools. A request that speculates with a
head needs the head's rows too, and those exist only where another one speculated before it; see
``roles.DraftRows``. What is found that way is k pages, m = k * page_size rows. The last of these tokens runs
through the model again: the head's next row needs its feature, and where the whole prompt is cached somebody
has to say what comes next. So the sequence starts with ``kv_len`` m - 1, and row m - 1 is written once more,
not to a page that somebody else reads: such a page is copied first. If nobody else holds it, it is taken out
of the cache instead, until the sequence has filled it (again).

Example: pages of 4, a prompt of 10 tokens of which 8 are cached in pages 5 and 6. The sequence starts with
8 tokens and 7 rows, in pages 5 and 6 if it is alone. Is another one using them, it gets pages 5 and, say, 9,
into which page 6 is copied. Its first step scores tokens 7, 8 and 9 and writes rows 7, 8 and 9.

A CPU reads rows in place if they lie side by side, and gathers them in every layer of every step if they do
not. There all pages found are copied to where the sequence can grow, unless it can grow where they are, or
there is no room: one copy costs less than the gathering of a few steps.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from engine.core import Sequence, Speculation
from engine.pages import PagePool
from engine.roles import DraftRows, Target


def extend_keys(keys: list[bytes], tokens: Items[int], page_size: int, salt: str) -> None:
    """Append the keys of the full pages of a token list that are missing. keys: of its first pages."""
    parent = keys[-1] if keys else hashlib.sha256(salt.encode()).digest()
    for start in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        content = array("q", tokens[start : start + page_size]).tobytes()
        parent = hashlib.sha256(parent + content).digest()
        keys.append(parent)


@dataclass(slots=True)
class _Trail:
    """What the cache knows of a sequence between its arrival and its end."""

    keys: list[bytes]  # of its full pages, also of those that are not computed yet
    num_published: int = 0  # leading pages that are in the cache, or have a twin there
    kept_draft_rows: bool = False  # the page it took over first of all came with the head's rows


class PrefixCache:
    """Finds the pages a sequence can begin with, and publishes those it has filled.

    draft_rows: of a draft with a pool of its own, else None; off: find and publish nothing; side_by_side:
    rather copy pages than leave a sequence's rows scattered.
    """

    def __init__(
        self,
        pages: PagePool,
        target: Target,
        draft_rows: DraftRows | None,
        *,
        off: bool = False,
        side_by_side: bool = False,
    ) -> None:
        self._pages, self._target, self._draft_rows = pages, target, draft_rows
        self._off, self._side_by_side = off, side_by_side
        self._trails: dict[int, _Trail] = {}
        self.num_asked = self.num_found = 0  # tokens of prompts, and those of them that were cached

    def begin(self, seq: Sequence, speculation: Speculation, max_rows: int) -> list[int] | None:
        """Pages for a waiting sequence to begin with, which hold the rows of its first known tokens.

        max_rows: rows that its first step computes at most. None if there is no room for that step, in which
        case nothing has changed.
        """
        found = self._find(seq, speculation)
        for page in found:
            self._pages.hold(page)
        start = max(len(found) * self._pages.page_size - 1, 0)
        num_rows = start + min(len(seq.tokens) + len(seq.forced) - start, max_rows)
        num_next = self._pages.pages_for(num_rows) - len(found)
        room = self._pages.num_available - num_next
        num_moved = self._num_moved(found, num_next, room)
        if num_moved > room:
            self._pages.shrink(found, 0)
            return None
        if found:
            trail = self._trails[seq.request.id]
            trail.num_published = len(found) - 1  # the last one it may write, so it has yet to publish it
            trail.kept_draft_rows = self._pages.has_draft_rows(found[-1])
            old = self._pages.own_last(found, num_moved, num_next)
            if old:
                self._copy(old, found[-num_moved:])
        return found

    def resume(self, seq: Sequence, speculation: Speculation) -> None:
        """A sequence has begun with the pages found, and its tokens match them."""
        if seq.pages and self._draft_rows is not None and self._needs_draft_rows(seq, speculation):
            self._draft_rows.resume(seq)
        if not self._off and seq.num_cached is None:  # after a preemption a sequence finds its own
            self.num_asked += len(seq.request.prompt)
            self.num_found += seq.kv_len

    def _find(self, seq: Sequence, speculation: Speculation) -> list[int]:
        if self._off:
            return []
        trail = self._trails.get(seq.request.id)
        if trail is None:
            trail = self._trails[seq.request.id] = _Trail([])
            known = seq.tokens + seq.forced
            extend_keys(trail.keys, known, self._pages.page_size, seq.request.cache_salt)
        needs_draft_rows = self._needs_draft_rows(seq, speculation)
        found = []
        for key in trail.keys:
            page = self._pages.find(key, needs_draft_rows)
            if page is None:
                break
            found.append(page)
        return found

    def _num_moved(self, found: list[int], num_next: int, room: int) -> int:
        """How many of the pages found, the last ones, to copy to pages of the sequence's own.

        All, where rows are to lie side by side, do not, and there is room; else the last if it is shared.
        num_next, room: pages that the first step adds, and those that are available besides.
        """
        if not found:
            return 0
        grows = self._pages.can_grow_in_place(found, max(num_next, 1))
        if self._side_by_side and not grows and len(found) <= room:
            return len(found)
        return int(self._pages.is_shared(found[-1]))

    def publish(self, seq: Sequence) -> None:
        """Put a sequence's full pages into the cache. Those of a sequence that speculates wait until the head
        has their rows as well, which is a step later."""
        num_rows = None if self._draft_rows is None else self._draft_rows.num_rows(seq)
        if num_rows is None:
            self._publish(seq, seq.kv_len, has_draft_rows=False)
        else:
            self._publish(seq, min(seq.kv_len, num_rows), has_draft_rows=True)

    def disown(self, seq: Sequence) -> None:
        """A sequence's rows are not what they should be: nobody else may begin with them."""
        for page in seq.pages:
            self._pages.unpublish(page)

    def leave(self, seq: Sequence) -> None:
        """A sequence ends or starts over; what it has published stays."""
        self._trails.pop(seq.request.id, None)

    def _publish(self, seq: Sequence, num_rows: int, *, has_draft_rows: bool) -> None:
        trail = self._trails.get(seq.request.id)
        num_full = num_rows // self._pages.page_size
        if trail is None or num_full <= trail.num_published:
            return
        extend_keys(trail.keys, seq.tokens, self._pages.page_size, seq.request.cache_salt)
        for number in range(trail.num_published, num_full):
            self._pages.publish(
                seq.pages[number], trail.keys[number], has_draft_rows or trail.kept_draft_rows
            )
            trail.kept_draft_rows = False
        trail.num_published = num_full

    def _needs_draft_rows(self, seq: Sequence, speculation: Speculation) -> bool:
        return self._draft_rows is not None and self._draft_rows.are_needed(seq, speculation)

    def _copy(self, sources: list[int], destinations: list[int]) -> None:
        """Copy the rows of pages, in both pools."""
        row = torch.arange(self._pages.page_size)
        pages = torch.tensor([sources, destinations])
        slots = (pages[..., None] * self._pages.page_size + row).flatten(1).to(self._target.embedding.device)
        self._target.copy_rows(slots[0], slots[1])
        if self._draft_rows is not None:
            self._draft_rows.copy_rows(slots[0], slots[1])
