"""CUDA graphs: a function's launches captured once, and replayed at the price of one.

A kernel of a small batch takes a GPU about as long as its launch takes the host. A graph holds the launches
of a function, with the addresses that they read and write, and the device runs through it by itself. So a
function that is captured

- reads what changes from tensors that stay where they are: its inputs, which are copied to the graph's own
  before each replay, or a ``Mailbox``, which the host fills. A number of Python's is what it was when the
  graph was captured, for ever;
- never waits for the device, and never does one thing or another by what a tensor holds;
- may run twice over: before it is captured it runs for real, and what it overwrites it has written itself.

A replay is over long before its work is: the host goes on, and may be a step ahead of it. What it writes to
meanwhile, and what it reads, are a ``Mailbox``'s and a ``Reader``'s business.

All graphs share one pool of memory, and what one needs on its way may lie where another has its results: they
are there until the next replay of any graph.

Who is served must not suffer from a size that comes late and finds no room: once a server is up, what cannot
be captured is called as it is, and not tried again.

Sizes come in buckets, of sequences and of nodes; what is missing is padding, which lies on the dummy page.

With ``pdl`` the kernels of a graph are launched dependently (``kernels.launches``): only there do they follow
one another so closely that it matters.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from kernels import dependent_launches

SEQ_BUCKETS: Final = (1, 2, 4, 8, 16, 32)
NODE_BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 32)

_WARM_UPS = 2  # runs before a capture: the first compiles and allocates, the second is as all others
_ALIGNMENT = 16  # bytes: the widest load of a kernel
_NUM_BUFFERS = 2  # that a mailbox is written to in turn: one for the step under way, one for that behind it

T = TypeVar("T")
log = logging.getLogger(__name__)


def bucket(size: int, buckets: Sequence[int]) -> int | None:
    """The least bucket that holds so many, None if none does."""
    return next((one for one in buckets if one >= size), None)


class Device(Protocol):
    """What captures."""

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """What replays the function's work on a device, and where its results then lie."""
        ...

    def num_free_bytes(self) -> int:
        """Memory that nobody has taken."""
        ...


class CudaDevice:
    """Captures on a CUDA device, into a pool of memory that all graphs share."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    function()
            graph = torch.cuda.CUDAGraph()
            # Other threads go on meanwhile: of what they do on the device, nothing belongs to the graph.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                results = function()
        finally:  # whoever calls it as it is must not overtake the runs before the capture
            current.wait_stream(self._stream)
        return graph.replay, results

    def num_free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


@dataclass(frozen=True, slots=True)
class _Captured:
    inputs: tuple[Tensor, ...]
    replay: Callable[[], object]
    results: Any


class Graphs:
    """Functions captured when they are first called, by key. Without a device they are simply called."""

    def __init__(self, device: Device | None = None, pdl: bool = False) -> None:
        self._device, self.pdl = device, pdl
        self._captured: dict[Hashable, _Captured] = {}
        self._refused: set[Hashable] = set()  # keys that could not be captured
        self.falls_back = False  # call what cannot be captured, instead of raising why
        self.seconds, self.num_bytes = 0.0, 0  # that captures have taken

    @property
    def keys(self) -> list[Hashable]:
        """Of the functions that are captured."""
        return list(self._captured)

    @property
    def are_on(self) -> bool:
        return self._device is not None

    def start_over(self, pdl: bool) -> None:
        """Capture everything anew, with dependent launches or without."""
        self._captured.clear()
        self._refused.clear()
        self.pdl = pdl

    def __call__(self, key: Hashable, function: Callable[..., T], *inputs: Tensor) -> T:
        """The results of a function of tensors.

        key: says what the function does besides, and of which shapes; two functions of one key are the same.
        Raises what its capture raised, unless it ``falls_back``.
        """
        if self._device is None or key in self._refused:
            return function(*inputs)
        found = self._captured.get(key)
        if found is None:
            try:
                found = self._captured[key] = self._capture(self._device, function, inputs)
            except RuntimeError as error:  # of memory, as a rule; a broken device will say so again
                if not self.falls_back:
                    raise
                log.warning("%s stays without a graph, which makes it slower: %s", key, error)
                self._refused.add(key)
                return function(*inputs)
        for fixed, given in zip(found.inputs, inputs, strict=True):
            assert fixed.shape == given.shape, f"{key}: {list(given.shape)}, captured {list(fixed.shape)}"
            assert fixed.dtype == given.dtype, f"{key}: {given.dtype}, captured {fixed.dtype}"
            fixed.copy_(given)
        found.replay()
        results: T = found.results
        return results

    def _capture(self, device: Device, function: Callable[..., T], inputs: Sequence[Tensor]) -> _Captured:
        started, free = time.perf_counter(), device.num_free_bytes()
        fixed = tuple(given.clone(memory_format=torch.contiguous_format) for given in inputs)
        with dependent_launches(self.pdl):
            replay, results = device.capture(lambda: function(*fixed))
        self.seconds += time.perf_counter() - started
        self.num_bytes += max(free - device.num_free_bytes(), 0)
        return _Captured(fixed, replay, results)


class Mailbox:
    """Tensors that stay where they are on a device, filled by one copy from the host.

    fields: shape and dtype of each, by name. Write all of ``host``, then ``send``; ``device`` has what was
    sent last, or what the device has made of it since.

    A copy is still under way when ``send`` returns, and may wait for a whole step before it. So the host
    writes to two buffers in turn, and to neither before its last copy is over.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: str) -> None:
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in fields.values()]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]

        def views(buffer: Tensor) -> dict[str, Tensor]:
            parts = torch.split(buffer, padded)
            return {
                name: part[:size].view(dtype).view(shape)
                for part, size, (name, (shape, dtype)) in zip(parts, sizes, fields.items(), strict=True)
            }

        self._on_gpu = device.startswith("cuda")
        self._hosts = [
            torch.zeros(sum(padded), dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(_NUM_BUFFERS)
        ]
        self._host_views = [views(host) for host in self._hosts]
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_BUFFERS
        self._turn = 0  # whose it is to be written
        self._device = torch.zeros(sum(padded), dtype=torch.uint8, device=device)
        self.device = views(self._device)

    @property
    def host(self) -> dict[str, Tensor]:
        """Where to write what is sent next."""
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._host_views[self._turn]

    def send(self) -> None:
        self._device.copy_(self._hosts[self._turn], non_blocking=True)
        if self._on_gpu:
            self._copied[self._turn] = _recorded()
        self._turn = (self._turn + 1) % _NUM_BUFFERS


class Reader:
    """Copies small tensors to the host."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")

    def __call__(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor that nobody writes to any more. What is returned waits for the copy, and for
        all that the device had to do before it, but for nothing that it was given since."""
        if not self._on_gpu:
            return tensor.cpu
        # Memory of its own, which torch has pinned before: another copy may be under way.
        landed = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        landed.copy_(tensor, non_blocking=True)
        done = _recorded()

        def wait() -> Tensor:
            done.synchronize()
            return landed

        return wait


def _recorded() -> torch.cuda.Event:
    """An event that a device reaches when it has done what it was given so far."""
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
