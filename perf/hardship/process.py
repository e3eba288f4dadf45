"""A server as a process of its own, on a free port of the loopback address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from engine.cli.client import ServerError
from engine.cli.environment import PREFIX

SERVE: Final = ("engine.cli.main", "serve")
_STOP_TIMEOUT: Final = 30.0  # seconds for a server to end after SIGTERM
_MOST_LINES: Final = 40


@dataclass(slots=True)
class ServerProcess:
    """A server that is ready. ``complaints``: the first lines of its log that are warnings, errors or
    traces."""

    url: str
    process: asyncio.subprocess.Process
    complaints: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ended(self) -> int | None:
        """Wait for it to end by itself; returns its exit code, None if it does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT):
                return await self.process.wait()
        return None

    async def end(self) -> int:
        """Terminate it; returns its exit code, which is negative if it did not listen and was killed."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                return await self.process.wait()
        except TimeoutError:
            self.process.kill()
            return await self.process.wait()


@asynccontextmanager
async def serving(flags: Sequence[str], module: Sequence[str] = SERVE) -> AsyncIterator[ServerProcess]:
    """A ready server; ends it whatever happens.

    flags: of ``haast serve``; module: what to run and its first words. Raises ServerError, with the last
    lines of its log, if it ends before it is ready.
    """
    words = ["--port", "0", "--shutdown-timeout", "5", "--exit-with-parent", *flags]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *module,
        *words,
        stderr=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.PIPE,  # closes when we end, even if we are killed
        env={name: value for name, value in os.environ.items() if not name.startswith(PREFIX)},
        start_new_session=True,
    )
    server = ServerProcess("", process)
    ready, lines = asyncio.Event(), list[str]()

    async def read_log() -> None:
        assert process.stderr is not None
        async for raw in process.stderr:
            line = raw.decode("utf-8", "replace").rstrip()
            found = re.search(r"Ready on (http://\S+)", line)
            if found:
                server.url = found[1]
                ready.set()
            if not ready.is_set():
                lines.append(line)
            elif not line.startswith("INFO ") and len(server.complaints) < _MOST_LINES:
                server.complaints.append(line)
        ready.set()

    reading = asyncio.create_task(read_log())
    try:
        await ready.wait()
        if not server.url:
            raise ServerError("the server ended before it was ready: " + "\n".join(lines[-5:]))
        yield server
    finally:
        await server.end()
        await reading
