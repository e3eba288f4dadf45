"""Speculation changes nothing but the number of steps: the same tokens, the same rows in every pool.

float32, so that equality is exact. Both oracles are seen to fail in test_mutants.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from draft.head import FeatureDraft
from draft.tree import graft
from engine.core import Batch, DraftTree, Request, SamplingParams, Speculation
from engine.roles import DraftMask
from tests.engine.rig import (
    CHAIN,
    PLAIN,
    TREE,
    Model,
    Prophet,
    Recording,
    assert_idle,
    echo_model,
    known_plain_tokens,
    make_engine,
    pool_rows,
    prompts_of,
    random_model,
    record,
)
from tests.engine.state import TOLERANCE, state_error
from tests.oracles.llama import forward, greedy

PROMPTS = prompts_of([1, 9, 2, 21])
SPECULATIONS = {
    "chain": CHAIN,
    "tree": TREE,
    "pair": Speculation(2, 1, 1),
    "wide": Speculation(20, 3, 6),
    "deep": Speculation(6, 9, 2),
    "chain of 3": Speculation(4, 3, 1),
    "chain of 6": Speculation(7, 6, 1),
    "lookup": Speculation(5, 3, 2, lookup=8),
}
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.02, "top_k": 40, "top_p": 0.95},
]


def params_of(temperature: float, *, filters: bool = False) -> list[SamplingParams]:
    """Four requests of different length and seed."""
    return [
        SamplingParams(
            temperature=temperature,
            seed=10 + i,
            max_tokens=(14, 11, 20, 1)[i],
            **(FILTERS[i] if filters else {}),
        )
        for i in range(4)
    ]


def check(
    model: Model,
    draft: str,
    params: list[SamplingParams],
    speculation: Speculation,
    per_request: list[Speculation | None] | None = None,
    page_size: int = 4,
    max_num_batched_tokens: int = 96,
) -> Recording:
    """Both oracles for one batch with a named draft."""
    expected = known_plain_tokens(model, PROMPTS, params)
    engine = make_engine(
        model,
        draft,
        speculation=speculation,
        page_size=page_size,
        num_pages=480 // page_size,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    recording = record(engine, PROMPTS, params, per_request)
    assert [c.token_ids for c in recording.completions] == expected
    assert state_error(model, recording, draft) < TOLERANCE
    assert_idle(engine)
    return recording


@pytest.fixture(scope="module")
def echo() -> Model:
    return echo_model(3)


@pytest.fixture(scope="module")
def rand() -> Model:
    return random_model(4)


def test_plain_greedy_decoding_equals_the_oracle(rand: Model) -> None:
    """The baseline of all other equalities."""
    params = [SamplingParams(temperature=0, max_tokens=8)] * len(PROMPTS)
    got = make_engine(rand).generate(PROMPTS, params)
    assert [list(c.token_ids) for c in got] == [greedy(rand.config, rand.weights, p, 8) for p in PROMPTS]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("draft", "shape"),
    [("none", "tree"), ("ngram", "tree"), *itertools.product(["eagle3", "eagle"], ["chain", "tree"])],
)
def test_tokens_and_state(echo: Model, draft: str, shape: str, temperature: float) -> None:
    """So small a budget that the long prompt is read in pieces, beside trees that are cut."""
    recording = check(echo, draft, params_of(temperature), SPECULATIONS[shape], max_num_batched_tokens=24)
    if draft.startswith("eagle"):  # the test is idle unless drafts are accepted
        assert sum(c.num_accepted for c in recording.completions) >= 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
@pytest.mark.parametrize("nodes", [1, SPECULATIONS["lookup"].nodes])
def test_lookups_beside_a_head(
    echo: Model, draft: str, nodes: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains without trees, and beside them."""
    monkeypatch.setattr("draft.ngram._SIZES", (2, 1))  # sampled answers of a random model repeat little more
    grafted: list[DraftTree] = []
    rows: list[tuple[Tensor, Tensor]] = []  # [B] bool each: has nodes of the head, has a chain

    def recorded(tree: DraftTree, chains: Tensor, chances: Tensor) -> DraftTree:
        rows.append((tree.real().sum(1) > 1, chains[:, 0] >= 0))
        grafted.append(graft(tree, chains, chances))
        return grafted[-1]

    monkeypatch.setattr("draft.head.graft", recorded)
    prompts = [(prompt * 3)[:24] for prompt in PROMPTS]
    params = [SamplingParams(temperature=temperature, top_k=3, seed=i, max_tokens=30) for i in range(4)]
    engine = make_engine(echo, draft, speculation=replace(SPECULATIONS["lookup"], nodes=nodes))
    recording = record(engine, prompts, params)
    assert [c.token_ids for c in recording.completions] == known_plain_tokens(echo, prompts, params)
    assert state_error(echo, recording, draft) < TOLERANCE
    assert_idle(engine)
    assert any(tree.parents.shape[1] > 2 for tree in grafted), "the test is idle without chains"
    both = torch.cat([beside[found] for beside, found in rows])
    assert both.any() == (nodes > 1)


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_chains_beside_larger_trees_stay_in_their_own_rows(
    echo: Model, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small tree with a chain next to a large one: its nodes have no more rows than it asked for."""
    prompts = [[5, 6, 7, 8] * 5, PROMPTS[1]]
    params = [SamplingParams(temperature=0, max_tokens=40)] * 2
    sizes = [Speculation(2, 1, 1, lookup=6), Speculation(30, 3, 6)]
    engine = make_engine(echo, draft, page_size=1, num_pages=200)
    propose, grafted = engine.draft.propose, []

    def checked(batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        tree = propose(batch, mask)
        for row, (seq, real) in enumerate(zip(batch.seqs, tree.real().tolist(), strict=True)):
            assert seq.kv_len + max(node for node, is_real in enumerate(real) if is_real) < len(seq.pages)
            assert real == sorted(real, reverse=True), "padding comes last"
            if seq.request.id == 0 and len(batch.seqs) == 2:
                grafted.append(int(tree.real()[row].sum()) > 2)
        return tree

    monkeypatch.setattr(engine.draft, "propose", checked)
    recording = record(engine, prompts, params, sizes)
    assert [c.token_ids for c in recording.completions] == known_plain_tokens(echo, prompts, params)
    assert state_error(echo, recording, draft) < TOLERANCE
    assert any(grafted), "the test is idle without chains"


def test_a_lookup_is_never_longer_than_the_answer_may_be(echo: Model) -> None:
    """Nor does it read past the context: the last steps have room for fewer tokens than were found."""
    params = SamplingParams(temperature=0, max_tokens=100)
    engine = make_engine(echo, "eagle3", max_model_len=32, speculation=Speculation(3, 1, 1, lookup=12))
    completions = engine.generate(PROMPTS[1:], params)
    assert [len(c.prompt) + len(c.token_ids) for c in completions] == [32] * 3
    assert [c.token_ids for c in completions] == [
        c.token_ids for c in make_engine(echo, max_model_len=32).generate(PROMPTS[1:], params)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", ["ngram", "eagle3"])
def test_tokens_with_half_weights(echo: Model, draft: str, temperature: float) -> None:
    """Their kernel sums in another order for other batch shapes, but in float32: tokens are equal."""
    params = params_of(temperature)
    engine = make_engine(echo, draft, speculation=TREE, half_weights=True)
    got = engine.generate(PROMPTS, params)
    assert [c.token_ids for c in got] == known_plain_tokens(echo, PROMPTS, params, half_weights=True)
    assert draft == "ngram" or sum(c.num_accepted for c in got) >= 8
    assert_idle(engine)


@pytest.mark.parametrize("shape", ["pair", "wide", "deep", "chain of 3", "chain of 6"])
@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_other_shapes_and_every_filter(echo: Model, draft: str, shape: str) -> None:
    check(echo, draft, params_of(0.9, filters=True), SPECULATIONS[shape], page_size=3)


@pytest.mark.parametrize("draft", ["ngram", "eagle3", "eagle"])
def test_requests_speculate_differently_in_one_batch(echo: Model, draft: str) -> None:
    per_request = [PLAIN, Speculation(4, 3, 1), None, TREE]
    recording = check(
        echo, draft, params_of(0.7, filters=True), SPECULATIONS["wide"], per_request, page_size=2
    )
    assert recording.completions[0].num_draft_tokens == 0


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_greedy_and_sampled_in_one_batch(echo: Model, draft: str) -> None:
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=16) for i, t in enumerate((0.0, 1.0, 0.0, 0.5))
    ]
    check(echo, draft, params, TREE)


@pytest.mark.parametrize(
    ("norm", "bias", "input_norm", "layers"),
    [(False, False, False, 2), (False, True, True, 1), (True, False, True, 2), (True, True, False, 1)],
)
def test_every_kind_of_eagle_1_head(norm: bool, bias: bool, input_norm: bool, layers: int) -> None:
    """Any two of the optional tensors, both there, one of them or neither."""
    model = random_model(5, norm=norm, bias=bias, input_norm=input_norm, eagle_layers=layers)
    check(model, "eagle", params_of(0.7), TREE)


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_random_heads(rand: Model, draft: str) -> None:
    check(rand, draft, params_of(0.0), TREE)
    check(rand, draft, params_of(1.0), CHAIN)


@pytest.mark.parametrize(("seed", "temperature"), [(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.0)])
def test_a_prophet_in_random_trees(rand: Model, seed: int, temperature: float) -> None:
    """Long accepted paths through ragged trees whose nodes lie anywhere: almost every step moves rows."""
    params = params_of(temperature, filters=True)
    expected = known_plain_tokens(rand, PROMPTS, params)
    prophet = Prophet(dict(enumerate(expected)), rand.config.vocab_size, seed)
    engine = make_engine(rand, prophet, speculation=Speculation(12, 7, 3), page_size=1 + seed, num_pages=400)
    recording = record(engine, PROMPTS, params)
    assert [c.token_ids for c in recording.completions] == expected
    assert state_error(rand, recording, "none") < TOLERANCE
    assert recording.completions[2].acceptance_length > 2
    assert_idle(engine)


@pytest.mark.parametrize("draft", ["ngram", "eagle3", "eagle"])
def test_one_request_alone_reads_its_pages_in_place(echo: Model, draft: str) -> None:
    params = params_of(0.7)
    for prompt, param, expected in zip(
        PROMPTS, params, known_plain_tokens(echo, PROMPTS, params), strict=True
    ):
        engine = make_engine(echo, draft)
        recording = record(engine, [prompt], [param])
        assert recording.completions[0].token_ids == expected
        assert state_error(echo, recording, draft) < TOLERANCE


def test_shared_noise_changes_acceptance_but_never_tokens(echo: Model) -> None:
    params = params_of(1.0)
    expected = known_plain_tokens(echo, PROMPTS, params)
    accepted = []
    for shared in (True, False):
        got = make_engine(echo, "eagle", shared_noise=shared).generate(PROMPTS, params)
        assert [c.token_ids for c in got] == expected
        accepted.append(sum(c.num_accepted for c in got))
    assert accepted[0] > accepted[1]


@pytest.mark.parametrize("draft", ["none", "ngram", "eagle3", "eagle"])
def test_one_prefill_agrees_with_every_greedy_token(echo: Model, draft: str) -> None:
    """Generate, then score prompt and answer at once (with the oracle, which has no cache to go stale)."""
    params = [SamplingParams(temperature=0, max_tokens=15)] * len(PROMPTS)
    for completion in make_engine(echo, draft).generate(PROMPTS, params):
        whole = [*completion.prompt, *completion.token_ids]
        best = forward(echo.config, echo.weights, whole).logits.argmax(-1)
        assert best[len(completion.prompt) - 1 : -1].tolist() == list(completion.token_ids)


@pytest.mark.parametrize(
    ("draft", "temperature"),
    [("none", 1.0), ("ngram", 0.0), *itertools.product(["eagle3", "eagle"], [0.0, 1.0])],
)
def test_stop_tokens_end_at_the_same_place(echo: Model, draft: str, temperature: float) -> None:
    """A stop token inside an accepted path cuts what follows it; ignore_eos does not."""
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=20) for i in range(4)]
    free = known_plain_tokens(echo, PROMPTS, params)
    eos = free[0][11]
    stop = free[1][7]
    stopping = [
        params[0],
        SamplingParams(temperature=temperature, seed=1, max_tokens=20, stop_token_ids=(stop,)),
        params[2],
        SamplingParams(temperature=temperature, seed=3, max_tokens=20, ignore_eos=True),
    ]

    def cut(tokens: tuple[int, ...], ends: set[int]) -> tuple[int, ...]:
        ending = [i for i, token in enumerate(tokens) if token in ends]
        return tokens[: ending[0] + 1] if ending else tokens

    engine = make_engine(echo, draft, eos=(eos,))
    got = engine.generate(PROMPTS, stopping)
    expected = [cut(free[0], {eos}), cut(free[1], {eos, stop}), cut(free[2], {eos}), free[3]]
    assert [c.token_ids for c in got] == expected
    assert [c.finish_reason for c in got] == [
        "stop" if len(e) < 20 or e[-1] == eos else "length" for e in expected[:3]
    ] + ["length"]
    assert_idle(engine)


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_a_sequence_that_outgrows_the_head_is_decoded_plainly(echo: Model, draft: str) -> None:
    """Prompts of 1, 9, 2 and 21 tokens: the last never drafts, the others until 20 tokens are in sight."""
    params = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)] * 4
    engine = make_engine(echo, draft, speculation=CHAIN)
    assert isinstance(engine.draft, FeatureDraft)
    engine.draft.max_len = 20
    lengths: dict[int, int] = {}
    for number, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.add(Request(number, tuple(prompt), param))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if len(delta.token_ids) > 1:
                lengths[delta.request_id] = len(PROMPTS[delta.request_id]) + len(tokens[delta.request_id])
        for seq in engine.scheduler.running:
            outgrown = len(seq.tokens) + len(seq.forced) + CHAIN.depth > 20 + CHAIN.depth
            assert not (outgrown and seq.request.id in engine.draft._pending)
    assert [tuple(row) for row in tokens] == known_plain_tokens(echo, PROMPTS, params)
    assert 3 not in lengths
    assert lengths.keys() & {0, 1, 2}, "the test is idle unless drafts are accepted"
    assert max(lengths.values()) <= 20 + 1, "the last tree's bonus token may lie one past the limit"
    assert_idle(engine)


def test_the_context_ends_a_request(echo: Model) -> None:
    """max_model_len counts prompt and answer; a tree is never deeper than the room that is left."""
    params = SamplingParams(temperature=0, max_tokens=100)
    for draft in ("none", "eagle3", "eagle"):
        engine = make_engine(echo, draft, max_model_len=32, speculation=Speculation(8, 7, 2))
        completions = engine.generate(PROMPTS[1:], params)
        assert [len(c.prompt) + len(c.token_ids) for c in completions] == [32] * 3
        assert {c.finish_reason for c in completions} == {"length"}


def test_the_seed_decides_and_the_batch_does_not(echo: Model) -> None:
    one = [SamplingParams(temperature=1.0, seed=7, max_tokens=20)] * 4
    other = [SamplingParams(temperature=1.0, seed=8, max_tokens=20)] * 4
    same = [PROMPTS[1]] * 4
    engine = make_engine(echo, "eagle")
    first = {c.token_ids for c in engine.generate(same, one)}
    second = {c.token_ids for c in engine.generate(same, other)}
    assert len(first) == len(second) == 1
    assert first != second


def test_steps_are_reproducible_on_a_used_engine(echo: Model) -> None:
    """A second batch lands on dirty pages, with a calibration that has learned."""
    engine = make_engine(echo, "eagle3", num_pages=60, prefix_caching=False)
    params = params_of(0.7)
    first = [c.token_ids for c in engine.generate(PROMPTS, params)]
    engine.generate(prompts_of([30, 3, 11], seed=9), SamplingParams(temperature=0, max_tokens=30))
    pool_rows(engine).masked_fill_(torch.rand(pool_rows(engine).shape) < 0.5, 3.0)
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] == first
