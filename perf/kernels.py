"""How near to its bound is every kernel: ``python -m perf.kernels [NAME ..] [--floor] [--json FILE]``.

For each registered operation and real shape: first that it agrees with its reference, then the median time,
the bytes and flops that it must move and compute at least, and the share of this device's measured copy
bandwidth and matrix ceiling that the time comes to. Beside it the time of torch's own best for the same
result, and of flashinfer's with ``--flashinfer``. A kernel that is wrong is not timed, and the exit code
is 1.

Where the device has dependent launches, a kernel that takes no longer than some gaps between launches is
checked and timed with them too (``pdl_us``): in a graph, each call behind another of its kind.

``--floor`` needs no GPU: it gives the least time by the datasheet of one (``--gpu``). ``--dry-run`` runs tiny
shapes in Triton's interpreter by the clock of the host, to try the program where there is no GPU; its times
mean nothing. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.cli.roofline import GPUS
from engine.errors import ConfigError, EngineError
from kernels import can_be_dependent, dependent_launches
from kernels.ops import OPERATIONS, Case, Operation, Source
from perf import document
from perf.kernel_peers import FLASHINFER, TORCH, Peer
from perf.kernel_timing import Ceilings, cache_bytes, launch_seconds, measured_ceilings, timed
from perf.provenance import provenance

_MOST_SETS = 8  # of arguments that take turns
_SHORT: Final = 50e-6  # seconds: a kernel that long hides the gap before it
# Dense matrix products, from the datasheets of GPUs with an FP8 unit: bfloat16 and FP8 flops per second.
_DATASHEET_FLOPS: Final = {"H100": (0.99e15, 1.98e15), "H200": (0.99e15, 1.98e15), "B200": (2.25e15, 4.5e15)}


class Shapes(Source):
    """Small tensors as they are, large ones as shapes alone: enough to count what must be moved."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self._large = Source("meta")

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return self._by_size(shape).normal(*shape, dtype=dtype, scale=scale)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self._by_size(shape).integers(low, high, *shape, dtype=dtype)

    def _by_size(self, shape: tuple[int, ...]) -> Source:
        return self._large if torch.Size(shape).numel() > 1 << 20 else Source("cpu")


def datasheet(name: str) -> Ceilings:
    """A GPU's ceilings by its maker. Raises ConfigError."""
    if name not in _DATASHEET_FLOPS:
        raise ConfigError(f"--gpu is {name!r}, expected one of {', '.join(_DATASHEET_FLOPS)}")
    gpu = next(gpu for gpu in GPUS if gpu.name.startswith(name))
    return Ceilings(gpu.bandwidth, *_DATASHEET_FLOPS[name], f"datasheet: {gpu.source}")


def chosen(names: Sequence[str]) -> list[Operation]:
    """Operations by name, all of them where none is named. Raises ConfigError."""
    known = {operation.name: operation for operation in OPERATIONS}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no operation {name!r}; expected some of {', '.join(known)}")
    return [known[name] for name in names or known]


def floors(operation: Operation, cases: Sequence[Case], ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """What no kernel can beat."""
    for case in cases:
        yield _bound(operation, case, case.make(Shapes()), ceilings)


def _bound(operation: Operation, case: Case, arguments: tuple[Any, ...], limits: Ceilings) -> dict[str, Any]:
    cost = operation.cost(*arguments)
    floor = limits.seconds(cost.num_bytes, cost.flops, fp8="e4m3" in case.name)
    return {
        "operation": operation.name,
        "case": case.name,
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "floor_us": round(1e6 * floor, 3),
    }


def wrong(operation: Operation, case: Case, device: str) -> str:
    """How a kernel disagrees with its reference; empty where it does not."""
    kernel = operation.load()
    results = []
    for function in (operation.reference, kernel):
        arguments = case.make(Source(device))
        if device == "cuda":
            torch.cuda.synchronize()  # weights of dependent launches are there before
        returned = function(*arguments)
        all_of = [returned] if isinstance(returned, Tensor) else list(returned or ())
        results.append(all_of + [arguments[index] for index in operation.changes])
    try:
        for found, expected in zip(results[1], results[0], strict=True):
            limit = case.tolerance
            torch.testing.assert_close(found.float(), expected.float(), atol=limit.atol, rtol=limit.rtol)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def measured(operation: Operation, case: Case, device: str, limits: Ceilings, others: bool) -> dict[str, Any]:
    """One row: correctness, then times. others: flashinfer's too."""
    arguments = case.make(Source(device))
    row = _bound(operation, case, arguments, limits)
    disagreement = wrong(operation, case, device)
    row["correct"] = not disagreement
    if disagreement:
        return row | {"error": disagreement[:500]}
    num_sets = min(_MOST_SETS, 1 + 2 * cache_bytes(device) // max(row["bytes"], 1))
    sets = [arguments, *(case.make(Source(device, seed)) for seed in range(1, num_sets))]
    kernel = operation.load()
    repeats = 11 if device == "cuda" else 1
    calls = [lambda given=given: kernel(*given) for given in sets]
    ours = timed(calls, device, repeats)
    row |= {"us": round(1e6 * ours.seconds, 3), "captured": ours.captured, "argument_sets": num_sets}
    if can_be_dependent(device) and ours.seconds < _SHORT:
        with dependent_launches():
            disagreement = wrong(operation, case, device)
            if disagreement:
                return row | {"correct": False, "error": f"dependently: {disagreement[:500]}"}
            row["pdl_us"] = round(1e6 * timed(calls, device, repeats).seconds, 3)
    row["bandwidth_share"] = round(row["bytes"] / ours.seconds / limits.bandwidth, 4)
    row["floor_share"] = round(row["floor_us"] / row["us"], 4)
    row |= _peer("torch", TORCH.get(operation.name, _reference(operation)), sets, device, repeats)
    if others and operation.name in FLASHINFER:
        row |= _peer("flashinfer", FLASHINFER[operation.name], sets, device, repeats)
    return row


def attempted(
    operation: Operation, case: Case, device: str, limits: Ceilings, others: bool
) -> dict[str, Any]:
    """``measured``, or why it came to nothing: what fails must not take the others' figures along."""
    from kernels.triton.failures import FAILURES

    try:
        row = measured(operation, case, device, limits, others)
        if device == "cuda":
            torch.cuda.empty_cache()
    except FAILURES as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return {"operation": operation.name, "case": case.name, "correct": False, "error": said[:500]}
    return row


def _reference(operation: Operation) -> Peer:
    return lambda *given: lambda: operation.reference(*given)


def _peer(name: str, prepare: Peer, sets: list[tuple[Any, ...]], device: str, repeats: int) -> dict[str, Any]:
    """Somebody else's time for the same result, or why there is none."""
    try:
        calls = [call for given in sets if (call := prepare(*given)) is not None]
        peer = timed(calls, device, repeats) if calls else None
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {f"{name}_error": str(error)[:300]}
    if peer is None:
        return {}
    return {f"{name}_us": round(1e6 * peer.seconds, 3), f"{name}_captured": peer.captured}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m perf.kernels", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help="operations; all of them if none is named")
    parser.add_argument("--cases", metavar="TEXT", default="", help="only shapes whose name contains it")
    parser.add_argument("--floor", action="store_true", help="the least time by a datasheet, without a GPU")
    parser.add_argument("--gpu", default="H200", metavar="NAME", help="whose datasheet, for --floor")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--flashinfer", action="store_true", help="time flashinfer's operations as well")
    parser.add_argument(
        "--seconds", type=float, default=0, metavar="S", help="stop measuring after this long"
    )
    document.add_json_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the JSON. Returns the exit code."""
    args = parsed(argv)
    try:
        operations = chosen(args.names)
        result = _floor_result(args, operations) if args.floor else _measured_result(args, operations)
    except EngineError as error:
        sys.stderr.write(f"kernels: error: {error}\n")
        return 1
    _show(result["rows"])
    document.write(result, args.json)
    return 0 if all(row.get("correct", True) for row in result["rows"]) else 1


def _floor_result(args: argparse.Namespace, operations: list[Operation]) -> dict[str, Any]:
    limits = datasheet(args.gpu)
    rows = [
        row
        for operation in operations
        for row in floors(operation, [case for case in operation.real if args.cases in case.name], limits)
    ]
    return {"benchmark": "kernels", "ceilings": _ceilings(limits), "rows": rows} | provenance("cpu", "mixed")


def _measured_result(args: argparse.Namespace, operations: list[Operation]) -> dict[str, Any]:
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is loaded
        device = "cpu"
    elif not torch.cuda.is_available():
        raise ConfigError("no CUDA device; --floor and --dry-run need none")
    else:
        device = "cuda"
    limits, launch = measured_ceilings(device), launch_seconds(device)
    began, rows, skipped = time.perf_counter(), [], 0
    for operation in operations:
        for case in operation.tiny if args.dry_run else operation.real:
            if args.cases not in case.name:
                continue
            if args.seconds and time.perf_counter() - began > args.seconds:
                skipped += 1
                continue
            rows.append(attempted(operation, case, device, limits, args.flashinfer))
    return {
        "benchmark": "kernels",
        "dry_run": args.dry_run,
        "ceilings": _ceilings(limits),
        "launch_us": round(1e6 * launch, 3),
        "rows": rows,
        "skipped_for_time": skipped,
    } | provenance(device, "mixed")


def _ceilings(limits: Ceilings) -> dict[str, Any]:
    return {
        "bytes_per_second": round(limits.bandwidth),
        "flops": round(limits.flops),
        "flops_fp8": round(limits.flops_fp8),
        "source": limits.source,
    }


_COLUMNS = (
    "operation",
    "case",
    "floor_us",
    "us",
    "pdl_us",
    "bandwidth_share",
    "floor_share",
    "torch_us",
    "flashinfer_us",
    "error",
)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    Console(highlight=False, stderr=True, width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
