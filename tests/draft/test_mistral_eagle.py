"""Mistral's Eagle head: its network alone, what it drafts, and the pair under both oracles."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import engine.models.decoder
from draft.head import FeatureDraft
from draft.mistral_eagle import MistralEagleModel
from engine.config import POST_NORM
from engine.core import SamplingParams, Speculation
from engine.nn.weight import Weight, dequantise
from engine.rows import Part, RowPlan
from tests.engine.mistral_rig import (
    Pair,
    echo_pair,
    is_matrix,
    make_engine,
    owned,
    plain_tokens,
    pool_layout,
    random_pair,
    state_error,
    tiny_head,
    tiny_mistral4,
    to_fp8,
)
from tests.engine.rig import CHAIN, TREE, Recording, assert_idle, prompts_of, record
from tests.engine.state import TOLERANCE
from tests.engine.test_drafted_trees import Drafted, watch
from tests.engine.test_mutants import first_rows_to_the_head
from tests.oracles import mistral4 as oracle
from tests.oracles.attention import ancestors_of

SPECULATIONS = {
    "chain": CHAIN,
    "tree": TREE,
    "wide": Speculation(12, 3, 4),
    "published": Speculation(4, 3, 1),  # what Mistral's card asks for
}
PROMPTS = prompts_of([1, 9, 2, 18])  # with their answers, three of them go past the 16 original positions
MAX_TOKENS = (17, 10, 8, 1)


def params_of(temperature: float, count: int = 4) -> list[SamplingParams]:
    """Requests of different length and seed."""
    return [
        SamplingParams(temperature=temperature, seed=10 + i, max_tokens=MAX_TOKENS[i]) for i in range(count)
    ]


# --- the network


def causal_plan(count: int) -> RowPlan:
    """Row i of the list lies in slot i + 1."""
    bias = torch.full((1, count, count), -math.inf).triu(1)
    return RowPlan(slice(1, 1 + count), (Part(1, count, torch.arange(1, 1 + count)[None], bias),))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("count", [6, 19])
def test_the_network(norm: bool, num_layers: int, count: int) -> None:
    """Rows of a pool against rows computed at once; 19 rows are attended to unabsorbed, 6 absorbed."""
    config, weights = tiny_mistral4(3)
    head_config, head = tiny_head(config, 3, num_layers=num_layers, norm=norm)
    output = weights["output.weight"]
    model = MistralEagleModel(
        head_config, owned(head), weights["tok_embeddings.weight"], lambda g: g @ output.T, 40
    )
    assert model.feature_layers == (POST_NORM,)
    assert model.token_ids.tolist() == list(range(97))
    features, tokens = torch.randn(count, config.hidden_size), prompts_of([count])[0]
    out = model.extend(torch.tensor(tokens), features, torch.arange(count), causal_plan(count))
    truth = oracle.head_forward(head_config, head, weights, tokens, features)
    torch.testing.assert_close(out, truth.post_norm, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(out), truth.logits, atol=1e-4, rtol=1e-4)
    assert 0.5 < float(truth.logits.std()) < 20
    held = model.pool.rows[:, :, :, 1 : 1 + count]
    torch.testing.assert_close(held, pool_layout(truth.latents), atol=1e-4, rtol=1e-4)


def test_a_weight_too_many_is_noticed() -> None:
    config, weights = tiny_mistral4(3)
    head_config, head = tiny_head(config, 3)
    with pytest.raises(AssertionError, match="output"):
        MistralEagleModel(
            head_config,
            owned(head | {"output.weight": torch.zeros(1)}),
            weights["tok_embeddings.weight"],
            lambda g: g,
            8,
        )


# --- the pair


@functools.cache
def echo() -> Pair:
    return echo_pair(3)


@functools.cache
def answers(temperature: float) -> list[tuple[int, ...]]:
    """The echo pair's plain tokens: many runs are compared with them."""
    return plain_tokens(echo(), PROMPTS, params_of(temperature))


def check(
    pair: Pair, prompts: list[list[int]], params: list[SamplingParams], speculation: Speculation
) -> Recording:
    """Both oracles for one batch."""
    whole = pair is echo() and len(prompts) == 4
    expected = answers(params[0].temperature) if whole else plain_tokens(pair, prompts, params)
    speculating = make_engine(pair, "eagle", speculation=speculation)
    recording = record(speculating, prompts, params)
    assert [c.token_ids for c in recording.completions] == expected
    assert any(snapshot.head_rows is not None for snapshot in recording.snapshots)
    assert state_error(pair, recording) < TOLERANCE
    assert_idle(speculating)
    return recording


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SPECULATIONS)
def test_tokens_and_state(shape: str, temperature: float) -> None:
    recording = check(echo(), PROMPTS, params_of(temperature), SPECULATIONS[shape])
    accepted = sum(c.num_accepted for c in recording.completions)
    assert accepted >= 8, "the test is idle unless drafts are accepted"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_single_request(shape: str, temperature: float) -> None:
    check(echo(), PROMPTS[:1], params_of(temperature, 1), SPECULATIONS[shape])


def test_a_head_that_is_never_right() -> None:
    check(random_pair(5), PROMPTS, params_of(1.0), TREE)


def test_a_head_with_its_own_quantisation() -> None:
    """An FP8 head on a plain target: tokens are the target's, rows those of the dequantised head."""
    head: dict[str, Weight] = {
        name: to_fp8(tensor) if is_matrix(name) else tensor for name, tensor in echo().head.items()
    }
    assert sum(not isinstance(weight, Tensor) for weight in head.values()) == 1 + 2 * 8
    wide = Pair(
        echo().config,
        echo().weights,
        echo().head_config,
        {name: dequantise(weight, torch.float32) for name, weight in head.items()},
    )
    params = params_of(0.0)
    speculating = make_engine(echo(), "eagle", head=head)
    recording = record(speculating, PROMPTS, params)
    assert [c.token_ids for c in recording.completions] == answers(0.0)
    assert state_error(wide, recording) < TOLERANCE
    assert state_error(echo(), recording) > 20 * TOLERANCE, "nothing was rounded"


# --- deliberate mistakes


def compaction_skipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.models.decoder, "compact", lambda pool, batch, verdict: None)


def feature_before_the_norm(patch: pytest.MonkeyPatch) -> None:
    """The head is fed the last layer's output as it is."""
    patch.setattr(MistralEagleModel, "feature_layers", (2,))


def positions_of_the_tokens(patch: pytest.MonkeyPatch) -> None:
    """A pair runs at its token's position, one too far."""
    forward = MistralEagleModel.forward

    def wrong(
        self: MistralEagleModel, tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan
    ) -> Tensor:
        return forward(self, tokens, feature, positions + 1, plan)

    patch.setattr(MistralEagleModel, "forward", wrong)


def no_mistake(patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("mutate", "tokens", "state"),
    [
        (no_mistake, True, True),
        (compaction_skipped, False, False),
        (first_rows_to_the_head, True, False),
        (feature_before_the_norm, True, False),
        (positions_of_the_tokens, True, False),
    ],
)
def test_which_oracle_sees_it(
    mutate: Callable[[pytest.MonkeyPatch], None], tokens: bool, state: bool, temperature: float
) -> None:
    params = params_of(temperature)
    expected = answers(temperature)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        speculating = make_engine(echo(), "eagle", speculation=Speculation(12, 3, 4))
        recording = record(speculating, PROMPTS, params)
    assert ([c.token_ids for c in recording.completions] == expected) == tokens
    assert (state_error(echo(), recording) < TOLERANCE) == state


# --- what it drafts


def offered(pair: Pair, drafted: Drafted, seen: oracle.Forward, path: list[int]) -> Tensor:
    """[V] the head's probabilities after a path of drafted tokens, from scratch: a drafted token's feature is
    the head's own output after its norm. seen: the target's forward over the committed tokens."""
    pairs, features = drafted.tokens[1:], seen.post_norm[:-1]
    rows = oracle.head_forward(pair.head_config, pair.head, pair.weights, pairs, features)
    for token in path:
        pairs, features = [*pairs, token], torch.cat((features, rows.post_norm[-1:]))
        rows = oracle.head_forward(pair.head_config, pair.head, pair.weights, pairs, features)
    return torch.softmax(rows.logits[-1], 0)


@pytest.mark.parametrize("which", ["echo", "random"])
def test_every_drafted_node_scores_what_the_head_says_from_scratch(which: str) -> None:
    pair = echo() if which == "echo" else random_pair(6)
    speculating = make_engine(pair, "eagle", speculation=Speculation(9, 4, 2))
    assert isinstance(speculating.draft, FeatureDraft)
    kept: list[Drafted] = []
    watch(speculating.draft, kept)
    prompts = prompts_of([12, 3])
    speculating.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
    count = 0
    for drafted in kept[:4]:
        seen = oracle.forward(pair.config, pair.weights, drafted.tokens)
        for node in range(1, len(drafted.nodes)):
            path = [drafted.nodes[i] for i in ancestors_of(drafted.parents, node)[1:]]
            shares = offered(pair, drafted, seen, path[:-1])
            assert float(shares[path[-1]]) == pytest.approx(drafted.raw[node], rel=1e-3, abs=1e-6)
            assert int((shares > shares[path[-1]]).sum()) == drafted.rank[node]
            count += 1
    assert count >= 20


def test_a_reduced_vocabulary() -> None:
    """Only the tokens that the head can name are drafted; the answer does not change."""
    speculating = make_engine(echo(), "eagle", token_ids=torch.arange(0, 97, 3))
    assert isinstance(speculating.draft, FeatureDraft)
    kept: list[Drafted] = []
    watch(speculating.draft, kept)
    recording = record(speculating, PROMPTS, params_of(0.0))
    assert [c.token_ids for c in recording.completions] == answers(0.0)
    assert state_error(echo(), recording) < TOLERANCE
    assert {token % 3 for drafted in kept for token in drafted.nodes[1:]} == {0}
    assert sum(c.num_accepted for c in recording.completions) >= 3
