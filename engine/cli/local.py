"""Answers in process: the engine driven directly on the calling thread, no server and no second thread."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from engine.build import Served
from engine.core import Request
from engine.server.metrics import StampedDelta
from engine.server.output import Output, Reading, output_for
from engine.text.output_parser import Event


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did for one answer."""

    output: Output
    events: list[Event]  # what became certain, possibly nothing
    error: str | None = None  # why it ended, if it failed


class LocalEngine:
    """Submits requests and steps the engine as long as there is work."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._outputs: dict[int, Output] = {}
        self._ids = itertools.count(1)

    @property
    def num_active(self) -> int:
        """Requests submitted and not finished."""
        return len(self._outputs)

    def submit(self, request: Request, reading: Reading = Reading.TEXT) -> Output:
        """Queue a request under a new id. Raises RequestError if it could never run."""
        numbered = dataclasses.replace(request, id=next(self._ids))
        output = output_for(self._served, numbered, time.perf_counter(), reading)
        self._served.engine.add(numbered)
        self._outputs[numbered.id] = output
        return output

    def step(self) -> Iterator[Progress]:
        """Run one step and report what it did, request by request."""
        started = time.perf_counter()
        deltas = self._served.engine.step()
        ended = time.perf_counter()
        for delta in deltas:
            output = self._outputs.get(delta.request_id)
            if output is None:
                continue  # aborted; this is its farewell
            events = output.push(StampedDelta(delta, started, ended))
            if output.finish_reason is not None:
                del self._outputs[delta.request_id]
                if delta.finish_reason is None:  # a stop string: the engine does not know yet
                    self._served.engine.abort(delta.request_id)
            yield Progress(output, events, delta.error)

    def stream(self, request: Request, reading: Reading = Reading.TEXT) -> Iterator[Progress]:
        """Answer one request; abandoning the iteration aborts it. Raises RequestError."""
        output = self.submit(request, reading)
        try:
            while output.finish_reason is None:
                yield from self.step()
        finally:
            if self._outputs.pop(output.request.id, None) is not None:
                self._served.engine.abort(output.request.id)
                self._served.engine.step()  # takes the farewell out, so that nothing is left over
