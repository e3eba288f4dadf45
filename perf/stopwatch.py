"""Explicit timers around calls, each charged with its own time only.

Timed calls nest: what an inner one takes is taken off the outer one's account. So the accounts add up to the
time of the outermost calls, and nothing is counted twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

P = ParamSpec("P")
R = TypeVar("R")

Timed = tuple[object, str, str]  # owner, name of its attribute, account that is charged


class Stopwatch:
    """Accounts of one thread, by name: seconds and calls. clock: perf_counter for the time that passes,
    thread_time for what the thread computes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._clock, self._since = clock, 0.0
        self._open: list[str] = []

    def timed(self, call: Callable[P, R], account: str) -> Callable[P, R]:
        """The same call, charged to an account."""

        def charged(*args: P.args, **kwargs: P.kwargs) -> R:
            self._charge()
            self._open.append(account)
            self.calls[account] += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return charged

    def _charge(self) -> None:
        """Book the time since the last time on whoever is at work."""
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since  # type: ignore[assignment]  # typeshed: counts are ints
        self._since = now

    @contextmanager
    def on(self, *calls: Timed) -> Iterator[None]:
        """Time some methods while the context lasts; their owners are instances or classes."""
        with ExitStack() as stack:
            for owner, name, account in calls:
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), account)))
            yield


class LargestList:
    """The most elements that one conversion moved between a Python list and a tensor, either way.

    Work in Python goes through lists; so if this grows neither with the vocabulary nor with the context, no
    token of either was touched one by one.
    """

    def __init__(self) -> None:
        self.most = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at ``Tensor.tolist`` and ``torch.tensor`` while the context lasts."""
        import torch

        to_list, from_list = torch.Tensor.tolist, torch.tensor

        def tolist(tensor: torch.Tensor) -> Any:
            self.most = max(self.most, tensor.numel())
            return to_list(tensor)

        def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = from_list(*args, **kwargs)
            self.most = max(self.most, made.numel())
            return made

        with patch.object(torch.Tensor, "tolist", tolist), patch.object(torch, "tensor", tensor):
            yield
