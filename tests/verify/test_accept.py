"""``accept`` against a walk with the finger: exhaustively on small trees, by chance on large ones."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import DraftTree, PromptChunk
from tests.oracles.accept import all_parents, walk
from verify.accept import accept, accept_all, accept_on_device

Tree = tuple[list[int], list[int]]  # tokens, parents


def siblings_distinct(tokens: tuple[int, ...], parents: list[int]) -> bool:
    edges = [(parent, token) for parent, token in zip(parents[1:], tokens, strict=True)]
    return len(set(edges)) == len(edges)


def trees(num_nodes: int, alphabet: int) -> list[Tree]:
    """Every tree of a size over an alphabet; the root's token never matters."""
    return [
        ([0, *tokens], parents)
        for parents in all_parents(num_nodes)
        for tokens in itertools.product(range(alphabet), repeat=num_nodes - 1)
        if siblings_distinct(tokens, parents)
    ]


def compare(cases: list[tuple[Tree, list[int]]]) -> None:
    """One batch, padded to the largest tree, and each tree alone, against the walk."""
    width = max(len(tokens) for (tokens, _), _ in cases)
    tree = DraftTree(
        torch.tensor([tokens + [0] * (width - len(tokens)) for (tokens, _), _ in cases]),
        torch.tensor([parents + [-1] * (width - len(parents)) for (_, parents), _ in cases]),
    )
    choice = torch.tensor([chosen + [0] * (width - len(chosen)) for _, chosen in cases])
    verdict, in_tensors = accept(tree, choice), accept_on_device(tree, choice)
    assert verdict.path.shape == tree.tokens.shape
    paths, lengths, bonuses = verdict.path.tolist(), verdict.length.tolist(), verdict.bonus.tolist()
    assert torch.equal(in_tensors.path, verdict.path)
    assert torch.equal(in_tensors.length, verdict.length)
    assert torch.equal(in_tensors.bonus, verdict.bonus)
    for row, ((tokens, parents), chosen) in enumerate(cases):
        path, bonus = walk(tokens, parents, chosen)
        assert lengths[row] == len(path)
        assert paths[row] == path + [-1] * (width - len(path)), (tokens, parents, chosen)
        assert bonuses[row] == bonus
        one = slice(row, row + 1)
        alone = accept(DraftTree(tree.tokens[one], tree.parents[one]), choice[one])
        assert (alone.path.tolist(), alone.length.tolist(), alone.bonus.tolist()) == (
            [paths[row]],
            [lengths[row]],
            [bonus],
        )


@pytest.mark.parametrize(("num_nodes", "alphabet"), [(1, 3), (2, 3), (3, 3), (4, 3), (5, 2)])
def test_all_small_trees(num_nodes: int, alphabet: int) -> None:
    compare(
        [
            (tree, list(choice))
            for tree in trees(num_nodes, alphabet)
            for choice in itertools.product(range(alphabet), repeat=num_nodes)
        ]
    )


def test_all_shapes_of_five_nodes_over_three_tokens() -> None:
    """Too many choices to take all: eight for each tree."""
    draw = random.Random(0)
    compare([(tree, [draw.randrange(3) for _ in range(5)]) for tree in trees(5, 3) for _ in range(8)])


def test_ragged_batches() -> None:
    draw = random.Random(1)
    small = [tree for size in (1, 2, 3, 4) for tree in trees(size, 3)]
    for _ in range(50):
        batch = draw.sample(small, 9)
        compare([(tree, [draw.randrange(3) for _ in tree[0]]) for tree in batch])


@st.composite
def large_tree(draw: st.DrawFn) -> tuple[Tree, list[int]]:
    """A tree of up to 40 nodes; choices mostly name a child, so that paths get long."""
    size = draw(st.integers(1, 40))
    parents = [-1] + [
        draw(st.integers(max(0, node - draw(st.integers(1, node))), node - 1)) for node in range(1, size)
    ]
    rank = [sum(parents[other] == parents[node] for other in range(node)) for node in range(size)]
    base = draw(st.integers(0, 1000))
    choice = [base + draw(st.integers(-1, 3)) for _ in range(size)]
    return ([base + r for r in rank], parents), choice


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(large_tree(), min_size=1, max_size=5))
def test_large_trees(cases: list[tuple[Tree, list[int]]]) -> None:
    compare(cases)


def test_the_example_of_the_docstring() -> None:
    the, cat, dog, sat, ran, down = range(6)
    tree = DraftTree(torch.tensor([[the, cat, dog, sat]]), torch.tensor([[-1, 0, 0, 1]]))
    verdict = accept(tree, torch.tensor([[cat, sat, ran, down]]))
    assert verdict.path.tolist() == [[0, 1, 3, -1]]
    assert verdict.length.tolist() == [3]
    assert verdict.bonus.tolist() == [down]


def test_accept_all() -> None:
    chunk = PromptChunk(
        torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]]),
        torch.tensor([3, 1, 2]),
        torch.tensor([-1, -1, 9]),
        (3, 1, 2),
    )
    verdict = accept_all(chunk, torch.tensor([[70], [71], [72]]))
    assert verdict.path.tolist() == [[0, 1, 2], [0, -1, -1], [0, 1, -1]]
    assert verdict.length.tolist() == [3, 1, 2]
    assert verdict.bonus.tolist() == [70, 71, 9]
