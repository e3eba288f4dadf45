"""Pages: the unit in which KV rows are handed out. Page 0 is the dummy that padding rows are written to."""

from __future__ import annotations

import numpy as np


class PagePool:
    """Free pages of one page table, shared by the target's and the head's pools.

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

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return self._num_free

    def pages_for(self, num_rows: int) -> int:
        """Pages that hold num_rows rows."""
        return -(-num_rows // self.page_size)

    def extend(self, pages: list[int], num_rows: int) -> bool:
        """Grow a sequence's pages until they hold num_rows rows. False, and nothing taken, if too few are
        free."""
        missing = self.pages_for(num_rows) - len(pages)
        if missing > self._num_free:
            return False
        for _ in range(missing):
            page = pages[-1] + 1 if pages and self._is_free[pages[-1] + 1] else self._start_of_run()
            self._is_free[page] = False
            self._num_free -= 1
            pages.append(page)
        return True

    def shrink(self, pages: list[int], num_rows: int) -> None:
        """Give back the pages past those that hold num_rows rows."""
        while len(pages) > self.pages_for(num_rows):
            page = pages.pop()
            assert not self._is_free[page], f"page {page} freed twice"
            self._is_free[page] = True
            self._num_free += 1

    def _start_of_run(self) -> int:
        """Where a sequence without a free neighbour goes on: see the class."""
        edges = np.flatnonzero(np.diff(self._is_free.astype(np.int8)))
        starts, ends = (
            edges[::2] + 1,
            edges[1::2] + 1,
        )  # runs are [start, end); page 0 and the guard are never free
        largest = int(np.argmax(ends - starts))
        start, end = int(starts[largest]), int(ends[largest])
        return start if start == 1 else start + (end - start) // 2
