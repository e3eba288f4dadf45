"""Pages: the unit in which KV rows are handed out. Page 0 is the dummy that padding rows are written to."""

from __future__ import annotations

import heapq


class PagePool:
    """Free pages of one page table, shared by the target's and the head's pools.

    The lowest free page goes first, so a lone sequence gets consecutive pages and its rows can be read in place.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 2, "one dummy page and one real page at least"
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(1, num_pages))
        self._is_free = bytearray([0] + [1] * (num_pages - 1))

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_rows: int) -> int:
        """Pages that hold num_rows rows."""
        return -(-num_rows // self.page_size)

    def extend(self, pages: list[int], num_rows: int) -> bool:
        """Grow a sequence's pages until they hold num_rows rows. False, and nothing taken, if too few are free."""
        missing = self.pages_for(num_rows) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = heapq.heappop(self._free)
            self._is_free[page] = 0
            pages.append(page)
        return True

    def shrink(self, pages: list[int], num_rows: int) -> None:
        """Give back the pages past those that hold num_rows rows."""
        while len(pages) > self.pages_for(num_rows):
            page = pages.pop()
            assert not self._is_free[page], f"page {page} freed twice"
            self._is_free[page] = 1
            heapq.heappush(self._free, page)
