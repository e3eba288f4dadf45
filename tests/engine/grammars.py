"""What the tests of grammars share: grammars, engines that know them, and an oracle of what may come next.

The oracle is a matcher that was made for that path alone and never rolled back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from engine.core import Delta, Grammar, Request, SamplingParams, Speculation
from engine.step import Engine
from engine.text.grammar import GrammarCompiler
from tests.engine.rig import assert_idle, echo_model, make_engine
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


def text(token_ids: Sequence[int]) -> str:
    """An answer without the end token."""
    return TOY.decode(token_ids)


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
