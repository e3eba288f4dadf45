"""Acceptance as a walk with the finger: start at the root, follow the child that bears the chosen token.

Written from SPECULATION.md section 2 alone. One tree at a time, plain Python, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence


def walk(tokens: Sequence[int], parents: Sequence[int], choice: Sequence[int]) -> tuple[list[int], int]:
    """The accepted nodes (root first) and the bonus token.

    tokens[i], parents[i]: the tree, node 0 the root; a node past 0 with parent -1 is padding.
    choice[i]: the target's own token after node i.
    """
    path = [0]
    while True:
        here = path[-1]
        children = [node for node in range(1, len(tokens)) if parents[node] == here]
        matches = [node for node in children if tokens[node] == choice[here]]
        if not matches:
            return path, choice[here]
        assert len(matches) == 1, f"siblings {matches} bear the same token {choice[here]}"
        path.append(matches[0])


def all_parents(num_nodes: int) -> list[list[int]]:
    """Every tree shape of ``num_nodes`` nodes with parents before children: (num_nodes - 1)! of them."""
    shapes = [[-1]]
    for node in range(1, num_nodes):
        shapes = [[*shape, parent] for shape in shapes for parent in range(node)]
    return shapes
