"""Pictures: how TTFT and TPOT of a serving benchmark are distributed, and how they went over the run.

matplotlib is in the extra ``perf`` and is imported only here, when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ConfigError
from perf.load import Trace

_ROWS: tuple[tuple[str, Callable[[Trace], float | None]], ...] = (
    ("TTFT", lambda trace: trace.ttft),
    ("TPOT", lambda trace: trace.tpot),
)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure; sizes in inches. Raises ConfigError if there is nothing to draw with."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'haast[perf]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG. Raises ConfigError if the file cannot be written."""
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error.strerror})") from error


def plot(path: Path, runs: Mapping[str, Sequence[Trace]], title: str) -> None:
    """Write a PNG with one colour per run, named by its key.

    Left the share of requests that were at least that fast, right each request at the time it was sent;
    failed requests are crosses at the bottom. Raises ConfigError as ``new_figure`` and ``save`` do.
    """
    figure = new_figure(11, 7)
    figure.suptitle(title)
    panels = figure.subplots(len(_ROWS), 2, squeeze=False)
    for (name, value), (left, right) in zip(_ROWS, panels, strict=True):
        for number, (label, traces) in enumerate(runs.items()):
            _draw(left, right, value, traces, label, f"C{number}")
        left.set(xlabel=f"{name} (ms)", ylabel="share of requests", ylim=(0, 1))
        right.set(xlabel="sent after (s)", ylabel=f"{name} (ms)", ylim=(0, None))
        for panel in (left, right):
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left")
    save(figure, path)


def _draw(
    left: Any,
    right: Any,
    value: Callable[[Trace], float | None],
    traces: Sequence[Trace],
    label: str,
    colour: str,
) -> None:
    start = min((trace.sent for trace in traces), default=0.0)
    points = [
        (trace.sent - start, 1e3 * found)
        for trace in traces
        if trace.error is None and (found := value(trace)) is not None
    ]
    failed = [trace.sent - start for trace in traces if trace.error is not None]
    if points:
        sent, found = np.array(points).T
        left.step(np.sort(found), np.arange(1, len(found) + 1) / len(found), color=colour, label=label)
        right.plot(sent, found, ".", color=colour)
    height = right.get_xaxis_transform()  # seconds across, a share of the panel upwards
    right.plot(failed, np.full(len(failed), 0.03), "x", color=colour, transform=height)
