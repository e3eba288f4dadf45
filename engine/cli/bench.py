"""``haast bench BENCHMARK ...``: a benchmark is a module of its own and looks like a verb.

Each has ``ABOUT``, ``add_arguments`` and ``run``, and prints one JSON object as the last line of stdout.
"""

from __future__ import annotations

import argparse
from typing import Final, Protocol

from engine.cli import bench_latency, bench_serve, bench_spec


class Benchmark(Protocol):
    """What a benchmark's module offers. ABOUT: one line for the help."""

    ABOUT: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


BENCHMARKS: Final[dict[str, Benchmark]] = {"latency": bench_latency, "spec": bench_spec, "serve": bench_serve}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their flags."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        about = benchmark.ABOUT
        benchmark.add_arguments(benchmarks.add_parser(name, help=about, description=about + "."))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that the flags name. Raises EngineError."""
    return BENCHMARKS[args.benchmark].run(args)
