"""What a server holds: before, while and after something happens to it.

    pages         haast:kv_cache_usage_perc of /metrics: the share that requests hold, cached ones not counted
    requests      haast:num_requests_running and _waiting: those the engine knows
    places        haast:num_places_taken: answers that were admitted and are not out
    tasks         haast:num_tasks: of the event loop, those of open connections among them
    descriptors   entries of /proc/PID/fd
    threads       Threads of /proc/PID/status
    memory        RssAnon of /proc/PID/status: what the process has resident and no file backs

The connection on which this is asked stays open, so that it counts in every census alike.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from engine.cli.client import session
from engine.errors import EngineError

_POLL_S: Final = 0.05
_GAUGES: Final = {
    "pages": "haast:kv_cache_usage_perc",
    "running": "haast:num_requests_running",
    "waiting": "haast:num_requests_waiting",
    "places": "haast:num_places_taken",
    "tasks": "haast:num_tasks",
}


@dataclass(frozen=True, slots=True)
class Census:
    """Counts at one moment; pages are a share of all, memory is in bytes."""

    pages: float
    running: float
    waiting: float
    places: float
    tasks: float
    descriptors: int
    threads: int
    memory: int

    def leftovers(self, before: Census) -> dict[str, tuple[float, float]]:
        """What there is more of than before, by name: (then, now). Of memory nothing is said: what an
        allocator keeps is no leak, and whether there is one only repetition can tell."""
        pairs = {
            field.name: (getattr(before, field.name), getattr(self, field.name))
            for field in fields(self)
            if field.name != "memory"
        }
        return {name: (then, now) for name, (then, now) in pairs.items() if now > then}


def resident_bytes(pid: int) -> int:
    """Anonymous memory of a process."""
    return _status(pid)["RssAnon"] << 10


def _status(pid: int) -> dict[str, int]:
    """The lines of /proc/PID/status that are a number, or a number of kB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split() or [""]
        if number.isdigit() and unit in ([], ["kB"]):
            found[name] = int(number)
    return found


class Observer:
    """Reads one server, over one connection."""

    def __init__(self, url: str, pid: int) -> None:
        self._url, self.pid = url, pid
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Observer:
        self._http = session(self._url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET; path without a slash in front."""
        assert self._http is not None, "an observer is entered before it is used"
        async with self._http.get(path) as response:
            return response.status, await response.read()

    async def metrics(self) -> dict[str, float]:
        """Every metric under its name, those with labels besides the model's as name{value}."""
        status, text = await self.get("metrics")
        if status != 200:
            raise EngineError(f"GET /metrics: found status {status}, expected 200")
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                labels = [value for name, value in sample.labels.items() if name != "model_name"]
                found[sample.name + "".join(f"{{{value}}}" for value in labels)] = sample.value
        return found

    async def take(self) -> Census:
        """Count now."""
        metrics = await self.metrics()
        gauges: dict[str, Any] = {name: metrics[metric] for name, metric in _GAUGES.items()}
        status = _status(self.pid)
        return Census(
            **gauges,
            descriptors=len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
            threads=status["Threads"],
            memory=status["RssAnon"] << 10,
        )

    async def at_rest(self, patience: float) -> Census:
        """The census of a server that nobody uses: the first that says so and equals the one before it.

        Raises EngineError if there is none within ``patience`` seconds.
        """
        clock = asyncio.get_running_loop().time
        deadline, last = clock() + patience, await self.take()
        while clock() < deadline:
            await asyncio.sleep(_POLL_S)
            now = await self.take()
            is_idle = not (now.pages or now.running or now.waiting or now.places)
            if is_idle and not now.leftovers(last) and not last.leftovers(now):
                return now
            last = now
        raise EngineError(f"the server does not come to rest: found {last} after {patience:g} s")

    async def settled(self, before: Census, patience: float) -> Census:
        """The first census without leftovers, or the last one of ``patience`` seconds."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + patience
        while True:
            now = await self.take()
            if not now.leftovers(before) or clock() >= deadline:
                return now
            await asyncio.sleep(_POLL_S)
