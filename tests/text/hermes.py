"""A byte-level vocabulary with a template for tools, and random answers that a grammar allows."""

from __future__ import annotations

import random
from collections.abc import Hashable
from functools import lru_cache
from typing import cast

import tokenizers
from llguidance import LLMatcher
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.core import Grammar
from engine.text.conversation import AnyTokenizer
from engine.text.grammar import GrammarCompiler
from engine.text.hermes import CLOSE, OPEN
from engine.text.tokenizer import Tokenizer, byte_alphabet

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\nCall functions within <tool_call></tool_call> tags. <tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or () %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@lru_cache(maxsize=2)
def hermes_tokenizer(special_tags: bool = False) -> Tokenizer:
    """256 bytes and control tokens, with special_tags those of the calls too."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = [START, END] + ([OPEN, CLOSE] if special_tags else [])
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return Tokenizer(backend, chat_template=TEMPLATE)


@lru_cache(maxsize=8)
def compiler(tokenizer: Hashable) -> GrammarCompiler:
    """One per vocabulary: a large one takes a second to read."""
    return GrammarCompiler(cast(AnyTokenizer, tokenizer))


def matcher(tokenizer: AnyTokenizer, grammar: str) -> LLMatcher:
    """Knows which answers a Lark grammar allows."""
    return compiler(cast(Hashable, tokenizer)).matcher(Grammar("lark", grammar))


def allows(tokenizer: AnyTokenizer, grammar: str, answer: list[int]) -> bool:
    """Whether these tokens are a whole answer."""
    judge = matcher(tokenizer, grammar)
    return judge.try_consume_tokens(answer) == len(answer) and judge.is_accepting()


def random_answer(tokenizer: AnyTokenizer, grammar: str, seed: int) -> list[int]:
    """An answer that a grammar allows, token by token out of the masks. Half the time something is tried that
    begins or ends a part, or texts would have no end and no calls."""
    judge, dice, answer = matcher(tokenizer, grammar), random.Random(seed), list[int]()
    parts = [tokenizer.encode(part) for part in ('"', "}", OPEN)]
    while not (judge.is_stopped() or (judge.is_accepting() and dice.random() < 0.3)):
        chosen = judge.compute_ff_tokens() or dice.choice(parts)
        if judge.validate_tokens(chosen) < len(chosen) or dice.random() < 0.5:
            allowed = [token for token, allowed in enumerate(judge.compute_logit_bias()) if allowed]
            chosen = [dice.choice([token for token in allowed if token not in tokenizer.eos_token_ids])]
        assert judge.consume_tokens(chosen), judge.get_error()
        answer += chosen
        assert len(answer) < 2000, tokenizer.decode(answer)
    return answer
