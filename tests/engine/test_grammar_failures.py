"""What breaks in a matcher, or leaves nothing to choose, ends one request and leaves the others alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
from llguidance import LLMatcher

from engine.core import Grammar, Request
from engine.errors import RequestError
from engine.grammar import Place
from engine.text.grammar import GrammarCompiler
from tests.engine.grammars import COMPILER, KINDS, TOY, TREE, VOCAB, engine_for, mask_of, params, steps_of
from tests.engine.rig import Prophet, assert_idle, prompts_of


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
