"""Growing trees: what is kept is the best of what was offered, and it is a tree."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import draft.tree
from draft.tree import Limits, Offers, graft, graft_on_device, grow, prune
from engine.core import DraftScores, DraftTree, Speculation
from tests.oracles.attention import ancestors_of

Path = tuple[int, ...]


@dataclass
class FakeHead:
    """Offers that are a function of (sequence, path) alone; keeps every candidate it offered.

    levels: raw scores are drawn from these numbers, so that a short list makes many ties.
    """

    num_seqs: int
    seed: int
    top_k: int
    levels: list[float] | None = None
    calibrate: bool = False
    frontier: list[list[Path]] = field(default_factory=list)
    offered: list[list[tuple[Path, float]]] = field(
        default_factory=list
    )  # path, path value; in order of creation
    values: list[dict[Path, float]] = field(default_factory=list)
    num_expands: int = 0

    def children(self, seq: int, path: Path) -> tuple[list[int], list[float]]:
        draw = random.Random(f"{self.seed} {seq} {path}")
        tokens = draw.sample(range(50), self.top_k)
        if self.levels is not None:
            raw = [draw.choice(self.levels) for _ in tokens]
        else:
            raw = torch.tensor([draw.gauss(0, 2) for _ in tokens]).softmax(0).tolist()
            if draw.random() < 0.1:
                raw[-1] = 0.0  # not possible
        return tokens, sorted(raw, reverse=True)

    def offers(self) -> Offers:
        both = [[self.children(seq, path) for path in paths] for seq, paths in enumerate(self.frontier)]
        return Offers(
            torch.tensor([[tokens for tokens, _ in row] for row in both]),
            torch.tensor([[raw for _, raw in row] for row in both], dtype=torch.float32),
        )

    def worth(self, raw: float, depth: int) -> float:
        return raw**0.5 * (0.9 if depth > 1 else 1.0) if self.calibrate else raw

    def value(self, raw: Tensor, depth: int) -> Tensor:
        return raw**0.5 * (0.9 if depth > 1 else 1.0) if self.calibrate else raw

    def remember(self, limits: list[Speculation], depth: int) -> None:
        """The candidates that the rules allow among the children of the current frontier."""
        for seq, paths in enumerate(self.frontier):
            for path in paths[: limits[seq].top_k]:  # a sequence's own beam, best first
                for rank, (token, raw) in enumerate(zip(*self.children(seq, path), strict=True)):
                    allowed = raw > 0 and rank < limits[seq].top_k and depth <= limits[seq].depth
                    parent = self.values[seq].get(path)
                    if not allowed or parent is None:
                        continue
                    worth = parent * self.worth(raw, depth)
                    self.offered[seq].append(((*path, token), worth))
                    self.values[seq][(*path, token)] = worth

    def grow(self, specs: list[Speculation]) -> DraftTree:
        self.frontier = [[()] for _ in specs]
        self.offered, self.values = [[] for _ in specs], [{(): 1.0} for _ in specs]
        first = self.offers()
        self.remember(specs, 1)

        def expand(tokens: Tensor, parents: Tensor, depth: int) -> Offers:
            self.num_expands += 1
            self.frontier = [
                [(*self.frontier[seq][parent], token) for token, parent in zip(t, p, strict=True)]
                for seq, (t, p) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True))
            ]
            assert {len(path) for paths in self.frontier for path in paths} == {depth}
            offers = self.offers()
            self.remember(specs, depth + 1)
            return offers

        root = torch.arange(100, 100 + self.num_seqs)
        return grow(root, first, Limits.of(specs, "cpu"), expand, self.value)


def paths_of(tree: DraftTree, row: int) -> list[Path]:
    """The path of each real node, in node order; checks that parents come first and padding last."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    real = tree.real()[row].tolist()
    assert real == sorted(real, reverse=True)
    paths: list[Path] = [()]
    for node in range(1, sum(real)):
        assert 0 <= parents[node] < node
        paths.append((*paths[parents[node]], tokens[node]))
    assert len(set(paths)) == len(paths), "siblings are distinct"
    return paths


SPECS = {
    "one": [Speculation(8, 4, 4)],
    "chain": [Speculation(6, 5, 1)],
    "pair": [Speculation(2, 1, 1)],
    "more nodes than candidates": [Speculation(30, 2, 3)],
    "ragged": [
        Speculation(8, 4, 4),
        Speculation(2, 1, 1),
        Speculation(5, 4, 1),
        Speculation(12, 2, 5),
        Speculation(9, 6, 2),
    ],
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("levels", [None, [0.5, 1.0], [0.25, 0.5]], ids=["smooth", "certain", "ties"])
@pytest.mark.parametrize("calibrate", [False, True], ids=["raw", "calibrated"])
def test_the_best_of_all_that_was_offered(name: str, levels: list[float] | None, calibrate: bool) -> None:
    specs = SPECS[name]
    for seed in range(12):
        head = FakeHead(len(specs), seed, 5, levels, calibrate)
        tree = head.grow(specs)
        assert tree.scores is not None
        for row, spec in enumerate(specs):
            paths = paths_of(tree, row)
            kept = paths[1:]
            assert int(tree.tokens[row, 0]) == 100 + row
            assert all(path[:-1] in paths for path in kept)  # ancestors come along
            assert len(kept) == min(spec.nodes - 1, len(head.offered[row]))
            assert max(map(len, paths)) <= spec.depth
            values = tree.scores.value[row].tolist()
            best = sorted((worth for _, worth in head.offered[row]), reverse=True)[: len(kept)]
            assert sorted(values[1 : len(paths)], reverse=True) == pytest.approx(best, rel=1e-5)
            for node, path in enumerate(kept, start=1):
                tokens, raw = head.children(row, path[:-1])
                rank = tokens.index(path[-1])
                assert rank < spec.top_k
                assert int(tree.scores.rank[row, node]) == rank
                assert float(tree.scores.raw[row, node]) == pytest.approx(raw[rank])
                assert values[node] == pytest.approx(head.values[row][path], rel=1e-5)
            assert values[0] == float(tree.scores.raw[row, 0]) == 1
            order = [head.offered[row].index((path, head.values[row][path])) for path in kept]
            assert order == sorted(order)


def test_no_connected_choice_is_better() -> None:
    """By trying every set of candidates that contains its own ancestors."""
    for seed in range(30):
        head = FakeHead(1, seed, 3, None, True)
        tree = head.grow([Speculation(5, 3, 3)])
        assert tree.scores is not None
        worth = dict(head.offered[0])
        best = max(
            sum(worth[path] for path in chosen)
            for chosen in itertools.combinations(worth, 4)
            if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
        )
        assert float(tree.scores.value[0, 1:].sum()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("levels", [None, [0.5, 1.0], [0.1, 0.9]], ids=["smooth", "certain", "steep"])
def test_stopping_early_changes_nothing(levels: list[float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = 0
    for seed, specs in itertools.product(range(15), SPECS.values()):
        early = FakeHead(len(specs), seed, 5, levels)
        tree = early.grow(specs)
        with monkeypatch.context() as patch:
            patch.setattr(draft.tree, "_is_settled", lambda *_: False)
            full = FakeHead(len(specs), seed, 5, levels)
            expected = full.grow(specs)
        saved += full.num_expands - early.num_expands
        for row in range(len(specs)):
            assert paths_of(tree, row) == paths_of(expected, row)
        assert tree.scores is not None
        assert expected.scores is not None
        torch.testing.assert_close(tree.scores.value, expected.scores.value)
    assert saved > 0


class FakeHeadView(FakeHead):
    """One sequence of a larger fake."""

    def __init__(self, row: int) -> None:
        super().__init__(1, 5, 5)
        self.row = row

    def children(self, seq: int, path: Path) -> tuple[list[int], list[float]]:
        return super().children(self.row, path)


def test_a_lone_tree_is_the_same_in_a_batch_of_equals() -> None:
    specs = [Speculation(8, 4, 3)] * 3
    together = FakeHead(3, 5, 5).grow(specs)
    for row in range(3):
        tree = DraftTree(together.tokens[row : row + 1], together.parents[row : row + 1], None)
        assert paths_of(tree, 0) == paths_of(FakeHeadView(row).grow([specs[0]]), 0)


def test_depths_and_ancestors_of_a_tree() -> None:
    """DraftTree's own derivations, padding included."""
    tree = DraftTree(
        torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[-1, 0, 0, 2, 3], [-1, 0, 1, -1, -1]])
    )
    assert tree.depths().tolist() == [[0, 1, 1, 2, 3], [0, 1, 2, 0, 0]]
    assert tree.real().tolist() == [[True] * 5, [True, True, True, False, False]]
    seen = [[row.nonzero()[:, 0].tolist() for row in one] for one in tree.ancestors()]
    assert seen == [[[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 3, 4]], [[0], [0, 1], [0, 1, 2], [3], [4]]]
    assert tree.parents.tolist()[0][0] == -1  # real() did not write into parents


@pytest.mark.parametrize("num_nodes", range(1, 36))
def test_depths_and_ancestors_equal_a_walk_to_the_root(num_nodes: int) -> None:
    """The longest chain of every size, where one squaring too few shows, and random trees with padding."""
    rows = [list(range(-1, num_nodes - 1))]
    for seed in range(8):
        source = random.Random(seed)
        real = source.randint(1, num_nodes)
        rows.append(
            [-1] + [source.randrange(max(0, i - 2), i) if i < real else -1 for i in range(1, num_nodes)]
        )
    tree = DraftTree(torch.zeros(len(rows), num_nodes, dtype=torch.int64), torch.tensor(rows))
    seen, depths = tree.ancestors(), tree.depths()
    for row, parents in enumerate(rows):
        for node in range(num_nodes):
            path = ancestors_of(parents, node)
            assert seen[row, node].nonzero()[:, 0].tolist() == path
            assert depths[row, node] == len(path) - 1


# --- grafting chains


def random_tree(draw: random.Random, num_seqs: int, num_nodes: int) -> DraftTree:
    """Trees with few tokens to choose from, some of them shorter than others."""
    tokens, parents = [], []
    for _ in range(num_seqs):
        own_tokens, own_parents = [draw.randrange(4)], [-1]
        taken: set[tuple[int, int]] = set()
        for node in range(1, num_nodes):
            parent, token = draw.randrange(node), draw.randrange(4)
            if parent < len(own_parents) and (parent, token) not in taken and draw.random() < 0.9:
                taken.add((parent, token))
                own_parents.append(parent)
                own_tokens.append(token)
        missing = num_nodes - len(own_tokens)
        tokens.append(own_tokens + [0] * missing)
        parents.append(own_parents + [-1] * missing)
    tree = DraftTree(torch.tensor(tokens), torch.tensor(parents))
    raw = torch.where(tree.real(), 0.5, 0.0)
    return DraftTree(tree.tokens, tree.parents, DraftScores(raw, raw, torch.ones_like(tree.tokens)))


def paths(tree: DraftTree, row: int) -> list[Path]:
    """The token path of every real node."""
    real, tokens, parents = tree.real()[row].tolist(), tree.tokens[row].tolist(), tree.parents[row].tolist()
    found: dict[int, Path] = {}
    for node, parent in enumerate(parents):
        if real[node]:
            assert parent < node
            found[node] = (found[parent] if parent >= 0 else ()) + (tokens[node],)
    return list(found.values())


def assert_equal_trees(wide: DraftTree, narrow: DraftTree) -> None:
    """wide: with more padding, perhaps, which says nothing but that it is padding."""
    assert wide.scores is not None
    assert narrow.scores is not None
    padded = narrow.resized(wide.tokens.shape[1])
    assert padded.scores is not None
    real = padded.real()
    assert torch.equal(wide.parents, padded.parents)
    pairs = [(wide.tokens, padded.tokens), (wide.scores.raw, padded.scores.raw)]
    pairs += [(wide.scores.value, padded.scores.value), (wide.scores.rank, padded.scores.rank)]
    for ours, theirs in pairs:
        assert torch.equal(ours[real], theirs[real])


@pytest.mark.parametrize("seed", range(60))
def test_a_grafted_tree_has_all_nodes_of_tree_and_chain_once(seed: int) -> None:
    draw = random.Random(seed)
    num_seqs, num_nodes = draw.randrange(1, 4), draw.randrange(1, 8)
    tree = random_tree(draw, num_seqs, num_nodes)
    chains = [[draw.randrange(4) for _ in range(draw.randrange(0, 6))] for _ in range(num_seqs)]
    longest = max(1, *map(len, chains))
    padded = torch.tensor([chain + [-1] * (longest - len(chain)) for chain in chains])
    grafted = graft(tree, padded)
    assert grafted.scores is not None
    assert_equal_trees(graft_on_device(tree, padded), grafted)
    for row, chain in enumerate(chains):
        root = int(tree.tokens[row, 0])
        whole = {(root, *chain[:length]) for length in range(len(chain) + 1)}
        before, after = paths(tree, row), paths(grafted, row)
        assert len(set(after)) == len(after), "siblings are distinct"
        assert set(after) == set(before) | whole
        own = [path for path in after if path not in before]
        real = grafted.real()[row]
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
        assert sorted(grafted.scores.raw[row][real].tolist()) == [0.0] * len(own) + [0.5] * len(before)
    assert grafted.real().any(0).all(), "a CPU scores no column of padding"


@pytest.mark.parametrize("seed", range(40))
def test_a_grafted_tree_is_pruned_to_its_best_nodes(seed: int) -> None:
    """Values by path: the tree's, the chain's chance, or the greater where both have the node; many ties."""
    draw = random.Random(seed)
    num_seqs, length = draw.randrange(1, 4), draw.randrange(1, 5)
    tree = random_tree(draw, num_seqs, draw.randrange(1, 8))
    assert tree.scores is not None
    values = torch.where(tree.real(), 0.5 ** tree.depths(), 0.0)
    tree = replace(tree, scores=replace(tree.scores, value=values))
    lengths = [draw.randrange(0, length + 1) for _ in range(num_seqs)]
    place = torch.arange(length)
    inside = place < torch.tensor(lengths)[:, None]
    chains = torch.where(inside, torch.tensor([[draw.randrange(4) for _ in place] for _ in lengths]), -1)
    chances = torch.where(inside, draw.choice((0.25, 0.5, 0.75, 1.0)) ** (place + 1), 0.0)
    grafted = graft(tree, chains, chances)
    assert_equal_trees(graft_on_device(tree, chains, chances), grafted)
    counts = [draw.randrange(0, 8) for _ in range(num_seqs)]
    pruned = prune(grafted, counts)
    assert pruned.scores is not None
    for row in range(num_seqs):
        expected = dict(zip(paths(tree, row), values[row][tree.real()[row]].tolist(), strict=True))
        for depth in range(1, lengths[row] + 1):
            path = (int(tree.tokens[row, 0]), *chains[row, :depth].tolist())
            expected[path] = max(expected.get(path, 0.0), float(chances[row, depth - 1]))
        whole, kept = paths(grafted, row), paths(pruned, row)
        assert grafted.scores is not None
        got = grafted.scores.value[row][grafted.real()[row]].tolist()
        assert dict(zip(whole, got, strict=True)) == pytest.approx(expected)
        best = sorted(whole[1:], key=lambda path: -expected[path])[: counts[row]]
        assert kept == [path for path in whole if path in {whole[0], *best}]
        real = pruned.real()[row]
        assert pruned.scores.value[row][real].tolist() == pytest.approx([expected[path] for path in kept])
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"


def test_a_chain_alone_needs_no_scores() -> None:
    roots = DraftTree(torch.tensor([[7], [8]]), torch.tensor([[-1], [-1]]))
    grafted = graft(roots, torch.tensor([[1, 2], [3, -1]]))
    assert grafted.scores is None
    assert grafted.tokens[:, :2].tolist() == [[7, 1], [8, 3]]
    assert grafted.parents.tolist() == [[-1, 0, 1], [-1, 0, -1]]
