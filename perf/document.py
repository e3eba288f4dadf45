"""A measurement's result: one JSON object that says what was measured and where. It is the last line of
stdout, and in a file if one is asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.build import Served
from perf.provenance import provenance


def described(benchmark: str, served: Served) -> dict[str, Any]:
    """The keys with which the result of an engine's measurement begins."""
    config = served.engine.config
    facts = {"benchmark": benchmark, "model": served.name, "draft": served.draft_name}
    return facts | provenance(config.device, config.dtype_name)


def add_json_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declare --json, the file for ``write``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")


def write(result: Mapping[str, Any], file: Path | None = None, **details: Any) -> None:
    """End with the result, on stdout and in the file. details: keys for the file alone, too long to print."""
    save({**result, **details}, file)
    sys.stdout.write(json.dumps(result) + "\n")


def save(result: Mapping[str, Any], file: Path | None) -> None:
    """Write the result, as far as it is known, to the file if there is one."""
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
