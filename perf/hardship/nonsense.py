"""Requests that are none, drawn from a seed, and what a server may answer to them.

Each is the bytes of one connection, so that the framing can be wrong as well as the body. Two promises hold
for all: no status of 500 or more, and an error is at most 1 KB and has OpenAI's shape. Some bodies may be
understood after all (a field that has become null): those may get 200.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec

_MOST_BYTES: Final = 1024  # of an error's body
_REFUSED: Final = frozenset({400, 413})
_PATIENCE_S: Final = 60.0
_SHORT_PATIENCE_S: Final = 0.2  # with what may rightly be waited for: the rest of a request
_VALID: Final[dict[str, dict[str, Any]]] = {
    "/v1/completions": {"prompt": "Name three rivers.", "max_tokens": 4, "temperature": 0, "seed": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/tokenize": {"prompt": "Name three rivers."},
    "/detokenize": {"tokens": [1, 2, 3]},
}
_FIELDS: Final = (
    *("prompt", "messages", "model", "stream", "stream_options", "n", "max_tokens", "min_tokens", "seed"),
    *("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "logit_bias", "bad_words"),
    *("presence_penalty", "repetition_penalty", "logprobs", "top_logprobs", "response_format", "priority"),
    *("structured_outputs", "tools", "tool_choice", "speculation", "cache_salt", "tokens", "unheard_of"),
)
_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1 << 31, -(1 << 63), 1 << 64, 10**300, 0.5, -1e308, 1e-308),
    *("", "x", "\0", "\u202e", "\ud800", "x" * 5000, "null", "%s%n", "../../etc/passwd"),
    *([], [[]], [None], [-1], [1 << 40], ["a", 1], [""], ["x"] * 200, {}, {"": None}, {"0": 1e308}),
    *({"type": "json_schema"}, {"type": "x"}, {"regex": "(" * 40}, {"regex": "(a*)*b"}, {"json": "{"}),
    *({"json": {"$ref": "#"}}, {"grammar": "start: start start"}, {"choice": []}, {"nodes": 10**9}),
    *([{"role": "user"}], [{"role": "root", "content": "x"}], [{"role": "user", "content": [{}]}]),
    *([{"type": "function"}], [{"type": "function", "function": {"name": "a b", "parameters": 3}}]),
)


@dataclass(frozen=True, slots=True)
class Nonsense:
    """The bytes of a connection. expected: what may be answered, 0 for nothing at all."""

    name: str
    data: bytes
    expected: frozenset[int]


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back: a status, 0 if the connection was closed without one, and a body."""

    status: int
    body: bytes


def nonsense(num: int, seed: int) -> Iterator[Nonsense]:
    """So many of them, every sort in turn."""
    dice = random.Random(f"nonsense/{seed}")
    sorts = [*_BODIES, *_FRAMES]
    for number in range(num):
        yield sorts[number % len(sorts)](dice)


async def send(host: str, port: int, what: Nonsense) -> Answered:
    """Send it on a connection of its own and read to the end. Raises TimeoutError if nothing comes back
    although it has to be answered."""
    is_partial = 0 in what.expected
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(_SHORT_PATIENCE_S if is_partial else _PATIENCE_S):
            with suppress(ConnectionError):  # the server may refuse before it has read all
                writer.write(what.data)
                await writer.drain()
            with suppress(ConnectionError):
                return _parse(await reader.read())
    except TimeoutError:
        if not is_partial:
            raise
    finally:
        writer.close()
    return Answered(0, b"")


def _parse(data: bytes) -> Answered:
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Answered(int(words[1]) if len(words) > 1 and words[1].isdigit() else 0, body)


def problem(what: Nonsense, found: Answered) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if found.status not in what.expected:
        expected = ", ".join(map(str, sorted(what.expected)))
        return f"{what.name}: found status {found.status}, expected {expected}: {found.body[:100]!r}"
    if found.status < 400:
        return None
    if len(found.body) > _MOST_BYTES:
        return f"{what.name}: an error of {len(found.body)} bytes, expected at most {_MOST_BYTES}"
    try:
        error = msgspec.json.decode(found.body)["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        error = {}
    if set(error) != {"message", "type", "param", "code"}:
        return f"{what.name}: found an error without OpenAI's shape: {found.body[:100]!r}"
    return None


# --- bodies


def _request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def _valid(dice: random.Random) -> tuple[str, dict[str, Any]]:
    path = dice.choice(sorted(_VALID))
    return path, dict(_VALID[path])


def _body(name: str, dice: random.Random, change: Callable[[bytes], bytes]) -> Nonsense:
    """A valid body, changed so that nobody can understand it."""
    path, body = _valid(dice)
    return Nonsense(name, _request(path, change(json.dumps(body).encode())), _REFUSED)


def _field(name: str, dice: random.Random, field: bytes) -> Nonsense:
    """A valid body with one more field, which the routes for answers have to read."""
    path = dice.choice(["/v1/completions", "/v1/chat/completions"])
    return Nonsense(name, _request(path, json.dumps(_VALID[path]).encode()[:-1] + field + b"}"), _REFUSED)


def _cut(dice: random.Random) -> Nonsense:
    return _body("a body cut short", dice, lambda body: body[: dice.randrange(len(body))])


def _bad_utf8(dice: random.Random) -> Nonsense:
    bad = dice.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
    return _body("bytes that are no UTF-8", dice, lambda body: body.replace(b'": ', bad + b'": ', 1))


def _control(dice: random.Random) -> Nonsense:
    return _body("a NUL outside of strings", dice, lambda body: body.replace(b":", b":\0", 1))


def _not_finite(dice: random.Random) -> Nonsense:
    word = dice.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"01"])
    return _field("a number that is none", dice, b', "top_p": ' + word)


def _huge_number(dice: random.Random) -> Nonsense:
    return _field("a number without end", dice, b', "max_tokens": ' + b"9" * dice.choice([30, 5000]))


def _deep(dice: random.Random) -> Nonsense:
    deep = dice.choice([100, 5000, 200_000])
    opened, closed = dice.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return _field("nesting without end", dice, b', "stop": ' + opened * deep + b"1" + closed * deep)


def _no_object(dice: random.Random) -> Nonsense:
    return _body(
        "no object", dice, lambda body: dice.choice([b"", b"null", b"[]", b"3", b'"x"', b"{}", b"{]"])
    )


def _many_values(dice: random.Random) -> Nonsense:
    return _body("a million values", dice, lambda body: b'{"prompt": [' + b"1," * 1_000_001 + b"1]}")


def _odd_values(dice: random.Random) -> Nonsense:
    """Fields with values that other fields have, or nobody."""
    path, body = _valid(dice)
    for name in dice.sample(_FIELDS, dice.randint(1, 3)):
        body[name] = dice.choice(_VALUES)
    limit = {} if path.endswith("tokenize") else {"max_completion_tokens": 4}  # some will be understood
    data = json.dumps(body | limit).encode()
    return Nonsense("odd values", _request(path, data), frozenset({200, 400, 404}))


def _twice(dice: random.Random) -> Nonsense:
    path, body = _valid(dice)
    text = json.dumps(body)
    data = text[:-1] + ", " + text[1:]
    return Nonsense("every field twice", _request(path, data.encode()), frozenset({200, 400}))


# --- frames


def _frame(name: str, data: bytes, *expected: int) -> Callable[[random.Random], Nonsense]:
    return lambda dice: Nonsense(name, data, frozenset(expected))


_FINE: Final = json.dumps(_VALID["/v1/completions"]).encode()
_POST: Final = "/v1/completions"
_BODIES: Final = (
    *(_cut, _bad_utf8, _control, _not_finite, _deep, _no_object, _huge_number, _twice),
    *(_odd_values,) * 12,
)
_FRAMES: Final = (
    _many_values,
    _frame("no such route", _request("/v1/nothing", _FINE), 404),
    _frame("a path that climbs", _request("/../../etc/passwd", _FINE), 404),
    _frame("the wrong method", _request(_POST, b"", method="DELETE"), 405),
    _frame("another content type", _request(_POST, _FINE, "Content-Type: text/plain"), 415),
    _frame("a compressed body", _request(_POST, b"\x1f\x8b", "Content-Encoding: gzip"), 415),
    _frame("a body longer than said", _request(_POST, _FINE, "Content-Length: 5"), 400),
    _frame("a body too large", _request(_POST, b"{", f"Content-Length: {1 << 40}"), 0, 400, 413),
    _frame("a length that is none", _request(_POST, _FINE, "Content-Length: -1"), 400),
    _frame("two lengths", _request(_POST, _FINE, "Content-Length: 5", "Content-Length: 6"), 400),
    _frame(
        "a length and chunks",
        _request(_POST, b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"),
        400,
    ),
    _frame("chunks that are none", _request(_POST, b"zz\r\n", "Transfer-Encoding: chunked"), 400),
    _frame("a header too long", _request(_POST, _FINE, "X-Long: " + "x" * 100_000), 0, 400),
    _frame("a header that is none", _request(_POST, _FINE, "no colon" + "x" * 60_000), 400),
    _frame("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", 400),
    _frame("another HTTP", b"POST / HTTP/9.9\r\n\r\n", 400, 404),
    _frame("half a request line", b"POST /v1/comp", 0),
)
