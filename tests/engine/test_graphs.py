"""Captured functions: a replay is the function with new contents; what a GPU cannot capture is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from engine.graphs import NODE_BUCKETS, CudaDevice, Graphs, Mailbox, bucket
from kernels.launches import are_dependent
from tests.simulated import DEVICE, GraphError, Simulated, simulated_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated_gpu(monkeypatch) as device, torch.inference_mode():
        yield device


def on_device(*values: float) -> Tensor:
    return torch.tensor(values).to(DEVICE)


def softly(x: Tensor, y: Tensor) -> Tensor:
    rows = torch.stack((x, y))
    rows[0] += 1
    return torch.softmax(rows.where(rows > 0, 0.0), dim=0)


def test_without_a_device_functions_are_called() -> None:
    graphs = Graphs()
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    assert torch.equal(graphs("key", softly, x, y), softly(x, y))
    assert graphs.keys == []


def test_a_replay_is_the_function_of_new_inputs(gpu: Simulated) -> None:
    graphs = Graphs(gpu)
    for values in ((1.0, 2.0, 3.0, -1.0), (5.0, -2.0, 0.5, 0.0)):
        x, y = on_device(*values[:2]), on_device(*values[2:])
        found, expected = graphs("key", softly, x, y), softly(x, y)
        assert found.tolist() == expected.tolist()
    assert (gpu.num_captures, gpu.num_replays) == (1, 2)


def test_inputs_of_another_shape_need_another_key(gpu: Simulated) -> None:
    graphs = Graphs(gpu)
    graphs("key", lambda x: x + 1, on_device(1.0, 2.0))
    with pytest.raises(AssertionError, match="captured"):
        graphs("key", lambda x: x + 1, on_device(1.0))
    assert graphs("other", lambda x: x + 1, on_device(1.0)).tolist() == [2.0]


def test_changes_in_place_are_made_again(gpu: Simulated) -> None:
    graphs, total = Graphs(gpu), on_device(0.0, 0.0)
    graphs("key", total.add_, on_device(1.0, 2.0))  # runs for real before it is captured
    before = total.tolist()
    graphs("key", total.add_, on_device(10.0, 20.0))
    assert [now - then for now, then in zip(total.tolist(), before, strict=True)] == [10.0, 20.0]


def test_what_finds_no_room_is_called_as_it_is(
    gpu: Simulated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But not before the graphs may: a server that starts says why it cannot."""
    graphs, tried = Graphs(gpu), list[int]()

    def full(function: Callable[[], object]) -> None:
        tried.append(1)
        function()  # the runs before a capture
        raise torch.OutOfMemoryError("no room")

    graphs("early", lambda x: x + 1, on_device(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "capture", full)
        with pytest.raises(torch.OutOfMemoryError):
            graphs("late", lambda x: x + 2, on_device(1.0))
        graphs.falls_back = True
        for value in (1.0, 2.0, 3.0):
            assert graphs("late", lambda x: x + 2, on_device(value)).tolist() == [value + 2]
    assert len(tried) == 2, "not tried again"
    assert [record.message for record in caplog.records] == [
        "late stays without a graph, which makes it slower: no room"
    ]
    assert graphs("early", lambda x: x + 1, on_device(5.0)).tolist() == [6.0]
    assert graphs("other", lambda x: x + 3, on_device(5.0)).tolist() == [8.0]
    assert graphs.keys == ["early", "other"]


def test_a_capture_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran before it did so on a stream of its own, and the function is about to run on the usual one."""
    usual, own = Mock(name="usual"), Mock(name="own")
    for name, fake in (
        ("Stream", lambda device: own),
        ("current_stream", lambda device: usual),
        ("graph_pool_handle", Mock()),
        ("CUDAGraph", Mock()),
        ("stream", lambda stream: nullcontext()),
        ("graph", lambda graph, **options: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    function = Mock(side_effect=[1, 2, torch.OutOfMemoryError("no room")])  # two runs before the capture
    with pytest.raises(torch.OutOfMemoryError):
        CudaDevice("cuda").capture(function)
    own.wait_stream.assert_called_once_with(usual)
    usual.wait_stream.assert_called_once_with(own)


def test_kernels_of_a_graph_are_launched_as_asked_for(gpu: Simulated) -> None:
    """Dependently or not, while they are captured and at no other time; starting over captures anew."""
    graphs, seen = Graphs(gpu, pdl=True), list[bool]()

    def function(x: Tensor) -> Tensor:
        seen.append(are_dependent())
        return x + 1

    for pdl in (True, False):
        graphs.start_over(pdl)
        assert graphs.keys == []
        assert graphs("key", function, on_device(1.0)).tolist() == [2.0]
        assert set(seen) == {pdl}
        seen.clear()
        graphs("key", function, on_device(2.0))
        assert seen == []
    assert not are_dependent()


def test_a_number_of_pythons_stays_what_it_was(gpu: Simulated) -> None:
    """The mistake that the simulation is there to show."""
    graphs, lengths = Graphs(gpu), [3]
    function: Callable[[Tensor], Tensor] = lambda x: x + lengths[0]  # noqa: E731
    assert graphs("key", function, on_device(1.0)).tolist() == [4.0]
    lengths[0] = 5
    assert graphs("key", function, on_device(1.0)).tolist() == [4.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x.sum().item(),
        lambda x: x if bool((x > 0).all()) else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0, 2.0]).to(DEVICE),
        lambda x: x + torch.tensor([1.0, 2.0], device=DEVICE),
        lambda x: x[torch.tensor([0, 0])],
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: torch.zeros(2).copy_(x),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_or_moves_cannot_be_captured(gpu: Simulated, function: Callable[[Tensor], object]) -> None:
    with pytest.raises(GraphError):
        Graphs(gpu)("key", function, on_device(1.0, 2.0))


def test_reads_are_counted(gpu: Simulated) -> None:
    x = on_device(1.0, 2.0)
    y = x * 2 + torch.ones(2, device=DEVICE)
    assert gpu.num_reads == 0
    assert y.tolist() == [3.0, 5.0]
    assert bool((y > 0).all())
    assert gpu.num_reads == 2


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_a_mailbox_has_what_was_sent(gpu: Simulated, device: str) -> None:
    box = Mailbox({"odd": ((3,), torch.float32), "table": ((2, 2), torch.int64)}, device)
    odd, table = box.device["odd"], box.device["table"]
    for number in (1, 7):
        box.host["odd"].fill_(number)
        box.host["table"].copy_(torch.arange(4).view(2, 2) * number)
        box.send()
        assert odd.tolist() == [number] * 3
        assert table.tolist() == [[0, number], [2 * number, 3 * number]]
    assert table.is_contiguous()


def test_buckets() -> None:
    found = [bucket(size, NODE_BUCKETS) for size in (1, 5, 12, 32, 33)]
    assert found == [1, 6, 12, 32, None]
