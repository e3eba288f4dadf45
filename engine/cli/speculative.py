"""What to draft and with which head, from the flags: one by one, or in vLLM's ``--speculative-config``.

    {"model": HEAD, "method": "eagle", "num_speculative_tokens": 3, "max_model_len": 16384}

``num_speculative_tokens`` (``--spec-tokens``) is what it is in vLLM, the number of drafted tokens and the
most that a step may accept. But they are drafted as a tree of that size and depth and not as a chain, so
that unlikely ends of the chain make room for second guesses; ``"top_k": 1`` makes it the chain. Keys of
ours: ``tree``, the number of nodes with the root, ``depth``, ``top_k``, and ``lookup``, the longest chain
that prompt lookup may add where the text repeats itself (0 turns that off).

    {"num_speculative_tokens": 3}                 4 nodes, up to 3 deep
    {"num_speculative_tokens": 3, "top_k": 1}     a chain of 3
    {"num_speculative_tokens": 3, "tree": 8}      8 nodes, up to 3 deep
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from engine.build import DEFAULT_HEAD, open_head
from engine.checkpoint.native import MistralHead
from engine.cli.environment import nearest
from engine.config import Fields
from engine.core import Speculation
from engine.errors import ConfigError

METHODS: Final = ("eagle", "eagle3", "ngram", "none")
FLAG: Final = "--speculative-config"
_RANGES: Final = {
    "num_speculative_tokens": (1, 16),
    "tree": (1, 64),
    "depth": (0, 16),
    "top_k": (1, 16),
    "lookup": (0, 16),
    "max_model_len": (1, 2**31 - 1),
    "draft_tensor_parallel_size": (1, 1),
}
KEYS: Final = ("model", "method", *_RANGES)
# What flags say one by one, in the order of Asked's fields: their values' names, they themselves, and keys.
_FLAGS: Final = (
    ("spec_model", "--spec-model", "model"),
    ("spec_method", "--spec-method", "method"),
    ("spec_tokens", "--spec-tokens", "num_speculative_tokens"),
    ("spec_nodes", "--spec-nodes", "tree"),
    ("spec_depth", "--spec-depth", "depth"),
    ("spec_top_k", "--spec-top-k", "top_k"),
    ("spec_lookup", "--spec-lookup", "lookup"),
    ("spec_max_model_len", "--spec-max-model-len", "max_model_len"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, None where nothing was."""

    head: str | None = None  # a directory, a hub id, "ngram" or "none"
    method: str | None = None
    num_tokens: int | None = None
    nodes: int | None = None
    depth: int | None = None
    top_k: int | None = None
    lookup: int | None = None
    max_model_len: int | None = None

    def size(self, default: Speculation) -> Speculation:
        """The tree to draft."""
        if self.num_tokens is not None:
            default = dataclasses.replace(
                default,
                nodes=self.num_tokens + 1,
                depth=self.num_tokens,
                lookup=min(default.lookup, self.num_tokens),
            )
        asked = {"nodes": self.nodes, "depth": self.depth, "top_k": self.top_k, "lookup": self.lookup}
        given = {name: number for name, number in asked.items() if number is not None}
        if self.nodes == 1:  # which turns speculation off, prompt lookup too unless it is asked for
            given.setdefault("lookup", 0)
        return dataclasses.replace(default, **given)


def asked(args: argparse.Namespace) -> Asked:
    """What the flags of ``add_engine_arguments`` ask for. Raises ConfigError naming the flag or key."""
    text: str | None = args.speculative_config
    if text is None:
        return _consistent(_from_flags(args), {key: flag for _, flag, key in _FLAGS})
    clashes = [flag for name, flag, _ in _FLAGS if getattr(args, name) is not None]
    if clashes:
        raise ConfigError(
            f"found {_spoken(args, FLAG)} and {_spoken(args, clashes[0])}, expected one of them: both say "
            "what to draft"
        )
    found = from_json(text)
    has_target = args.model is not None or args.model_flag is not None
    if has_target and found.head is None:
        raise ConfigError(f"{FLAG}: required key 'model' is missing, a draft head, or 'method': 'ngram'")
    return found


def from_json(text: str) -> Asked:
    """Read the value of ``--speculative-config``. Raises ConfigError naming the key."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{FLAG} is {text!r:.80}, expected a JSON object: {error}") from error
    for key in raw:
        if key not in KEYS:
            close = nearest(key, KEYS)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(KEYS)}"
            raise ConfigError(f"{FLAG}: unknown key {key!r:.80}; {hint}")
    length = raw.get("max_model_len")
    if isinstance(length, str) and re.fullmatch("[0-9]{1,10}", length):  # so in published launch lines
        raw["max_model_len"] = int(length)
    fields = Fields(raw, FLAG)
    numbers = {
        key: None if fields.absent(key) else fields.whole(key, least=least, most=most)
        for key, (least, most) in _RANGES.items()
    }
    model, method = fields.text("model", "") or None, fields.text("method", "") or None
    if method is not None and method not in METHODS:
        raise fields.error("method", _listed(METHODS))
    read = Asked(model, method, *(numbers[key] for _, _, key in _FLAGS if key in numbers))
    return _consistent(read, {key: f"{FLAG}: {key}" for key in KEYS})


def check_method(found: Asked, dummy: bool = False) -> None:
    """ConfigError if the head is not of the method asked for. Reads the head's config.

    found: the shipped head is meant where none is named. dummy: its weights will be random numbers.
    """
    if found.method not in ("eagle", "eagle3"):
        return
    head = open_head(str(DEFAULT_HEAD) if found.head is None else found.head, dummy)
    kind = "eagle" if isinstance(head, MistralHead) else head.kind
    if kind != found.method:
        raise ConfigError(f"the method asked for is {found.method!r}, but {head.path} is a head of {kind!r}")


def _from_flags(args: argparse.Namespace) -> Asked:
    for name, flag, key in _FLAGS:
        value = getattr(args, name)
        if isinstance(value, int) and key != "max_model_len":  # EngineConfig checks that
            least, most = _RANGES[key]
            if not least <= value <= most:
                raise ConfigError(f"{flag} is {value}, expected {least} to {most}")
    return Asked(*(getattr(args, name) for name, _, _ in _FLAGS))


def _consistent(found: Asked, names: dict[str, str]) -> Asked:
    """The same with the head that a method implies, if all of it fits together. names: of keys, for
    messages.
    """
    if None not in (found.num_tokens, found.depth) and found.num_tokens != found.depth:
        raise ConfigError(
            f"{names['num_speculative_tokens']} is {found.num_tokens} and {names['depth']} is {found.depth}, "
            "expected one of them"
        )
    if found.method in ("ngram", "none"):
        if found.head not in (None, found.method):
            raise ConfigError(
                f"{names['method']} is {found.method!r} and {names['model']} is {found.head!r}, "
                "expected one of them"
            )
        return dataclasses.replace(found, head=found.method)
    if found.method is not None and found.head in ("ngram", "none"):
        raise ConfigError(
            f"{names['method']} is {found.method!r} and {names['model']} is {found.head!r}, "
            "expected a draft head there"
        )
    return found


def _spoken(args: argparse.Namespace, flag: str) -> str:
    """A flag for a message, with where it came from if it was not typed."""
    sources = {given.flag: given.source for given in getattr(args, "given", ())}
    source = sources.get(flag, "flag")
    return flag if source == "flag" else f"{flag} (from {source})"


def _listed(names: Iterable[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"
