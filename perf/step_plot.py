"""Results of ``haast bench latency --load-format dummy`` as a table and a picture for readers.

``python -m perf.step_plot RESULT.json .. [--png FILE]`` prints a Markdown table: a line for each size of a
tree of one sequence behind the shortest context, a group of columns for each result. The picture has a panel
for each result: milliseconds of the forward against nodes, for tokens that choose their experts independently
and for alike ones, and beneath each the least that reading takes on that device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from engine.errors import ConfigError, EngineError
from perf.plot import new_figure, save
from perf.step_costs import ALIKE, UNIFORM

_COLOURS: Final = {UNIFORM: "C0", ALIKE: "C1"}

_COLUMNS: Final = ("step ms", "verify ms (share of the floor)", "draft ms")

Result = Mapping[str, Any]


def read_result(path: Path) -> Result:
    """A result as the bench wrote it. Raises ConfigError for a file that is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(result, dict) or result.get("benchmark") != "steps":
        raise ConfigError(f"{path}: found no result of the bench of steps, expected its --json FILE")
    return result


def trees(result: Result, routing: str) -> list[Result]:
    """Rows of one sequence behind the shortest context, by nodes."""
    alone = [row for row in result["steps"] if row["batch"] == 1 and row["routing"] == routing]
    nearest = min((row["context"] for row in alone), default=0)
    return sorted((row for row in alone if row["context"] == nearest), key=lambda row: int(row["nodes"]))


def name_of(result: Result) -> str:
    """Device and encoding, and the layers where there are fewer than the model has."""
    return f"{result['device']}, {result['quantization'] or result['dtype']}, {result['num_layers']} layers"


def markdown(results: Sequence[Result]) -> str:
    """The table: step, forward and drafting in milliseconds, and the forward's share of its floor's speed."""
    by_nodes = [{row["nodes"]: row for row in trees(result, UNIFORM)} for result in results]
    titles = [f"{name_of(result)}: {what}" for result in results for what in _COLUMNS]
    lines = ["| nodes | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for nodes in sorted({nodes for rows in by_nodes for nodes in rows}):
        cells = [cell for rows in by_nodes for cell in _cells(rows.get(nodes))]
        lines.append(f"| {nodes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: Result | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    draft = f"{row['draft_ms']:.2f}" if row["nodes"] > 1 else ""
    return [f"{row['step_ms']:.2f}", f"{row['verify_ms']:.2f} ({row['floor_share']:.0%})", draft]


def draw(results: Sequence[Result]) -> Any:
    """The picture, a matplotlib Figure. Raises ConfigError if there is nothing to draw with."""
    figure = new_figure(5.5 * len(results), 4)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, result in zip(panels, results, strict=True):
        for routing, colour in _COLOURS.items():
            rows = trees(result, routing)
            nodes = [row["nodes"] for row in rows]
            if nodes:
                panel.plot(nodes, [row["verify_ms"] for row in rows], "o-", color=colour, label=routing)
                panel.plot(
                    nodes, [row["floor_ms"] for row in rows], "--", color=colour, label=f"{routing}, floor"
                )
        panel.set(title=name_of(result), xlabel="nodes of the tree", ylabel="forward (ms)", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, draw if asked to. Returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m perf.step_plot", description=about)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--png", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        results = [read_result(path) for path in args.results]
        sys.stdout.write(markdown(results) + "\n")
        if args.png is not None:
            save(draw(results), args.png)
    except EngineError as error:
        sys.stderr.write(f"step_plot: error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
