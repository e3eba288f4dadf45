"""Sampling flags that ``chat`` and ``generate`` share, as fields of a request body."""

from __future__ import annotations

import argparse


def add_sampling_arguments(
    parser: argparse.ArgumentParser, temperature: float, max_tokens: int | None
) -> None:
    """Declare the flags; temperature and max_tokens (None: as many as fit) are the verb's defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 is off")
    group.add_argument("--top-k", type=int, default=0, help="0 is off")
    group.add_argument("--min-p", type=float, default=0.0, help="0 is off")
    group.add_argument(
        "--seed", type=int, help="same seed, same answer; without it, every answer draws its own"
    )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help="longest answer; without it, as many tokens as fit",
    )
    group.add_argument("--speculation", choices=("auto", "off"), default="auto", help="off decodes plainly")


def sampling_fields(args: argparse.Namespace) -> dict[str, object]:
    """The flags as fields of an OpenAI request; they are checked where every request is."""
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "speculation")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
