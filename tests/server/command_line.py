"""What the tests of the command line share: parsed flags, and a server to talk to."""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.cli import main
from tests.server.fakes import FakeEngine, script, server


def parse(verb: Any, *words: str) -> argparse.Namespace:
    parser = main.Parser()
    verb.add_arguments(parser)
    return parser.parse_args(words)


@contextmanager
def background_server(engine: FakeEngine | None = None, tokenizer: Any = None) -> Iterator[str]:
    """The fake server on a thread with a loop of its own."""
    ready, stop = threading.Event(), threading.Event()
    urls: list[str] = []

    async def scenario() -> None:
        async with server(engine or FakeEngine(script(b"He", b"llo")), tokenizer=tokenizer) as api:
            urls.append(api.url)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(scenario()))
    thread.start()
    assert ready.wait(10)
    try:
        yield urls[0]
    finally:
        stop.set()
        thread.join(10)
