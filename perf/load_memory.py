"""How much host memory does loading take: ``python -m perf.load_memory DIR ... [--json FILE]``.

Each checkpoint is opened and loaded by a process of its own, through the same ``open_model(...).load`` as a
server. The promise: besides its result, loading holds less than the largest file plus 1 GB (10^9 bytes).

- Peak memory is the kernel's ``VmHWM``, of everything the process has resident, the interpreter and torch
  included; it misses nothing. What of it was anonymous and what pages of files is sampled every few
  milliseconds beside the load, for explanation.
- On a GPU the result lies in the device's memory, so all of the peak counts. On a CPU the result lies in host
  memory itself, so its bytes are subtracted: what remains is what a GPU's host would need.
- Seconds are those of ``load`` alone, with files in the page cache or not, as it happened to be: compare them
  only where the machine had nothing else to do. ``cpu_seconds`` is what the process computed and copied.

Exit code 1 if the promise is broken. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.checkpoint import open_model
from engine.cli.options import device_name
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.nn.weight import Weight
from perf import document
from perf.provenance import ROOT, provenance

SPARE_BYTES: Final = 10**9
DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_STATUS: Final = Path("/proc/self/status")
_INTERVAL_S: Final = 0.02


def memory(status: str) -> dict[str, int]:
    """Bytes by name (VmHWM, RssAnon, RssFile, ...) from the text of /proc/PID/status, which counts in kB.

    Raises ConfigError where the kernel does not tell the three.
    """
    found = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith(" kB"):
            found[name] = int(value.split()[0]) << 10
    for name in ("VmHWM", "RssAnon", "RssFile"):
        if name not in found:
            raise ConfigError(f"{_STATUS} has no {name}; memory is measured on Linux only")
    return found


class Sampler:
    """The largest RssAnon and RssFile while it is entered, read by a thread."""

    def __init__(self) -> None:
        self.anon_bytes = self.file_bytes = self.num_samples = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory")

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            now = memory(_STATUS.read_text())
            self.anon_bytes = max(self.anon_bytes, now["RssAnon"])
            self.file_bytes = max(self.file_bytes, now["RssFile"])
            self.num_samples += 1
            if self._done.wait(_INTERVAL_S):
                return


def weight_bytes(weights: Iterable[Weight]) -> int:
    """Of the tensors that loading delivered: codes, scales and plain ones."""
    parts: list[Tensor | None] = []
    for weight in weights:
        if isinstance(weight, Tensor):
            parts.append(weight)
        else:
            parts += [getattr(weight, part.name) for part in fields(weight)]
    return sum(part.nbytes for part in parts if part is not None)


def measure(directory: str, dtype: str, device: str) -> dict[str, Any]:
    """Load a checkpoint in this process and say what it took. Raises CheckpointError, ConfigError.

    Peaks are those of the process since it began, so call it in a fresh one.
    """
    checkpoint = open_model(directory)
    if device != "cpu":
        torch.zeros(1, device=device)  # the driver's own host memory is there before any weight is
    before = memory(_STATUS.read_text())
    started, started_cpu = time.perf_counter(), time.process_time()
    with Sampler() as sampler:
        weights: dict[str, Weight] = dict(checkpoint.load(DTYPES[dtype], device))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    peak_bytes = memory(_STATUS.read_text())["VmHWM"]
    files = sorted(checkpoint.path.glob("*.safetensors")) if checkpoint.path.is_dir() else [checkpoint.path]
    sizes = [file.stat().st_size for file in files]
    result_bytes = weight_bytes(weights.values())
    besides = peak_bytes - (result_bytes if device == "cpu" else 0)
    bound = max(sizes) + SPARE_BYTES
    return {
        "checkpoint": checkpoint.name,
        "format": type(checkpoint).__name__,
        "num_files": len(files),
        "file_bytes": sum(sizes),
        "largest_file_bytes": max(sizes),
        "weight_bytes": result_bytes,
        "before_bytes": before["RssAnon"] + before["RssFile"],
        "peak_bytes": peak_bytes,
        "peak_anonymous_bytes": sampler.anon_bytes,
        "peak_file_bytes": sampler.file_bytes,
        "num_samples": sampler.num_samples,
        "besides_weights_bytes": besides,
        "bound_bytes": bound,
        "holds": besides <= bound,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "gb_per_s": round(sum(sizes) / seconds / 1e9, 3),
    }


def in_fresh_process(directory: str, dtype: str, device: str) -> dict[str, Any]:
    """``measure`` by a new interpreter. Raises CheckpointError with what it said if it failed."""
    place = str(Path(directory).absolute()) if Path(directory).exists() else directory
    words = [sys.executable, "-m", "perf.load_memory", place, "--dtype", dtype, "--device", device]
    done = subprocess.run([*words, "--here"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"{directory}: not loaded: {said[-1]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON. Returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m perf.load_memory", description=about)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a checkpoint, as haast serve takes it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of plain weights")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    document.add_json_argument(parser)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        device = device_name(args.device)
        if args.here:
            document.write(measure(args.directories[0], args.dtype, device))
            return 0
        rows = [in_fresh_process(place, args.dtype, device) for place in args.directories]
    except EngineError as error:
        sys.stderr.write(f"load_memory: error: {error}\n")
        return 1
    result = {"benchmark": "load-memory", **provenance(device, args.dtype), "rows": rows}
    _show(rows)
    document.write(result, args.json)
    return 0 if all(row["holds"] for row in rows) else 1


def _show(rows: Sequence[dict[str, Any]]) -> None:
    keys = ("file_bytes", "weight_bytes", "peak_bytes", "besides_weights_bytes", "bound_bytes")
    table = Table("GB", *(key.removesuffix("_bytes").replace("_", " ") for key in keys), "holds", "s", "GB/s")
    for row in rows:
        sizes = (f"{row[key] / 1e9:.2f}" for key in keys)
        table.add_row(
            row["checkpoint"], *sizes, str(row["holds"]), f"{row['seconds']:.1f}", f"{row['gb_per_s']:.2f}"
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
