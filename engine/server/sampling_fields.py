"""The fields of a request that decide its tokens, under vLLM's and OpenAI's names, and what they mean to the
engine.

Ranges are checked while the fields are decoded; ``check`` looks at what one field says about another. Both
name the field in the client's words; ``engine.checks`` guards the engine once more.
"""

from __future__ import annotations

import random
from typing import Annotated

from msgspec import Meta, Struct

from engine.checks import (
    MAX_BAD_WORD_LEN,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_REPETITION_PENALTY,
    MAX_STOP_TOKEN_IDS,
    MIN_REPETITION_PENALTY,
)
from engine.core import SamplingParams
from engine.errors import RequestError
from engine.text.conversation import AnyTokenizer

MAX_CHOICES = 8
MAX_STOP_STRINGS = 16
_MAX_WORD_CHARS = 256  # of a bad word or a stop string: every step looks for them
_GREEDY_BELOW = 1e-5  # a temperature below this divides logits beyond float32; it is greedy in all but name
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: far from any two seeds that people choose

PositiveInt = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, Meta(ge=0, le=1 << 31)]
StopString = Annotated[str, Meta(min_length=1, max_length=_MAX_WORD_CHARS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(Struct, kw_only=True):
    """Null is the default of each. Without a seed every answer draws its own."""

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: (
        Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None
    ) = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    bad_words: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=_MAX_WORD_CHARS)]],
            Meta(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None

    @property
    def num_choices(self) -> int:
        """How many answers to give to a prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report beside every token; None to report no log-probabilities."""
        return None

    def token_limit(self) -> int | None:
        """The most tokens the client wants, None for as many as fit; ``max_completion_tokens`` wins over the
        older ``max_tokens``."""
        return self.max_completion_tokens or self.max_tokens

    def engine_temperature(self) -> float:
        """What the engine divides by; 0 is greedy."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return 0.0 if temperature < _GREEDY_BELOW else temperature


def check(fields: SamplingFields) -> None:
    """Refuse what types and ranges of single fields cannot say (RequestError)."""
    if fields.num_choices > 1 and fields.engine_temperature() == 0:
        raise RequestError(
            f"n is {fields.n} with temperature {fields.temperature}, but greedy answers would all be the "
            "same; give a higher temperature, or n of 1",
            "n",
        )
    if fields.seed is not None and not -(1 << 63) <= fields.seed < 1 << 63:
        raise RequestError(
            f"seed must be a signed 64-bit integer, found one of {fields.seed.bit_length()} bits", "seed"
        )
    blank = next((place for place, word in enumerate(fields.bad_words or []) if not word.strip()), None)
    if blank is not None:
        raise RequestError("a bad word must not be blank", f"bad_words[{blank}]")


def sampling_params(
    fields: SamplingFields, prompt_len: int, max_model_len: int, tokenizer: AnyTokenizer
) -> SamplingParams:
    """The engine's parameters for a prompt of ``prompt_len`` tokens. A limit beyond the context means all
    that fits. Raises RequestError."""
    room = max(1, max_model_len - prompt_len)
    limit = fields.token_limit()
    max_tokens = room if limit is None else min(limit, room)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {min_tokens}, but at most {max_tokens} tokens may be generated (max_tokens, and "
            f"the prompt has {prompt_len} of {max_model_len})",
            "min_tokens",
        )
    unknown = next(
        (token for token in fields.logit_bias or {} if not 0 <= token < tokenizer.vocab_size), None
    )
    if unknown is not None:
        raise RequestError(
            f"token id {unknown} is outside the vocabulary of {tokenizer.vocab_size} tokens",
            f"logit_bias.{unknown}",
        )
    return SamplingParams(
        temperature=fields.engine_temperature(),
        top_k=min(max(fields.top_k or 0, 0), tokenizer.vocab_size),
        top_p=1.0 if fields.top_p is None else fields.top_p,
        min_p=fields.min_p or 0.0,
        seed=random.getrandbits(63) if fields.seed is None else fields.seed,
        max_tokens=max_tokens,
        stop=(fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ()),
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        logit_bias=tuple((fields.logit_bias or {}).items()),
        bad_words=_token_sequences(fields.bad_words or [], tokenizer),
        min_tokens=min_tokens,
        logprobs=fields.num_logprobs,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of answer number ``choice`` to one prompt, a signed 64-bit integer; of the first the seed
    itself."""
    derived = (seed + choice * _SEED_STRIDE) % (1 << 64)
    return derived - (1 << 64) if derived >= 1 << 63 else derived


def _token_sequences(words: list[str], tokenizer: AnyTokenizer) -> tuple[tuple[int, ...], ...]:
    """Bad words as tokens: each as the beginning of a text, and as it is written behind a space."""
    found: dict[tuple[int, ...], None] = {}
    for place, word in enumerate(words):
        for text in (word.strip(), f" {word.strip()}"):
            ids = tuple(tokenizer.encode(text))
            if not 1 <= len(ids) <= MAX_BAD_WORD_LEN:
                raise RequestError(
                    f"the bad word has {len(ids)} tokens, expected 1 to {MAX_BAD_WORD_LEN}",
                    f"bad_words[{place}]",
                )
            found[ids] = None
    return tuple(found)
