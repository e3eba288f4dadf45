"""Drafting settings as they are typed: ``8/4/4+lookup8`` is a tree of 8 nodes, 4 levels, 4 children a node.

Beside it, where the text repeats itself, prompt lookup may add up to 8 tokens. ``plain`` (or 1/0/1) drafts
nothing, ``auto`` leaves the choice to the engine, as a request does that says nothing about speculation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.checks import check_request
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from engine.errors import ConfigError, RequestError

Family = Literal["plain", "chain", "tree", "auto"]

PLAIN, AUTO = "plain", "auto"
_FORM = re.compile(r"(\d+)/(\d+)/(\d+)(?:\+lookup(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shape:
    """A setting and its name; ``speculation`` as in Request: None is the engine's own choice."""

    name: str
    speculation: Speculation | None

    @property
    def family(self) -> Family:
        """Which kind of drafting it is. A tree whose nodes have one child each is a chain."""
        if self.speculation is None:
            return "auto"
        if self.speculation.is_off:
            return "plain"
        return "chain" if self.speculation.top_k == 1 else "tree"


def shape(text: str) -> Shape:
    """Read one setting. Raises ConfigError with what was found and what is expected."""
    if text in (PLAIN, AUTO):
        return Shape(text, SPECULATION_OFF if text == PLAIN else None)
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"the shape {text!r:.60} is not one; expected plain, auto or NODES/DEPTH/TOP_K as in 8/4/4, with "
            "prompt lookup as in 8/4/4+lookup8"
        )
    speculation = Speculation(*(int(number or 0) for number in found.groups()))
    try:  # whatever a request may not ask for is no shape either
        check_request(Request(0, (0,), SamplingParams(), speculation), vocab_size=1)
    except RequestError as error:
        raise ConfigError(f"the shape {text!r:.60}: {error}") from error
    return Shape(PLAIN, SPECULATION_OFF) if speculation.is_off else Shape(text, speculation)


def shapes(texts: Iterable[str]) -> list[Shape]:
    """Read settings, plain decoding first whether it was named or not, none twice. Raises ConfigError."""
    found = [shape(PLAIN), *map(shape, texts)]
    return list({one.name: one for one in found}.values())
