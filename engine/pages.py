"""Pages: the unit in which KV rows are handed out. Page 0 is the dummy that padding rows are written to.

A page is *free*, *held* by one or more sequences, or *cached*: held by nobody, but with rows that a later
sequence may begin with. Cached pages are found by a key that names their content (``engine.prefix`` makes
it) and are given up, the least recently used first, when free ones run out. A page keeps its key while it is
held, so that sequences share it while they run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK = 16  # cached pages are given up in blocks of a sixteenth of all, so that the free ones form runs


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is known of a page that can be found."""

    key: bytes
    has_draft_rows: bool  # the draft's pool holds this page's rows too


class PagePool:
    """Pages of one page table, shared by the target's and the head's pools.

    Any page serves any sequence, but consecutive pages let a CPU read a sequence's rows in place instead of
    gathering them. So a sequence grows into the page behind its last one if that is free, and a new one
    starts in the middle of the largest free run (the very first at the beginning), which leaves both
    neighbours room to grow.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 2, "one dummy page and one real page at least"
        self.num_pages, self.page_size = num_pages, page_size
        self._is_free = np.ones(num_pages + 1, dtype=bool)
        self._is_free[0] = self._is_free[num_pages] = (
            False  # the dummy page, and a guard behind the last page
        )
        self._num_free = num_pages - 1
        self._num_holders = [0] * num_pages
        self._entries: dict[int, _Entry] = {}  # of pages that can be found, held or not
        self._page_of: dict[bytes, int] = {}
        self._cached: dict[int, None] = {}  # the pages nobody holds, least recently used first

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and that would be found."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that ``extend`` can hand out now."""
        return self._num_free + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_usable - self.num_available

    def pages_for(self, num_rows: int) -> int:
        """Pages that hold num_rows rows."""
        return -(-num_rows // self.page_size)

    # --- holding

    def extend(self, pages: list[int], num_rows: int, num_next: int = 0) -> bool:
        """Grow a sequence's pages until they hold num_rows rows. False, and nothing taken, if too few are
        free or cached. num_next: pages that it will want next, which should find room behind these."""
        missing = self.pages_for(num_rows) - len(pages)
        if missing > self.num_available:
            return False
        if missing > self._num_free:
            self._give_up(max(missing, self.num_usable // _BLOCK) - self._num_free)
        for count in range(missing, 0, -1):
            behind = pages[-1] + 1 if pages else 0  # page 0 is never free
            page = behind if self._is_free[behind] else self._start_of_run(count + num_next)
            self._is_free[page] = False
            self._num_free -= 1
            self._num_holders[page] = 1
            pages.append(page)
        return True

    def shrink(self, pages: list[int], num_rows: int) -> None:
        """Give back the pages past those that hold num_rows rows, last ones first: of one sequence's cached
        pages, later ones count as less recently used."""
        while len(pages) > self.pages_for(num_rows):
            page = pages.pop()
            assert self._num_holders[page] > 0, f"page {page} freed twice"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                if page in self._entries:
                    self._cached[page] = None
                else:
                    self._free(page)

    def hold(self, page: int) -> None:
        """Hold a page that was found, beside whoever holds it already."""
        assert page in self._entries, f"page {page} was given up"
        self._num_holders[page] += 1
        self._cached.pop(page, None)

    def is_shared(self, page: int) -> bool:
        """Whether several sequences hold a page."""
        return self._num_holders[page] > 1

    def can_grow_in_place(self, pages: list[int], count: int) -> bool:
        """Whether a sequence's pages lie side by side, with so many free ones behind them."""
        behind = self._is_free[pages[-1] + 1 : pages[-1] + 1 + count]
        return pages == list(range(pages[0], pages[-1] + 1)) and len(behind) == count and bool(behind.all())

    def own_last(self, pages: list[int], num_moved: int, num_next: int) -> list[int]:
        """Give a sequence other pages in place of its last ``num_moved``, and make it the only one that knows
        its very last page, which it is about to write.

        Returns the old pages, to be copied from before anything is handed out again. Those that nobody else
        holds are free then, for the new ones are found in their place. The new pages must be available;
        num_next: as in ``extend``.
        """
        old = pages[len(pages) - num_moved :]
        del pages[len(pages) - num_moved :]
        enough = self.extend(pages, (len(pages) + num_moved) * self.page_size, num_next)
        assert enough, "pages to move to were counted before"
        for page, new in zip(old, pages[len(pages) - num_moved :], strict=True):
            if not self.is_shared(page):
                entry = self._entries[new] = self._entries.pop(page)
                self._page_of[entry.key] = new
        self.shrink(old.copy(), 0)
        if pages[-1] in self._entries:
            self._forget(pages[-1])
        return old

    # --- finding

    def find(self, key: bytes, needs_draft_rows: bool) -> int | None:
        """The page with such a key, if there is one and it has the rows that are needed."""
        page = self._page_of.get(key)
        if page is None or (needs_draft_rows and not self._entries[page].has_draft_rows):
            return None
        return page

    def has_draft_rows(self, page: int) -> bool:
        """Whether the draft's pool holds the rows of a page that can be found."""
        return self._entries[page].has_draft_rows

    def publish(self, page: int, key: bytes, has_draft_rows: bool) -> None:
        """Let a held page, whose rows are never written again, be found.

        Of two pages with one key the first is kept, unless the second alone has the draft's rows.
        """
        assert self._num_holders[page] > 0, f"page {page} is nobody's"
        assert page not in self._entries, f"page {page} is published twice"
        earlier = self._page_of.get(key)
        if earlier is not None:
            if self._entries[earlier].has_draft_rows or not has_draft_rows:
                return
            self._forget(earlier)
        self._page_of[key] = page
        self._entries[page] = _Entry(key, has_draft_rows)

    def unpublish(self, page: int) -> None:
        """Let a page be found no longer, if it could be."""
        if page in self._entries:
            self._forget(page)

    def _forget(self, page: int) -> None:
        """Let a page be found no longer; it is free if nobody holds it."""
        del self._page_of[self._entries.pop(page).key]
        if page in self._cached:
            del self._cached[page]
            self._free(page)

    def _give_up(self, count: int) -> None:
        """Free cached pages, as many as there are of so many."""
        for page in list(self._cached)[:count]:
            self._forget(page)

    # --- placing

    def _free(self, page: int) -> None:
        self._is_free[page] = True
        self._num_free += 1

    def _start_of_run(self, count: int) -> int:
        """Where a sequence without a free neighbour goes on, for so many pages: see the class."""
        edges = np.flatnonzero(np.diff(self._is_free.astype(np.int8)))
        starts, ends = (
            edges[::2] + 1,
            edges[1::2] + 1,
        )  # runs are [start, end); page 0 and the guard are never free
        largest = int(np.argmax(ends - starts))
        start, end = int(starts[largest]), int(ends[largest])
        return start if start == 1 else max(start, min(start + (end - start) // 2, end - count))
