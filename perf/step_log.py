"""Reading the log that ``--spec-log`` writes (``verify.stats``): a line of JSON per step and request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import ConfigError

T = TypeVar("T")


def read_records(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """What ``parse`` makes of every line. Raises ConfigError, with the line's number where parsing failed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"log {path}: cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(f"log {path}, line {number}: not a step record ({error!r})") from error
    return found
