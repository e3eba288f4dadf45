"""Notices an engine that has work and makes no progress.

Time is counted in ticks of the watchdog's own, not by the clock: when a stopped process or a machine that
slept goes on, the clock says that the engine did nothing for long, but nothing is wrong with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_TICKS = 10  # in the time that the engine is given


class Watchdog:
    """Calls ``bite`` once when the engine stalls, and again only after it has moved meanwhile.

    pulse: a number that grows with every step that did something, None while there is nothing to do.
    patience: seconds without progress after which the engine counts as stalled; 0 never.
    """

    def __init__(self, pulse: Callable[[], int | None], patience: float, bite: Callable[[], None]) -> None:
        self.is_stalled = False
        self._pulse, self._patience, self._bite = pulse, patience, bite

    async def run(self) -> None:
        """Watch until cancelled."""
        last, num_ticks = self._pulse(), 0
        while self._patience:
            await asyncio.sleep(self._patience / _TICKS)
            now = self._pulse()
            num_ticks = num_ticks + 1 if now is not None and now == last else 0
            last = now
            was_stalled, self.is_stalled = self.is_stalled, num_ticks >= _TICKS
            if self.is_stalled and not was_stalled:
                self._bite()
