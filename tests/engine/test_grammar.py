"""Answers match their grammars, whoever drafts, and drafts are what the grammars allow."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch

from draft.masking import NEVER, FrontierMask, num_allowed
from engine.core import SPECULATION_OFF, Grammar, Request, Speculation
from engine.core import Sequence as Seq
from engine.grammar import Place
from tests.engine.grammars import (
    BOTH,
    COMPILER,
    KINDS,
    TOY,
    TREE,
    VOCAB,
    engine_for,
    from_scratch,
    params,
    text,
)
from tests.engine.rig import assert_idle, prompts_of

# --- a path's mask


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
