"""What no step could run: the bounds of a request, checked by the engine whoever asks.

A token id past the vocabulary or a number that is not finite would fail the step, and with it the requests of
everybody else in the batch; lists without an end would slow all of them down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

from engine.core import Request, SamplingParams, Speculation
from engine.errors import RequestError

MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 128  # of a client, each of which may be two sequences of tokens: behind a space or not
MAX_BAD_WORD_LEN = 64  # tokens
MAX_LOGPROBS = 20
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # so that no logit leaves float32
_CACHE_SALT = re.compile(r"[A-Za-z0-9._~+/=:-]{0,128}")


def check_request(request: Request, vocab_size: int) -> None:
    """Refuse what no step could run (RequestError names the field, found and expected)."""
    if not request.prompt:
        raise RequestError("the prompt is empty; at least one token is needed", "prompt")
    _check_ids("prompt", request.prompt, vocab_size)
    if not -(2**31) <= request.priority < 2**31:
        _refuse("priority", request.priority, "an integer of 32 bits")
    if not _CACHE_SALT.fullmatch(request.cache_salt):
        _refuse(
            "cache_salt", f"{request.cache_salt!r:.150}", "up to 128 of the characters A-Z a-z 0-9 ._~+/=:-"
        )
    _check_choice(request.sampling)
    _check_edits(request.sampling, vocab_size)
    if request.speculation is not None:
        _check_speculation(request.speculation)


def _check_choice(sampling: SamplingParams) -> None:
    if not (sampling.temperature == 0 or 1e-5 <= sampling.temperature <= 100):
        _refuse("temperature", sampling.temperature, "0 (greedy) or 1e-5 to 100")
    if not 0 < sampling.top_p <= 1:
        _refuse("top_p", sampling.top_p, "more than 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        _refuse("min_p", sampling.min_p, "0 to 1")
    if not 0 <= sampling.top_k < 2**31:
        _refuse("top_k", sampling.top_k, "0 (off) or more")
    if not -(2**63) <= sampling.seed < 2**63:
        _refuse("seed", sampling.seed, "an integer of 64 bits")
    if sampling.max_tokens < 1:
        _refuse("max_tokens", sampling.max_tokens, "at least 1")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        _refuse("logprobs", sampling.logprobs, f"0 to {MAX_LOGPROBS}")


def _check_edits(sampling: SamplingParams, vocab_size: int) -> None:
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        _refuse("min_tokens", sampling.min_tokens, f"0 to max_tokens, which is {sampling.max_tokens}")
    for param in ("presence_penalty", "frequency_penalty"):
        penalty: float = getattr(sampling, param)
        if not -2 <= penalty <= 2:
            _refuse(param, penalty, "-2 to 2")
    if not MIN_REPETITION_PENALTY <= sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
        _refuse(
            "repetition_penalty",
            sampling.repetition_penalty,
            f"{MIN_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY}",
        )
    _check_len("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKEN_IDS)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_len("logit_bias", sampling.logit_bias, MAX_LOGIT_BIAS)
    _check_ids("logit_bias", (token for token, _ in sampling.logit_bias), vocab_size)
    wrong = next((amount for _, amount in sampling.logit_bias if not -100 <= amount <= 100), None)
    if wrong is not None:
        _refuse("logit_bias", f"a bias of {wrong}", "-100 to 100")
    _check_len("bad_words", sampling.bad_words, 2 * MAX_BAD_WORDS)
    for word in sampling.bad_words:
        if not 1 <= len(word) <= MAX_BAD_WORD_LEN:
            _refuse("bad_words", f"a word of {len(word)} tokens", f"1 to {MAX_BAD_WORD_LEN}")
        _check_ids("bad_words", word, vocab_size)


def _check_speculation(spec: Speculation) -> None:
    if not (
        1 <= spec.nodes <= 64 and 0 <= spec.depth <= 16 and 1 <= spec.top_k <= 16 and 0 <= spec.lookup <= 16
    ):
        _refuse("speculation", spec, "nodes of 1 to 64, depth and lookup of 0 to 16, top_k of 1 to 16")


def _check_len(param: str, found: tuple[object, ...], most: int) -> None:
    if len(found) > most:
        _refuse(param, f"a list of {len(found)}", f"at most {most}")


def _check_ids(param: str, ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        _refuse(param, f"a list with token {wrong}", f"tokens of 0 to {vocab_size - 1}")


def _refuse(param: str, found: object, expected: str) -> NoReturn:
    raise RequestError(f"{param} is {found}, expected {expected}", param)
