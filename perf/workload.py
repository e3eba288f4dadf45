"""What a load generator asks: prompts of several kinds, drawn with a seed, so that two runs ask the same.

    chat               our own set, five kinds of chat questions
    custom             a JSON Lines file of our set's form; only ``prompt`` is needed, ``kind`` and
                       ``output_tokens`` may be there
    sharegpt           a JSON or JSON Lines file of conversations; the first human turn is the prompt
    random             words that mean nothing, for an exact control of lengths
    prefix_repetition  the same with long beginnings that several prompts share, for prefix caches

A client has no tokenizer of the server's model. Lengths of generated prompts are therefore counted in words,
of which every one is a token in the usual vocabularies; what they came to is in the server's usage, and that
is what a result reports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from engine.errors import ConfigError

DEFAULT_PROMPTS: Final = Path(__file__).parent / "prompts" / "chat.jsonl"

_COMMON = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community name "
    "president team minute idea body information back parent face level office door health person art war "
    "history party result change morning reason research girl guy moment air teacher force education the of "
    "and to in is that for it was on are as with they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many "
    "some so these would other into has more her two like him see could no make than first been its who now "
    "my made over did down only find use may long little very after called just where most know"
)
_WORDS: Final = _COMMON.split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt and the most tokens of its answer (None: as the run says). kind: what results are grouped
    by."""

    prompt: str
    kind: str
    output_len: int | None = None


def read_custom(path: Path) -> list[Ask]:
    """Prompts of a JSON Lines file. Raises ConfigError naming the line."""
    asks = []
    for where, fields in _objects(path):
        prompt, kind, length = fields.get("prompt"), fields.get("kind"), fields.get("output_tokens")
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{where}: found {_shown(fields)}, expected a text as prompt")
        if kind is not None and not isinstance(kind, str):
            raise ConfigError(f"{where}: kind is {kind!r:.40}, expected a text")
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ConfigError(f"{where}: output_tokens is {length!r:.40}, expected a number of at least 1")
        asks.append(Ask(prompt, kind or "custom", length))
    return _found(path, asks)


def read_sharegpt(path: Path) -> list[Ask]:
    """First human turns of a file of conversations; those that begin otherwise or have no answer are left
    out.

    Raises ConfigError naming the place.
    """
    asks = []
    for where, fields in _objects(path):
        turns = fields.get("conversations", fields.get("conversation"))
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ConfigError(f"{where}: found {_shown(fields)}, expected a list as conversations")
        text = turns[0].get("value") if len(turns) >= 2 else None
        if isinstance(text, str) and text and turns[0].get("from") in ("human", "user"):
            asks.append(Ask(text, "sharegpt"))
    return _found(path, asks)


def _objects(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where, object) for everything in a JSON list or a JSON Lines file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path}: cannot be read ({error})") from error
    if text.lstrip().startswith("["):
        items = [(f"prompts {path}", text)]
    else:
        lines = enumerate(text.split("\n"), start=1)  # a text may hold other line ends
        items = [(f"prompts {path}, line {number}", line) for number, line in lines if line.strip()]
    for where, item in items:
        try:
            value = json.loads(item)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from error
        for fields in value if isinstance(value, list) else [value]:
            if not isinstance(fields, dict):
                raise ConfigError(f"{where}: found {_shown(fields)}, expected an object")
            yield where, fields


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def _found(path: Path, asks: list[Ask]) -> list[Ask]:
    if not asks:
        raise ConfigError(f"prompts {path}: no prompt found")
    return asks


def generated(
    num: int,
    input_len: int,
    rng: np.random.Generator,
    *,
    prefix_len: int = 0,
    num_prefixes: int = 1,
    range_ratio: float = 0.0,
    kind: str = "random",
) -> list[Ask]:
    """``num`` prompts of random words.

    input_len: words of a prompt of its own, drawn evenly from ``input_len * (1 -+ range_ratio)``; prefix_len:
    words before them, which all prompts with the same of ``num_prefixes`` beginnings share. The beginnings
    take turns, so that their numbers of prompts differ by one at most.
    """
    low, high = round(input_len * (1 - range_ratio)), round(input_len * (1 + range_ratio))
    lengths = rng.integers(max(low, 1), max(high, 1), size=num, endpoint=True)
    prefixes = [_words(prefix_len, rng) for _ in range(num_prefixes)]
    return [
        Ask(" ".join(prefixes[number % num_prefixes] + _words(int(length), rng)), kind)
        for number, length in enumerate(lengths)
    ]


def _words(num: int, rng: np.random.Generator) -> list[str]:
    return [_WORDS[number] for number in rng.integers(0, len(_WORDS), size=num)]


def pick(asks: Sequence[Ask], num: int | None, rng: np.random.Generator | None) -> list[Ask]:
    """``num`` of the prompts, each kind as often as any other as far as it goes; all of them for None.

    Shuffled unless ``rng`` is None, and repeated from the start where there are too few.
    """
    order = list(range(len(asks)))
    if rng is not None:
        rng.shuffle(order)
    seen: dict[str, int] = {}
    turns = {}
    for index in order:
        turns[index] = seen[asks[index].kind] = seen.get(asks[index].kind, 0) + 1
    chosen = sorted(order, key=turns.__getitem__) if num is not None and num < len(asks) else order
    wanted = len(asks) if num is None else num
    return [asks[chosen[number % len(chosen)]] for number in range(wanted)]


def with_lengths(asks: Sequence[Ask], output_len: int) -> list[Ask]:
    """The prompts, each with an answer's length: its own or this."""
    return [ask if ask.output_len is not None else replace(ask, output_len=output_len) for ask in asks]
