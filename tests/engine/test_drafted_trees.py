"""What a head drafts, node by node, against the head computed from scratch along every node's path.

Tokens cannot show a mistake here: a wrong draft only costs acceptance. So every raw score, rank and value of
every drafted node is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from draft.head import FeatureDraft
from engine.core import Batch, DraftTree, SamplingParams, Speculation
from engine.roles import DraftMask
from kernels import gumbel_noise
from tests.engine.rig import FEATURE_LAYERS, PLAIN, TREE, Model, make_engine, prompts_of, random_model, record
from tests.engine.state import eagle_rows
from tests.oracles import eagle3, sampler
from tests.oracles.attention import ancestors_of
from tests.oracles.llama import forward


@dataclass(frozen=True)
class Drafted:
    """One sequence's tree, and what it was drafted from."""

    tokens: list[int]
    params: SamplingParams
    speculation: Speculation
    nodes: list[int]
    parents: list[int]
    raw: list[float]
    rank: list[int]


def watch(draft: FeatureDraft, kept: list[Drafted]) -> None:
    """Keep every tree that ``propose`` returns; values are checked at once, as the calibration moves on."""
    propose: Callable[[Batch, DraftMask | None], DraftTree] = draft.propose

    def watched(batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        tree = propose(batch, mask)
        if tree.scores is None:
            return tree
        for row, seq in enumerate(batch.seqs):
            count = int(tree.real()[row].sum())
            parents, raw = tree.parents[row, :count].tolist(), tree.scores.raw[row, :count].tolist()
            rank = tree.scores.rank[row, :count].tolist()
            kept.append(
                Drafted(
                    list(seq.tokens),
                    seq.request.sampling,
                    batch.speculation[row],
                    tree.tokens[row, :count].tolist(),
                    parents,
                    raw,
                    rank,
                )
            )
            depths = tree.depths()[row].tolist()
            sampled = torch.tensor([seq.request.sampling.temperature > 0])
            for node in range(1, count):
                scores = torch.zeros(1, 1, rank[node] + 1)
                scores[..., -1] = raw[node]
                worth = float(draft.calibration(scores, depths[node], sampled)[0, 0, -1])
                parent_value = float(tree.scores.value[row, parents[node]])
                assert float(tree.scores.value[row, node]) == pytest.approx(worth * parent_value, rel=1e-5)
        return tree

    draft.propose = watched  # type: ignore[method-assign]


def offered(model: Model, draft: str, drafted: Drafted, path: list[int]) -> sampler.Row:
    """[V] scores after a path of drafted tokens, 0 where the head cannot name a token. From scratch."""
    seen = forward(model.config, model.weights, drafted.tokens)
    logits = np.full(model.config.vocab_size, -np.inf)
    if draft == "eagle3":
        features = torch.cat([seen.inputs[layer] for layer in FEATURE_LAYERS], dim=-1)
        rows = eagle3.path_rows(
            model.eagle3_config,
            model.eagle3,
            model.weights["model.embed_tokens.weight"],
            drafted.tokens,
            features,
            path,
        )
        logits[eagle3.to_target(range(len(model.eagle3["d2t"])), model.eagle3["d2t"])] = rows.logits[
            -1
        ].numpy()
    else:
        features = seen.post_norm[:-1]
        tokens = list(drafted.tokens[1:])
        rows, _, _ = eagle_rows(model.eagle_config, model.eagle, model, tokens, features)
        for token in path:
            tokens.append(token)
            features = torch.cat((features, rows.hidden[-1:]))
            rows, _, _ = eagle_rows(model.eagle_config, model.eagle, model, tokens, features)
        logits = rows.logits[-1].double().numpy()
    params = drafted.params
    if params.temperature == 0:
        return sampler.softmax(logits)
    named = np.isfinite(logits)
    logits[named] = sampler.process(
        logits[named], params.temperature, params.top_k, params.top_p, params.min_p
    )
    position = len(drafted.tokens) + len(path)
    noise = gumbel_noise(torch.tensor([params.seed]), torch.tensor([[position]]), torch.arange(len(logits)))
    return sampler.softmax(logits + noise[0, 0].double().numpy())


def check_trees(model: Model, draft: str, kept: list[Drafted]) -> int:
    """Compare raw scores and ranks of all nodes; returns how many there were."""
    count = 0
    assert kept
    for drafted in kept:
        assert drafted.nodes[0] == drafted.tokens[-1]
        assert len(drafted.nodes) <= drafted.speculation.nodes
        scores: dict[int, sampler.Row] = {}
        for node in range(1, len(drafted.nodes)):
            parent = drafted.parents[node]
            if parent not in scores:
                path = [drafted.nodes[i] for i in ancestors_of(drafted.parents, parent)[1:]]
                assert len(path) < drafted.speculation.depth
                scores[parent] = offered(model, draft, drafted, path)
            row = scores[parent]
            assert drafted.raw[node] == pytest.approx(row[drafted.nodes[node]], rel=1e-3, abs=1e-6)
            assert (
                drafted.rank[node] == int((row > row[drafted.nodes[node]]).sum()) < drafted.speculation.top_k
            )
            count += 1
    return count


def run(
    draft: str, params: list[SamplingParams], specs: list[Speculation | None], page_size: int, step: int
) -> int:
    """Generate as one batch and check every step-th tree."""
    model = random_model(6, norm=True, eagle_layers=2)
    prompts = prompts_of([4, 11, 2, 7][: len(params)], seed=5)
    engine = make_engine(model, draft, page_size=page_size, num_pages=600 // page_size)
    assert isinstance(engine.draft, FeatureDraft)
    kept: list[Drafted] = []
    watch(engine.draft, kept)
    record(engine, prompts, params, specs)
    return check_trees(model, draft, kept[::step])


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_node_of_one_request(draft: str, temperature: float) -> None:
    params = [SamplingParams(temperature=temperature, seed=3, max_tokens=12, min_p=0.01)]
    assert run(draft, params, [TREE], 4, 2) > 15


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_every_node_of_a_batch(draft: str) -> None:
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=9, top_k=(0, 30, 0, 0)[i])
        for i, t in enumerate((0.0, 1.0, 0.6, 0.0))
    ]
    assert run(draft, params, [TREE] * 4, 4, 5) > 15


@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_a_small_tree_beside_a_large_one(page_size: int) -> None:
    """The rows of a small tree must not leave its own pages because a neighbour drafts more at each level."""
    params = [SamplingParams(temperature=0, max_tokens=9) for _ in range(4)]
    specs = [Speculation(4, 3, 1), Speculation(12, 4, 6), PLAIN, Speculation(5, 4, 2)]
    assert run("eagle", params, list(specs), page_size, 2) > 15


def test_the_oracle_sees_a_wrong_score() -> None:
    model = random_model(6, norm=True, eagle_layers=2)
    engine = make_engine(model, "eagle")
    assert isinstance(engine.draft, FeatureDraft)
    kept: list[Drafted] = []
    watch(engine.draft, kept)
    record(engine, prompts_of([6]), [SamplingParams(temperature=0, max_tokens=6)])
    check_trees(model, "eagle", kept[:1])
    wrong = dataclasses.replace(kept[0], tokens=[kept[0].tokens[0] ^ 1, *kept[0].tokens[1:]])
    with pytest.raises(AssertionError):
        check_trees(model, "eagle", [wrong])
