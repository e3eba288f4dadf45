"""Questions drawn from a seed: everything that edits, filters or masks logits, alone and together.

Each has a seed of its own, so that what it is answered depends on nothing but itself. Every kind appears by
itself before any appear together; drafting is asked for in shapes of every sort, and never left to a planner,
which on a small model would rather not draft at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from perf.hardship.client import Body, Question, chat, completion

_IDS_BELOW: Final = 250  # token ids: every vocabulary here has as many
_PROMPTS: Final = (
    "Name three rivers.",
    "Explain in three sentences why the sky is blue.",
    "Count: one, two, three, one, two, three, one, two,",
    "Write a JSON object with a name and an age.",
    "Once upon a time there was an eagle that",
    "def reverse(text):\n    return text",
    "Ein Adler kann mit einer Spannweite von drei Metern",
)
_SCHEMA: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "wild": {"type": "boolean"},
    },
    "required": ["name", "age", "wild"],
    "additionalProperties": False,
}
_GRAMMARS: Final[tuple[Body, ...]] = (
    {"structured_outputs": {"json": _SCHEMA}},
    {"structured_outputs": {"regex": "(ab|cd){3,9}[0-9]+\\."}},
    {"structured_outputs": {"choice": ["eagle", "eagle owl", "falcon"]}},
    {"structured_outputs": {"grammar": 'start: item+ "."\nitem: /[a-z]{2,6}/ ", "'}},
    {"response_format": {"type": "json_object"}},
)


def _penalties(dice: random.Random) -> Body:
    fields: Body = {
        "presence_penalty": round(dice.uniform(-2, 2), 2),
        "frequency_penalty": round(dice.uniform(-2, 2), 2),
        "repetition_penalty": round(dice.uniform(0.5, 2), 2),
    }
    return {name: fields[name] for name in dice.sample(sorted(fields), dice.randint(1, 3))}


def _grammar(dice: random.Random) -> Body:
    return dice.choice(_GRAMMARS)


def _bias(dice: random.Random) -> Body:
    ids = dice.sample(range(_IDS_BELOW), dice.randint(1, 40))
    return {"logit_bias": {str(token): round(dice.uniform(-10, 10), 2) for token in ids}}


def _bad_words(dice: random.Random) -> Body:
    return {"bad_words": dice.sample(["the", "a", "e", "is", "one", "two", "eagle", "name"], 3)}


def _stop(dice: random.Random) -> Body:
    fields: Body = {
        "stop": dice.sample([".", "e", "two", "th", "\n", "er", "x"], 2),
        "stop_token_ids": dice.sample(range(_IDS_BELOW), 8),
    }
    fields = {name: fields[name] for name in dice.sample(sorted(fields), dice.randint(1, 2))}
    return fields | {"include_stop_str_in_output": dice.random() < 0.5}


def _ending(dice: random.Random) -> Body:
    return dice.choice([{"min_tokens": 8}, {"ignore_eos": True}])


def _filters(dice: random.Random) -> Body:
    fields: Body = {
        "temperature": round(dice.uniform(0.3, 1.5), 2),
        "top_k": dice.randint(1, 40),
        "top_p": round(dice.uniform(0.3, 1), 2),
        "min_p": round(dice.uniform(0, 0.3), 2),
    }
    return {name: fields[name] for name in ("temperature", *dice.sample(sorted(fields), 2))}


def _several(dice: random.Random) -> Body:
    return {"n": 2, "temperature": 0.9}


KINDS: Final[dict[str, Callable[[random.Random], Body]]] = {
    "penalties": _penalties,
    "grammar": _grammar,
    "bias": _bias,
    "bad words": _bad_words,
    "stop": _stop,
    "ending": _ending,
    "filters": _filters,
    "several": _several,
}


def questions(num: int, most_tokens: int, seed: int) -> list[Question]:
    """So many questions, of which the first ones have one kind each. most_tokens: of an answer, 8 or more."""
    dice = random.Random(f"questions/{seed}")
    return [_question(dice, list(KINDS)[number : number + 1], most_tokens) for number in range(num)]


def _question(dice: random.Random, kinds: Sequence[str], most_tokens: int) -> Question:
    """kinds: of what it asks; none to draw some."""
    kinds = kinds or dice.sample(sorted(KINDS), dice.randint(0, 4))
    fields: dict[str, Any] = {
        "max_tokens": dice.randint(8, most_tokens),
        "seed": dice.getrandbits(48),
        "temperature": dice.choice([0, 0, 0.8]),
        "speculation": _shape(dice),
    }
    for kind in kinds:
        fields |= KINDS[kind](dice)
    if "several" in kinds:  # greedy answers would all be the same
        fields["temperature"] = fields["temperature"] or 0.9
    make = dice.choice([chat, completion])
    asked = make(dice.choice(_PROMPTS), **fields)
    return Question(asked.path, asked.body, tuple(sorted(kinds)))


def _shape(dice: random.Random) -> Body:
    """A chain, a tree, a lookup, or both."""
    nodes = dice.choice([1, 3, 5, 8, 12])
    return {
        "nodes": nodes,
        "depth": dice.randint(1, 5),
        "top_k": dice.choice([1, 2, 4]),
        "lookup": dice.choice([0, 4]) if nodes > 1 else 4,
    }
