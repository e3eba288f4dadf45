"""Where a grammar leaves one token, it takes no step of its own; and how answers end."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from engine.core import Batch, DraftTree, Grammar, Request
from tests.engine.grammars import EOS, TOY, TREE, VOCAB, engine_for, params, steps_of, text
from tests.engine.rig import Prophet, prompts_of


def chain_behind(batch: Batch, answer: Sequence[int], most: int) -> DraftTree:
    """The next tokens of an answer, for a batch of one."""
    (seq,) = batch.seqs
    most = min(most, batch.speculation[0].most_accepted)
    chain = [seq.tokens[-1], *answer[seq.num_generated : seq.num_generated + most]]
    return DraftTree(torch.tensor([chain]), torch.arange(len(chain))[None] - 1)


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
