"""A GPU that is not there: tensors that claim to lie on a device and are computed on the host.

To the code under test they are a GPU's (``is_cuda``, a device of another type than "cpu"), so it takes the
road it would take there; kernels are their references. And the device insists on what a GPU insists on:

- Tensors of host and device do not meet in one operation.
- Whoever looks at a tensor's numbers waits for the device: ``num_reads`` counts that.
- What is captured may do neither, nor anything whose shape depends on numbers, nor fetch a tensor.
- A copy from the host that nobody waits for (``non_blocking``) takes until something is read that was made
  after it. The host must not write to what is copied before that, which shows then.

``capture`` runs a function once and records every operation with the very tensors that it took. A replay runs
the record again, on the same memory: what the function looked up elsewhere while it was captured stays what
it was then, as on a GPU. And graphs share their memory: a replay overwrites what the others have left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels.ops import OPERATIONS

DEVICE = "simulated"

# Of these a GPU waits for the numbers: for the result itself, or for its shape.
_READS = frozenset(
    (
        *("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose"),
        *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "repeat_interleave"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )
)
_JUNK = 91  # a token, a node or a number, as it comes
_MOVES = frozenset(("to", "_to_copy", "copy_"))

T = TypeVar("T")


class GraphError(Exception):
    """Something that a graph cannot hold."""


class SimulatedTensor(Tensor):
    """Claims to lie on the device; ``numbers`` has what it holds."""

    numbers: Tensor
    num_sent: int  # copies from the host before it was made
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Self:
        with torch.inference_mode(False):  # else torch would refuse views of what was made outside of it
            made: Self = Tensor._make_wrapper_subclass(
                cls,
                numbers.shape,
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=torch.device(DEVICE, 0),
            )
        made.numbers, made.num_sent = numbers, 0
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"simulated {self.numbers!r}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise GraphError(f"{func} outside of ``with Simulated()``")


# What operations took, how to run them, and where their results belong.
Record = list[tuple[list[Tensor], Callable[[], Any], list[Tensor]]]


class Simulated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The device (engine.graphs.Device), there while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_reads = 0
        self.num_captures = self.num_replays = 0
        self._record: Record | None = None  # of what is being captured
        self._memory: dict[int, list[Tensor]] = {}  # of each graph
        self._num_sent = 0
        self._under_way: list[tuple[int, Tensor, Tensor]] = []  # copies: number, what is copied, what it was

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = list(_leaves((args, kwargs)))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        wanted = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        on_device = any(isinstance(one, SimulatedTensor) for one in given)
        if not on_device and (wanted is None or wanted.type != DEVICE):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self._judge(name, args, given, wanted)
        inner_args, inner_kwargs = _numbers((args, kwargs))

        def run() -> Any:
            return func(*inner_args, **inner_kwargs)

        results = self._run(run, (inner_args, inner_kwargs))
        if name in _MOVES:
            source, destination = _ends(name, args, wanted)
            if source != destination and name != "copy_":
                results = results.clone()  # memory is not shared across
            if destination == "host":
                return args[0] if name == "copy_" else results
            if source == "host" and (kwargs.get("non_blocking") or args[2:] == (True,)):
                self._num_sent += 1
                self._under_way.append((self._num_sent, args[1], args[1].clone()))
        return self._stamped(_wrapped(results, given))

    def _stamped(self, results: Any) -> Any:
        for one in _tensors(results):
            if isinstance(one, SimulatedTensor):
                one.num_sent = self._num_sent
        return results

    def _landed(self, num_sent: int) -> None:
        """Something was read behind so many copies: they are over. GraphError if the host has written to what
        was copied before it could know that."""
        over = [one for one in self._under_way if one[0] <= num_sent]
        self._under_way = [one for one in self._under_way if one[0] > num_sent]
        for _, source, content in over:
            if not torch.equal(source, content):
                raise GraphError("the host wrote to memory that was still to be copied")

    def _run(self, run: Callable[[], Any], taken: Any) -> Any:
        results = run()
        if self._record is not None:
            self._record.append((_tensors(taken), run, _tensors(results)))
        return results

    def _judge(self, name: str, args: Any, given: list[Tensor], wanted: torch.device | None) -> None:
        """Count what a GPU would wait for; GraphError for what it refuses."""
        reads = name in _READS or (name.startswith("index") and _has_mask(args))
        crosses = False
        if name in _MOVES:
            source, destination = _ends(name, args, wanted)
            crosses = source != destination
            reads = reads or (crosses and destination == "host")
        else:
            foreign = [one for one in given if not isinstance(one, SimulatedTensor) and one.dim() > 0]
            crosses = bool(foreign)
            if foreign and not name.startswith("index"):  # a GPU fetches indices from the host by itself
                raise GraphError(
                    f"{name}: tensors of host and device, {[list(one.shape) for one in foreign]}"
                )
        if self._record is not None and (reads or crosses):
            what = "waits for the device" if reads else "moves tensors between host and device"
            raise GraphError(f"{name} {what}, and cannot be captured")
        self.num_reads += reads
        if reads:
            self._landed(max(one.num_sent for one in given if isinstance(one, SimulatedTensor)))

    def kernel(self, reference: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel of which nobody sees more than its arguments: it runs as one operation."""

        def launch(*args: Any) -> Any:
            parts = [_parts(arg) for arg in args]
            given = _tensors(parts)
            assert all(isinstance(one, SimulatedTensor) for one in given), (
                "a kernel takes its device's tensors"
            )
            inner = _numbers(parts)
            inner_args = [_whole(arg, part) for arg, part in zip(args, inner, strict=True)]
            with _disable_current_modes():
                return self._stamped(_wrapped(self._run(lambda: reference(*inner_args), inner), given))

        return launch

    # --- graphs

    @property
    def is_capturing(self) -> bool:
        return self._record is not None

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        assert not self.is_capturing, "one capture within another"
        record: Record = []
        self._record = record
        try:
            results = function()
        finally:
            self._record = None
        self.num_captures += 1

        number = self.num_captures
        self._memory[number] = _made(record)

        def replay() -> None:
            self.num_replays += 1
            with _disable_current_modes():
                for other, made in self._memory.items():
                    if other != number:
                        for tensor in made:
                            tensor.fill_(_JUNK)
                for _, run, places in record:
                    for place, found in zip(places, _tensors(run()), strict=True):
                        if place.untyped_storage().data_ptr() != found.untyped_storage().data_ptr():
                            place.copy_(found)

        return replay, results

    def num_free_bytes(self) -> int:
        return 0


_ENTERED: list[Simulated] = []


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """The device, with a kernel for every registered operation."""
    device = Simulated()
    kernels = {operation.name: device.kernel(operation.reference) for operation in OPERATIONS}
    monkeypatch.setattr("kernels.device.registered", kernels.__getitem__)
    _ENTERED.append(device)
    with device:
        yield device
    _ENTERED.remove(device)


def _ends(name: str, args: Any, wanted: torch.device | None) -> tuple[str, str]:
    """Where a move begins and ends."""

    def side(of: Tensor) -> str:
        return DEVICE if isinstance(of, SimulatedTensor) else "host"

    if name == "copy_":
        return side(args[1]), side(args[0])
    if wanted is None:
        destination = side(args[1]) if len(args) > 1 and isinstance(args[1], Tensor) else side(args[0])
    else:
        destination = DEVICE if wanted.type == DEVICE else "host"
    return side(args[0]), destination


def _has_mask(args: Any) -> bool:
    """Whether an index is a mask: how many places it names, only its numbers say."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _parts(argument: Any) -> Any:
    """The fields of a dataclass, anything else itself."""
    if not dataclasses.is_dataclass(argument):
        return argument
    return {field.name: getattr(argument, field.name) for field in dataclasses.fields(argument)}


def _whole(argument: Any, parts: Any) -> Any:
    """The argument with other parts."""
    if not dataclasses.is_dataclass(argument) or isinstance(argument, type):
        return parts
    return dataclasses.replace(argument, **parts)


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(results) if isinstance(leaf, Tensor)]


def _leaves(x: Any) -> Iterator[Any]:
    """What is in lists, tuples and dicts."""
    if isinstance(x, list | tuple):
        for part in x:
            yield from _leaves(part)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Lists, tuples and dicts of other leaves."""
    if isinstance(x, list | tuple):
        parts = [_mapped(function, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if isinstance(x, dict):
        return {key: _mapped(function, part) for key, part in x.items()}
    return function(x)


def _numbers(x: Any) -> Any:
    """Arguments as the host takes them."""

    def inner(leaf: Any) -> Any:
        if isinstance(leaf, SimulatedTensor):
            return leaf.numbers
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    return _mapped(inner, x)


def _made(record: Record) -> list[Tensor]:
    """What the operations of a record have allocated."""
    made: dict[int, Tensor] = {}
    for taken, _, places in record:
        known = {tensor.untyped_storage().data_ptr() for tensor in taken}
        for place in places:
            if place.untyped_storage().data_ptr() not in known:
                made[place.untyped_storage().data_ptr()] = place
    return list(made.values())


def _wrapped(results: Any, given: list[Tensor]) -> Any:
    """Results on the device; an argument that was changed in place stays the tensor that it is."""
    same = {id(one.numbers): one for one in given if isinstance(one, SimulatedTensor)}

    def outer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return same[id(leaf)] if id(leaf) in same else SimulatedTensor(leaf)

    return _mapped(outer, results)


# --- what torch knows of the device. ``torch.tensor(.., device=..)`` passes by modes, and asks for these two.


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, destination: SimulatedTensor, non_blocking: bool = False) -> Tensor:
    if any(device.is_capturing for device in _ENTERED):
        raise GraphError("a tensor made on the host cannot be captured")
    destination.numbers.copy_(source)
    return destination


backend_registration._setup_privateuseone_for_python_backend(DEVICE)
torch.library.impl("aten::empty_strided", "PrivateUse1", _empty_strided)
torch.library.impl("aten::_copy_from", "PrivateUse1", _copy_from)
