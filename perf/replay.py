"""What other trees would have been worth, from a log of the trees that were drafted.

    haast serve --spec-log steps.jsonl --spec-nodes 32 --spec-depth 8 --spec-top-k 4
    python -m perf.replay steps.jsonl --plot reliability.png

A logged step knows its whole tree, the scores of every node and the accepted path. From that, one kind of
question can be answered exactly: what would a *sub-tree* (closed under parents) of the logged tree have
emitted? The target's choice after a node does not depend on which other nodes were scored, so the accepted
path of the sub-tree is the part of the logged path that lies inside it. Nothing can be said about nodes that
were not drafted, so log with a generous tree.

For every size N three sub-trees are compared: the *chain* of first-ranked children, the best N nodes by the
product of raw scores, and the best N by calibrated value. All three are taken from the same steps: those
whose tree has at least N nodes and a chain of N. A step that cannot answer is left out whatever its outcome
was, else the result would be biased, and the share of steps that could answer is printed. "Best by raw
score" means best within the logged tree, which was itself grown by calibrated value.

What the steps cost, predicted against measured, is ``perf/token_cost.py``'s part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.errors import ConfigError
from perf import document
from perf.plot import new_figure, save
from perf.step_log import read_records
from perf.token_cost import read_costs, time_per_token

SIZES = (1, 2, 3, 4, 6, 8, 16, 32)
NUM_BUCKETS = 10


@dataclass(frozen=True, slots=True)
class Step:
    """One logged tree; lists are per node, the root first. ``value`` and ``raw`` of the root are 1."""

    parents: tuple[int, ...]
    rank: tuple[int, ...]
    raw: tuple[float, ...]  # conditional score of the node under its parent
    value: tuple[float, ...]  # product of calibrated conditional acceptances along the path
    accepted: frozenset[int]  # accepted nodes without the root
    greedy: bool

    def path(self, node: int) -> list[int]:
        """The node and its ancestors without the root, deepest first."""
        found = []
        while node > 0:
            found.append(node)
            node = self.parents[node]
        return found

    def raw_value(self, node: int) -> float:
        """Product of raw scores along the path."""
        return prod(self.raw[i] for i in self.path(node))


def read_log(path: Path) -> tuple[list[Step], int]:
    """(steps that drafted, number of steps that did not). Raises ConfigError with the line number."""
    found = read_records(path, _step)
    steps = [step for step in found if step is not None]
    return steps, len(found) - len(steps)


def _step(record: dict[str, Any]) -> Step | None:
    """The step of a record, None if it drafted nothing that has scores. Raises ValueError."""
    if len(record["parents"]) <= 1 or "raw" not in record:
        return None
    parents = tuple(int(parent) for parent in record["parents"])
    step = Step(
        parents,
        tuple(record["rank"]),
        tuple(record["raw"]),
        tuple(record["value"]),
        frozenset(record["accepted"]),
        record["temperature"] == 0,
    )
    if not len(parents) == len(step.rank) == len(step.raw) == len(step.value):
        raise ValueError("parents, rank, raw and value differ in length")
    if parents[0] != -1 or not all(0 <= parent < node for node, parent in enumerate(parents) if node):
        raise ValueError(f"parents {parents} are not a tree")
    reachable = step.accepted | {0}
    if not all(0 < node < len(parents) and parents[node] in reachable for node in step.accepted):
        raise ValueError(f"accepted {sorted(step.accepted)} is not a path")
    return _drafted_part(step)


def _drafted_part(step: Step) -> Step:
    """The step without nodes that prompt lookup added: they and all their descendants have no score."""
    kept = [node for node, raw in enumerate(step.raw) if raw > 0]
    place = {node: index for index, node in enumerate(kept)}
    return Step(
        tuple(-1 if node == 0 else place[step.parents[node]] for node in kept),
        tuple(step.rank[node] for node in kept),
        tuple(step.raw[node] for node in kept),
        tuple(step.value[node] for node in kept),
        frozenset(place[node] for node in step.accepted if node in place),
        step.greedy,
    )


# --- sub-trees ------------------------------------------------------------------------------------------


def chain(step: Step, num_nodes: int) -> list[int] | None:
    """First-ranked children down from the root, ``num_nodes`` in all; None if the log ends before."""
    found = [0]
    while len(found) < num_nodes:
        best = [
            node for node, parent in enumerate(step.parents) if parent == found[-1] and step.rank[node] == 0
        ]
        if not best:
            return None
        found.append(best[0])
    return found


def best_by(step: Step, num_nodes: int, score: Callable[[int], float]) -> list[int] | None:
    """The best nodes by a path score that never exceeds the parent's; ties go to the earlier node."""
    if len(step.parents) < num_nodes:
        return None
    return [0, *sorted(range(1, len(step.parents)), key=lambda node: (-score(node), node))[: num_nodes - 1]]


def emitted(step: Step, nodes: Iterable[int]) -> int:
    """Tokens that the sub-tree would have emitted: its accepted nodes and the bonus."""
    return 1 + len(step.accepted.intersection(nodes))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Acceptance lengths of the three policies at one size, over the steps that could answer."""

    nodes: int
    num_steps: int
    share: float  # of all logged steps
    observed: dict[str, float]  # policy -> mean tokens per step
    expected: dict[str, float]  # policy -> what calibrated values promised
    expected_raw: dict[str, float]  # policy -> what raw scores promised


def compare(steps: Sequence[Step], num_nodes: int) -> Comparison | None:
    """Chain, raw-score tree and calibrated tree of one size; None if no step can answer."""
    observed, expected, expected_raw = ({"chain": 0.0, "raw": 0.0, "calibrated": 0.0} for _ in range(3))
    count = 0
    for step in steps:
        trees = {
            "chain": chain(step, num_nodes),
            "raw": best_by(step, num_nodes, step.raw_value),
            "calibrated": best_by(step, num_nodes, step.value.__getitem__),
        }
        if trees["chain"] is None or trees["raw"] is None:
            continue
        count += 1
        for policy, nodes in trees.items():
            assert nodes is not None
            observed[policy] += emitted(step, nodes)
            expected[policy] += sum(step.value[node] for node in nodes)
            expected_raw[policy] += sum(step.raw_value(node) for node in nodes)
    if not count:
        return None
    means = [
        {policy: round(total / count, 4) for policy, total in sums.items()}
        for sums in (observed, expected, expected_raw)
    ]
    return Comparison(num_nodes, count, round(count / len(steps), 4), *means)


# --- reliability ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """Nodes whose score falls into one tenth of [0, 1], of those whose parent was accepted."""

    low: float
    count: int
    mean_score: float
    acceptance: float


def reliability(steps: Iterable[Step], calibrated: bool) -> tuple[list[Bucket], float]:
    """(buckets, expected calibration error) of the conditional scores, raw or calibrated.

    Only nodes with an accepted parent count: elsewhere nobody knows what the target would have chosen.
    """
    pairs = []
    for step in steps:
        for node in range(1, len(step.parents)):
            parent = step.parents[node]
            if parent and parent not in step.accepted:
                continue
            if calibrated and not step.value[parent]:
                continue  # the log rounds; a path this unlikely has no conditional score left
            score = step.value[node] / step.value[parent] if calibrated else step.raw[node]
            pairs.append((min(score, 1.0), node in step.accepted))
    buckets, error = [], 0.0
    for number in range(NUM_BUCKETS):
        inside = [pair for pair in pairs if min(int(pair[0] * NUM_BUCKETS), NUM_BUCKETS - 1) == number]
        if inside:
            mean_score = sum(score for score, _ in inside) / len(inside)
            acceptance = sum(accepted for _, accepted in inside) / len(inside)
            buckets.append(
                Bucket(number / NUM_BUCKETS, len(inside), round(mean_score, 4), round(acceptance, 4))
            )
            error += abs(mean_score - acceptance) * len(inside) / len(pairs)
    return buckets, round(error, 4)


# --- report ---------------------------------------------------------------------------------------------


def report(steps: Sequence[Step], undrafted: int) -> dict[str, Any]:
    """Everything the log can answer, as one JSON-ready object."""
    sizes = [found for size in SIZES if (found := compare(steps, size)) is not None]
    result: dict[str, Any] = {
        "num_steps": len(steps),
        "num_steps_without_draft": undrafted,
        "acceptance_length": round(sum(emitted(s, s.accepted) for s in steps) / len(steps), 4),
        "mean_nodes": round(sum(len(s.parents) for s in steps) / len(steps), 2),
        "sizes": [
            {
                "nodes": c.nodes,
                "num_steps": c.num_steps,
                "share": c.share,
                "observed": c.observed,
                "expected": c.expected,
                "expected_raw": c.expected_raw,
            }
            for c in sizes
        ],
        # expected: holds by construction unless values grow along a path; observed: the real question
        "tree_not_below_chain_expected": _not_below([c.expected for c in sizes]),
        "tree_not_below_chain_observed": _not_below([c.observed for c in sizes]),
    }
    for name, wanted in (("greedy", True), ("sampled", False)):
        group = [step for step in steps if step.greedy == wanted]
        if group:
            for kind in ("raw", "calibrated"):
                buckets, error = reliability(group, kind == "calibrated")
                result[f"reliability_{name}_{kind}"] = {
                    "error": error,
                    "buckets": [[b.low, b.count, b.mean_score, b.acceptance] for b in buckets],
                }
    return result


def _not_below(lengths: Sequence[dict[str, float]]) -> bool:
    return all(of["calibrated"] >= of["chain"] - 1e-4 for of in lengths)


def show(result: dict[str, Any], console: Console) -> None:
    """The tables."""
    table = Table(title="tokens per step: observed (expected from values)")
    for title in ("nodes", "steps", "share", "chain", "raw tree", "calibrated tree"):
        table.add_column(title, justify="right")
    for row in result["sizes"]:
        cells = [
            f"{row['observed'][policy]:.3f} ({row['expected'][policy]:.3f})"
            for policy in ("chain", "raw", "calibrated")
        ]
        table.add_row(str(row["nodes"]), str(row["num_steps"]), f"{row['share']:.0%}", *cells)
    console.print(table)
    for key, value in result.items():
        if not key.startswith("reliability_"):
            continue
        name = key.removeprefix("reliability_").replace("_", ", ")
        table = Table(title=f"conditional scores: {name}; mean error {value['error']:.3f}")
        for title in ("score from", "nodes", "mean score", "accepted"):
            table.add_column(title, justify="right")
        for low, count, mean_score, acceptance in value["buckets"]:
            table.add_row(f"{low:.1f}", str(count), f"{mean_score:.3f}", f"{acceptance:.3f}")
        console.print(table)
    table = Table(title="ms per token: predicted from values and step times, and measured")
    for title in ("nodes scored up to", "steps", "requests", "step ms", "tokens (promised)", "measured"):
        table.add_column(title, justify="right")
    table.add_column("predicted", justify="right")
    for row in result["time_per_token"]:
        table.add_row(
            str(row["nodes_up_to"] or "more"),
            str(row["num_steps"]),
            f"{row['mean_seqs']:.1f}",
            f"{row['step_ms']:.2f}",
            f"{row['tokens_emitted']:.2f} ({row['tokens_promised']:.2f})",
            f"{row['measured_ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
        )
    console.print(table)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the reliability diagrams, one for each kind of decoding in the log, as a PNG.

    Raises ConfigError without matplotlib, or if the file cannot be written.
    """
    modes = [mode for mode in ("greedy", "sampled") if f"reliability_{mode}_raw" in result]
    figure = new_figure(5 * len(modes), 5)
    for place, mode in enumerate(modes, start=1):
        axes = figure.add_subplot(1, len(modes), place, title=mode, xlim=(0, 1), ylim=(0, 1))
        axes.set(xlabel="conditional score", ylabel="share accepted", aspect="equal")
        axes.plot((0, 1), (0, 1), color="0.7", linewidth=1)
        for kind, marker in (("raw", "s"), ("calibrated", "o")):
            found = result[f"reliability_{mode}_{kind}"]
            scores, shares = [row[2] for row in found["buckets"]], [row[3] for row in found["buckets"]]
            axes.plot(scores, shares, marker=marker, label=f"{kind}, mean error {found['error']:.3f}")
        axes.legend()
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Read a log, print tables, end with one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m perf.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("log", type=Path, help="a file written by --spec-log")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the reliability diagrams")
    args = parser.parse_args(argv)
    try:
        steps, undrafted = read_log(args.log)
        if not steps:
            raise ConfigError(f"log {args.log}: no step drafted anything ({undrafted} plain steps)")
        result = report(steps, undrafted) | {"time_per_token": time_per_token(read_costs(args.log))}
        if args.plot is not None:
            plot(result, args.plot)
    except ConfigError as error:
        sys.stderr.write(f"replay: error: {error}\n")
        return 1
    show(result, Console())
    document.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
