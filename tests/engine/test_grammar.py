"""Answers match their grammars, whoever drafts, and what breaks in a matcher breaks one answer.

The oracle of a path's mask is a matcher that was made for that path alone and never rolled back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from draft.masking import NEVER, FrontierMask, num_allowed
from engine.core import (
    SPECULATION_OFF,
    Batch,
    Delta,
    DraftTree,
    Grammar,
    Request,
    SamplingParams,
    Speculation,
)
from engine.core import Sequence as Seq
from engine.errors import RequestError
from engine.grammar import Place
from engine.step import Engine
from engine.text.grammar import GrammarCompiler
from tests.engine.rig import Prophet, assert_idle, echo_model, make_engine, prompts_of
from tests.text.toy import toy_tokenizer

TOY = toy_tokenizer()
EOS = TOY.eos_token_ids
COMPILER = GrammarCompiler(TOY)
MODEL = echo_model(3)
VOCAB = MODEL.config.vocab_size
TREE = Speculation(nodes=12, depth=4, top_k=3)
BOTH = Speculation(nodes=8, depth=3, top_k=2, lookup=4)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "true": {"enum": [12, None, "null"]},
        "a": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "true", "a"],
    "additionalProperties": False,
}
KINDS = {
    "schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "object": Grammar("json_object", ""),
    "regex": Grammar("regex", "(ab|[0-9]{2}){3,9}name( 12)?"),
    "choice": Grammar("choice", '["true", "tr", "false and false", "</s>"]'),
    "lark": Grammar("lark", 'start: item ("," item){1,3}\nitem: "name" <tool> /[a-c]{1,4}/'),
}


def params(grammar: Grammar | None, temperature: float = 1.0, **rest: Any) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": 40, "seed": 7} | rest
    return SamplingParams(temperature=temperature, grammar=grammar, **fields)


def engine_for(draft: Any = "none", **rest: Any) -> Engine:
    fields: dict[str, Any] = {"eos": EOS, "grammar_compiler": COMPILER, "num_pages": 400} | rest
    return make_engine(MODEL, draft, **fields)


def steps_of(engine: Engine, requests: Sequence[Request]) -> list[list[Delta]]:
    """The deltas of every step until nothing runs."""
    for request in requests:
        engine.add(request)
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    assert_idle(engine)
    return steps


def chain_behind(batch: Batch, answer: Sequence[int], most: int) -> DraftTree:
    """The next tokens of an answer, for a batch of one."""
    (seq,) = batch.seqs
    most = min(most, batch.speculation[0].most_accepted)
    chain = [seq.tokens[-1], *answer[seq.num_generated : seq.num_generated + most]]
    return DraftTree(torch.tensor([chain]), torch.arange(len(chain))[None] - 1)


def text(token_ids: Sequence[int]) -> str:
    """An answer without the end token."""
    return TOY.decode(token_ids)


# --- a path's mask


def from_scratch(grammar: Grammar, path: Sequence[int]) -> set[int] | None:
    """What may follow a path; None where that cannot be."""
    matcher = COMPILER.matcher(grammar)
    for token in path:
        if token >= TOY.vocab_size or token not in mask_of(matcher) or matcher.is_stopped():
            return None
        assert matcher.consume_token(token)
    allowed = mask_of(matcher)
    return None if matcher.is_stopped() else allowed


def mask_of(matcher: LLMatcher) -> set[int]:
    mask = allocate_token_bitmask(1, TOY.vocab_size)
    fill_next_token_bitmask(matcher, mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_masked_as_a_matcher_of_its_own_would(kind: str) -> None:
    """Random walks that branch, go back, leave the grammar and go on, in any order."""
    grammar, dice = KINDS[kind], random.Random(kind)
    place = Place(lambda: COMPILER.matcher(grammar), TOY.vocab_size, VOCAB)
    answer: list[int] = []
    num_ends = 0
    for _ in range(12):
        place.advance(answer)
        paths: list[tuple[int, ...]] = [()]
        for _ in range(8):
            path = dice.choice(paths)
            allowed = from_scratch(grammar, answer + list(path))
            wrong = dice.random() < 0.2 or not allowed
            paths.append((*path, dice.randrange(VOCAB) if wrong else dice.choice(sorted(allowed or ()))))
        for path in dice.sample(paths, len(paths)):
            found, expected = place.after(path), from_scratch(grammar, answer + list(path))
            assert set(found.allowed.nonzero()[:, 0].tolist()) == (expected or set())
            assert (found.end is None) == (expected is not None)
            assert found.only == (min(expected) if expected and len(expected) == 1 else None)
            num_ends += found.end == "stop"
        good = [path for path in paths if from_scratch(grammar, answer + list(path)) is not None]
        answer = answer + list(dice.choice(good))
    assert num_ends or kind in ("object", "lark", "regex", "schema")


# --- whole answers


def random_schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of bounded size: a model that knows nothing must come to its end."""
    kinds = ["string", "integer", "enum", "const", "boolean", "null", "pattern", "date", "number"]
    kind = dice.choice(kinds if depth > 2 else [*kinds, *["array", "object", "anyOf"] * 3])
    if kind == "array":
        least = dice.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(dice, depth + 1),
            "minItems": least,
            "maxItems": least + dice.randint(0, 2),
        }
    if kind == "object":
        names = dice.sample(["name", "a", "b", "true", "x-1", "null"], dice.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(dice, depth + 1) for name in names},
            "required": [name for name in names if dice.random() < 0.7],
            "additionalProperties": False,
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(dice, depth + 1) for _ in range(dice.randint(1, 3))]}
    low = dice.randint(-50, 50)
    simple: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": dice.randint(0, 2), "maxLength": dice.randint(2, 8)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + dice.randint(0, 500)},
        "number": {"enum": [low / 4, low, 1e20]},
        "enum": {"enum": dice.sample([1, 12, "name", None, True, "a\\b", [1, {"a": 2}], 0.5], 3)},
        "const": {"const": dice.choice([{"name": [1, 2]}, "true", 12, []])},
        "boolean": {"type": "boolean"},
        "null": {"type": ["null", "boolean"]},
        "pattern": {
            "type": "string",
            "pattern": dice.choice(["^[a-f]{1,4}$", "^(ab|c-)+d?$"]),
            "maxLength": 9,
        },
        "date": {"type": "string", "format": "date"},
    }
    return simple[kind]


def test_answers_to_200_generated_schemas_validate() -> None:
    dice = random.Random(0)
    schemas = [random_schema(dice) for _ in range(200)]
    small = Speculation(nodes=6, depth=3, top_k=2)
    engine = engine_for("eagle3", speculation=small, num_pages=2000, max_num_seqs=16, max_model_len=400)
    grammars = [Grammar("json_schema", json.dumps(schema)) for schema in schemas]
    asked = [
        params(grammar, number % 2, seed=number, max_tokens=300) for number, grammar in enumerate(grammars)
    ]
    answers = engine.generate(prompts_of([5] * 200), asked)
    assert_idle(engine)
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason == "stop", (schema, text(answer.token_ids))
        value = json.loads(text(answer.token_ids))
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    assert sum(answer.num_accepted for answer in answers) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_speculative_answers_equal_plain_ones(kind: str) -> None:
    """One greedy, one sampled. Beside requests with a grammar runs one without; it must not notice."""
    prompts = prompts_of([4, 9, 6])
    asked = [params(KINDS[kind], temperature, seed=1, top_p=0.9) for temperature in (0.0, 1.0)]
    asked.append(params(None, 1.0))
    plain = engine_for().generate(prompts, asked, SPECULATION_OFF)
    for draft, speculation in (("eagle3", TREE), ("eagle", BOTH), ("ngram", TREE)):
        engine = engine_for(draft, speculation=speculation)
        spec = engine.generate(prompts, asked)
        assert_idle(engine)
        assert [one.token_ids for one in spec] == [one.token_ids for one in plain], (draft, speculation)
        assert [one.finish_reason for one in spec] == [one.finish_reason for one in plain]
        if draft != "ngram":
            assert sum(one.num_accepted for one in spec) > 0
    if kind != "object":
        assert [one.finish_reason for one in plain[:2]] == ["stop", "stop"]
    for number in (0, 1):
        engine = engine_for("eagle3", speculation=TREE)
        alone = engine.generate(prompts[number : number + 1], asked[number])[0]
        assert alone.token_ids == plain[number].token_ids
    free = engine_for().generate(prompts[2:], asked[2], SPECULATION_OFF)[0]
    assert plain[2].token_ids == free.token_ids


def test_an_answer_survives_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [params(KINDS["object"], seed=seed, max_tokens=40) for seed in range(4)]
    prompts = prompts_of([5, 6, 7, 8])
    plain = [engine_for().generate([p], a)[0].token_ids for p, a in zip(prompts, asked, strict=True)]
    engine = engine_for("eagle3", speculation=TREE, num_pages=16)
    preempt, preempted = engine.scheduler._preempt, list[int]()

    def noted(seq: Seq) -> None:
        preempted.append(seq.request.id)
        preempt(seq)

    monkeypatch.setattr(engine.scheduler, "_preempt", noted)
    answers = engine.generate(prompts, asked)
    assert preempted
    assert [answer.token_ids for answer in answers] == plain
    assert_idle(engine)


# --- forced tokens and ends


def test_forced_tokens_take_no_step() -> None:
    """A constant is known to its end as soon as its first token is: the answer takes the prompt's step."""
    grammar = Grammar("json_schema", json.dumps({"const": {"name": "true", "a": [12]}}))
    engine = engine_for()
    steps = steps_of(engine, [Request(0, (1, 2, 3), params(grammar))])
    (delta,) = [delta for step in steps for delta in step]
    assert text(delta.token_ids) == '{"name": "true", "a": [12]}'
    assert delta.finish_reason == "stop"
    assert delta.num_forced == len(delta.token_ids) - 1


def test_forced_tokens_pass_through_the_model_with_the_next_step() -> None:
    grammar = Grammar("regex", "[ab]name true[cd]null[xy]")
    plain = engine_for()
    steps = steps_of(plain, [Request(0, (1, 2, 3), params(grammar))])
    assert len(steps) == 3, "one for each choice"
    token_ids = [token for step in steps for delta in step for token in delta.token_ids]
    assert text(token_ids).count("name true") == text(token_ids).count("null") == 1


def test_the_canary_decodes_an_answer_with_forced_tokens_again() -> None:
    grammar = Grammar("regex", "[ab]{6}name true[ab]{3}null[xy]{4}")
    for draft in ("none", "eagle3"):
        engine = engine_for(draft, speculation=TREE, canary=1.0)
        engine.generate(prompts_of([3, 4]), [params(grammar, seed=seed) for seed in (1, 2)])
        counts = engine.canary_counts()
        assert (counts.num_bugs, counts.num_skipped) == (0, 0)
        assert counts.num_steps > 3


@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_an_answer_may_be_cut_inside_forced_tokens(length: int) -> None:
    grammar = Grammar("regex", "[ab]name true")
    whole = engine_for().generate([[1]], params(grammar))[0]
    for draft in ("none", "eagle3"):
        cut = engine_for(draft).generate([[1]], params(grammar, max_tokens=length))[0]
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.finish_reason == ("length" if length < len(whole.token_ids) else "stop")


def test_a_stop_token_among_forced_ones_ends_the_answer() -> None:
    (stop,) = TOY.encode("true")
    answer = engine_for().generate([[1]], params(Grammar("regex", "[ab] true,"), stop_token_ids=(stop,)))[0]
    assert answer.finish_reason == "stop"
    assert text(answer.token_ids)[1:] == " true"


def test_the_end_token_comes_where_the_grammar_is_complete_and_nowhere_else() -> None:
    grammar = Grammar("regex", "[0-9]{2}[a-c]*")
    bias = ((EOS[0], 50.0),)
    for ignore_eos in (False, True):
        answer = engine_for().generate([[1]], params(grammar, 0.0, logit_bias=bias, ignore_eos=ignore_eos))[0]
        assert (len(text(answer.token_ids)), answer.token_ids[-1]) == (2, EOS[0])
        assert answer.finish_reason == "stop"


def test_a_forced_token_comes_whatever_other_edits_say() -> None:
    (true,) = TOY.encode("true")
    grammar = Grammar("regex", "[ab]true[cd]")
    plain = engine_for().generate([[1]], params(grammar, bad_words=((true,),), min_tokens=20))[0]
    assert text(plain.token_ids)[1:5] == "true"
    spec = engine_for("eagle3", speculation=TREE).generate(
        [[1]], params(grammar, bad_words=((true,),), min_tokens=20)
    )[0]
    assert spec.token_ids == plain.token_ids


@pytest.mark.parametrize("num_drafted", [0, 1, 2, 5])
def test_a_forced_token_is_the_choice_in_a_tree_too(num_drafted: int) -> None:
    """Behind the prompt, behind a drafted token, and behind one that is forced itself."""
    (true,) = TOY.encode("true")
    sampling = params(Grammar("regex", "true[ab]{2}true true[cd]"), bad_words=((true,),))
    plain = engine_for().generate([[1]], sampling)[0]
    assert text(plain.token_ids).count("true") == 3
    prophet = Prophet({0: plain.token_ids}, VOCAB)
    prophet.propose = lambda batch, mask=None: chain_behind(batch, plain.token_ids, num_drafted)  # type: ignore[method-assign]
    spec = engine_for(prophet, speculation=TREE).generate([[1]], sampling)[0]
    assert spec.token_ids == plain.token_ids
    assert (spec.num_accepted > 0) == (num_drafted > 0)


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 20])
def test_a_forced_stop_token_stops_behind_min_tokens(min_tokens: int) -> None:
    """Whether it is forced behind a choice or as the choice itself; the grammar's own end always counts."""
    (true,) = TOY.encode("true")
    sampling = params(
        Grammar("regex", "[ab]true[cd]true"), stop_token_ids=(true,), min_tokens=min_tokens, ignore_eos=True
    )
    plain = engine_for().generate([[1]], sampling)[0]
    assert text(plain.token_ids).count("true") == (1 if min_tokens < 2 else 2)
    assert plain.finish_reason == "stop"
    spec = engine_for("eagle3", speculation=TREE).generate([[1]], sampling)[0]
    assert spec.token_ids == plain.token_ids


# --- what goes wrong


def test_a_choice_that_other_edits_leave_empty_ends_that_request_alone() -> None:
    words = tuple((token,) for token in TOY.encode("a") + TOY.encode("b"))
    engine = engine_for("eagle3", speculation=TREE)
    steps = steps_of(
        engine,
        [
            Request(0, (1, 2), params(Grammar("regex", "x[ab]y"), bad_words=words)),
            Request(1, (1, 2), params(Grammar("regex", "x[ab]y"))),
        ],
    )
    last = {delta.request_id: delta for step in steps for delta in step if delta.finish_reason}
    assert (last[0].finish_reason, last[1].finish_reason) == ("error", "stop")
    assert last[0].error


class BrokenCompiler(GrammarCompiler):
    """Its matchers refuse everything after so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(TOY)
        self.num_tokens = num_tokens

    def matcher(self, grammar: Grammar, param: str | None = "grammar") -> LLMatcher:
        spy = SpyMatcher(super().matcher(grammar, param))
        spy.most = self.num_tokens
        return cast(LLMatcher, spy)


class SpyMatcher:
    """An LLMatcher that notes what it is given, and fails behind ``most`` tokens."""

    fed: list[tuple[int, bool]] = []  # tokens, and whether the mask before allowed them

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher, self.most, self._consumed = matcher, 10**9, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def try_consume_tokens(self, tokens: list[int]) -> int:
        for token in tokens:
            SpyMatcher.fed.append((token, 0 <= token < TOY.vocab_size and token in mask_of(self._matcher)))
            if self._consumed >= self.most or self._matcher.try_consume_tokens([token]) != 1:
                return -1
            self._consumed += 1
        return len(tokens)

    def rollback(self, num_tokens: int) -> bool:
        self._consumed -= num_tokens
        return self._matcher.rollback(num_tokens)


class FragileMatcher(SpyMatcher):
    """Breaks for good when it is given one token, as a matcher past its limits does."""

    poison = TOY.encode("b")[0]

    def try_consume_tokens(self, tokens: list[int]) -> int:
        if self.poison in tokens:
            self.most = -1
        return super().try_consume_tokens(tokens)

    def rollback(self, num_tokens: int) -> bool:
        return self.most > 0 and super().rollback(num_tokens)


def test_what_breaks_on_a_drafted_path_leaves_the_others_alone() -> None:
    grammar, (a, b) = Grammar("regex", "[ab]{3}"), TOY.encode("ab")
    place = Place(lambda: cast(LLMatcher, FragileMatcher(COMPILER.matcher(grammar))), TOY.vocab_size, VOCAB)
    assert place.after((a,)).end is None
    assert place.after((b,)).end == "error"
    assert set(place.after((a, a)).allowed.nonzero()[:, 0].tolist()) == {a, b}
    place.advance([a, a])
    assert place.after((a,)).end == "stop"


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("draft", ["none", "eagle3"])
def test_a_matcher_that_fails_ends_one_request(draft: str, num_tokens: int) -> None:
    class OneBroken(BrokenCompiler):
        def matcher(self, grammar: Grammar, param: str | None = "grammar") -> LLMatcher:
            sound = grammar != KINDS["regex"]
            return COMPILER.matcher(grammar, param) if sound else super().matcher(grammar, param)

    engine = engine_for(draft, speculation=TREE, grammar_compiler=OneBroken(num_tokens))
    requests = [
        Request(0, (1, 2), params(KINDS["regex"])),
        Request(1, (3, 4), params(KINDS["schema"])),
        Request(2, (5, 6), params(None)),
    ]
    last = {d.request_id: d for step in steps_of(engine, requests) for d in step if d.finish_reason}
    assert {number: delta.finish_reason for number, delta in last.items()} == {
        0: "error",
        1: "stop",
        2: "length",
    }
    assert "grammar cannot go on" in str(last[0].error)


def test_cve_2026_105757_no_drafted_token_reaches_a_matcher_unchecked() -> None:
    """Trees full of tokens that no grammar allows, tokens past the tokenizer's vocabulary among them."""
    prompts = prompts_of([4, 5])
    asked = [params(KINDS["object"], seed=seed) for seed in (3, 4)]
    plain = engine_for().generate(prompts, asked)
    SpyMatcher.fed = []
    prophet = Prophet({i: answer.token_ids for i, answer in enumerate(plain)}, VOCAB)
    engine = engine_for(prophet, speculation=TREE, grammar_compiler=BrokenCompiler(10**9))
    answers = engine.generate(prompts, asked)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    assert sum(answer.num_draft_tokens for answer in answers) > 40
    assert len(SpyMatcher.fed) > 30
    assert all(is_allowed for _, is_allowed in SpyMatcher.fed)


def test_what_cannot_be_compiled_is_never_queued() -> None:
    engine = engine_for()
    for broken in (Grammar("regex", "("), Grammar("json_schema", "[]")):
        with pytest.raises(RequestError, match="cannot be compiled"):
            engine.add(Request(0, (1,), params(broken)))
    with pytest.raises(RequestError, match="without a tokenizer"):
        engine_for(grammar_compiler=None).add(Request(0, (1,), params(KINDS["regex"])))
    assert_idle(engine)


# --- drafting


def test_drafted_nodes_are_those_the_grammar_allows() -> None:
    """Those of heads and of lookups, in a batch and alone."""
    repeating = Grammar("regex", "([ab]{1,9}[,:]){6}[cd]")
    for draft, num, least, grammar in (
        ("eagle3", 1, 20, KINDS["object"]),
        ("eagle3", 3, 60, KINDS["object"]),
        ("eagle", 2, 40, KINDS["object"]),
        ("ngram", 3, 9, repeating),
        ("eagle3", 3, 20, repeating),
    ):
        engine = engine_for(draft, speculation=BOTH)
        propose, num_nodes = engine.draft.propose, 0

        def checked(batch: Any, mask: Any = None, propose: Any = propose) -> Any:
            nonlocal num_nodes
            tree = propose(batch, mask)
            for row, seq in enumerate(batch.seqs):
                answer, paths = seq.tokens[len(seq.request.prompt) :], {0: list[int]()}
                for node, parent in enumerate(tree.parents[row].tolist()):
                    if parent >= 0:
                        paths[node] = [*paths[parent], int(tree.tokens[row, node])]
                        allowed = from_scratch(seq.request.sampling.grammar, answer + paths[node][:-1])
                        assert paths[node][-1] in (allowed or ())
                        num_nodes += 1
            return tree

        engine.draft.propose = checked  # type: ignore[method-assign]
        engine.generate(prompts_of([5] * num), [params(grammar, seed=seed) for seed in range(num)])
        assert num_nodes >= least, draft


def test_a_frontier_is_masked_row_by_row() -> None:
    class Seq:
        def __init__(self, grammar: Grammar | None) -> None:
            self.request = Request(0, (1,), params(grammar))

    def mask(seq: Any, path: tuple[int, ...]) -> torch.Tensor:
        allowed = torch.zeros(10, dtype=torch.bool)
        allowed[[sum(path) % 10, 9]] = True
        return allowed

    seqs: Any = [Seq(None), Seq(KINDS["regex"])]
    masked = FrontierMask(seqs, mask, torch.tensor([1, 3, 5, 9]))
    logits = torch.zeros(2, 1, 4)
    assert masked(logits).tolist() == [[[0] * 4], [[NEVER, NEVER, NEVER, 0]]]
    masked.descend(torch.tensor([[1, 3], [5, 3]]), torch.tensor([[0, 0], [0, 0]]))
    masked.descend(torch.tensor([[9, 9], [6, 0]]), torch.tensor([[0, 0], [0, 1]]))
    expected = [[NEVER, NEVER, NEVER, 0], [NEVER, 0, NEVER, 0]]  # after 5, 6 and 3, 0
    assert masked(torch.zeros(2, 2, 4))[1].tolist() == [[0, NEVER, NEVER, 0], expected[1]]
    assert torch.equal(logits, torch.zeros(2, 1, 4))
    assert num_allowed([0, 0, 5, 1], seqs[1], mask) == 2
    assert num_allowed([7, 7], seqs[0], mask) == 2
