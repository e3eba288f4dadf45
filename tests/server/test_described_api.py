"""Requests made from our own OpenAPI document: whatever is sent, the answer is one that it knows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from engine.server import openapi
from tests.server.fakes import FakeEngine, script, server

schemathesis = pytest.importorskip("schemathesis")

NUM_EXAMPLES = 12  # for each operation


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on a thread with a loop of its own."""
    found: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with server(FakeEngine(script(b"He", b"llo"))) as api:
            found.append(api.url)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    stop.set()
    thread.join()


@pytest.mark.parametrize("operation", openapi.OPERATIONS, ids=lambda operation: operation.path)
def test_every_answer_is_described(operation: openapi.Operation, url: str) -> None:
    """Status, media type and schema; requests that fit the document may still be refused with 400, for it
    does not say everything."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as of_openapi

    checks = [
        not_a_server_error,
        of_openapi.status_code_conformance,
        of_openapi.content_type_conformance,
        of_openapi.response_schema_conformance,
    ]
    api = schemathesis.openapi.from_dict(openapi.document("1"))
    api.config.update(base_url=url)

    @given(case=api[operation.path][operation.method].as_strategy())
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.validate_response(case.call(), checks=checks)

    ask()
