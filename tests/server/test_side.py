"""Routes beside generation: metrics, tokens, facts, the API's own description."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import jsonschema
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.canary import CanaryCounts
from engine.server import openapi
from engine.server.app import create_app
from engine.server.metrics import RequestStats
from engine.server.state import ServerOptions, ServerState
from engine.server.totals import Histogram, Totals
from tests.server.fakes import FakeEngine, Server, script, server, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
GETS = ("/metrics", "/server_info", "/version", "/v1/models", "/health", "/ready", "/openapi.json")


async def samples(api: Server) -> dict[str, float]:
    """Every sample of /metrics by its name and its labels besides the model."""
    async with api.http.get("/metrics") as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/plain; version=")
        text = await reply.text()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "fake"
            found[sample.name + "".join(f"|{value}" for value in labels.values())] = sample.value
    return found


def test_metrics_count_what_happened_under_both_names() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(b"He", b"llo"), canary=CanaryCounts(12, 0, 2, 1))
        async with server(engine) as api:
            for _ in range(3):
                assert (await api.post(CHAT, BODY))[0] == 200
            assert (await api.post(CHAT, {**BODY, "user": "me", "temperature": 9}))[0] == 400
            await until(lambda: api.state.serving.runner.state.num_asked == 15)  # type: ignore[union-attr]
            found = await samples(api)
        for prefix in ("haast:", "vllm:"):
            for name, value in {
                "num_requests_running": 0,
                "num_requests_waiting": 0,
                "kv_cache_usage_perc": 0,
                "prompt_tokens_total": 15,
                "generation_tokens_total": 18,
                "prefix_cache_queries_total": 15,
                "prefix_cache_hits_total": 12,
                "request_success_total|stop": 3,
                "spec_decode_num_drafts_total": 3,
                "spec_decode_num_draft_tokens_total": 9,
                "spec_decode_num_accepted_tokens_total": 6,
                "spec_decode_num_accepted_tokens_per_pos_total|0": 3,
                "spec_decode_num_accepted_tokens_per_pos_total|1": 3,
                "time_to_first_token_seconds_count": 3,
                "inter_token_latency_seconds_count": 15,
                "e2e_request_latency_seconds_bucket|+Inf": 3,
                "request_queue_time_seconds_count": 3,
            }.items():
                assert found[prefix + name] == value, name
            assert found[prefix + "time_to_first_token_seconds_sum"] > 0
        assert found["haast:canary_bugs_total"] == 1
        assert found["haast:requests_refused_total|invalid_value"] == 1
        assert (found["haast:engine_up"], found["haast:num_queued_prompt_tokens"]) == (1, 0)
        assert (found["haast:num_places_taken"], found["haast:num_tasks"] > 0) == (0, True)
        assert "vllm:canary_bugs_total" not in found

    asyncio.run(scenario())


def test_metrics_of_a_dead_engine() -> None:
    async def scenario() -> None:
        async with server(FakeEngine(fail_at=0)) as api:
            for _ in range(3):
                assert (await api.post(CHAT, BODY))[0] == 500
            found = await samples(api)
            assert (found["haast:engine_up"], found["haast:failed_steps_total"]) == (0, 3)
            assert found["vllm:request_success_total|error"] == 3

    asyncio.run(scenario())


def test_a_histogram_counts_up_to_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, count in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, count)
    assert (histogram.counts, histogram.total) == ([3, 1, 3], 0.5 + 2.0 + 1.5 + 27.0)


def test_a_request_without_tokens_has_no_times() -> None:
    totals = Totals()
    totals.add_request(RequestStats(0.0, 4), "abort")
    assert (totals.finished, totals.queued.total, sum(totals.first_token.counts)) == ({"abort": 1}, 0.0, 0)


def test_cve_2026_43632_side_routes_never_touch_the_engine() -> None:
    """Every call of the engine is made on its own thread."""
    callers: set[str] = set()

    class Watched(FakeEngine):
        def __getattribute__(self, name: str) -> Any:
            if name not in ("config", "hold", "step_time") and not name.startswith("_"):
                callers.add(threading.current_thread().name)
            return super().__getattribute__(name)

    async def scenario() -> None:
        engine = Watched()
        async with server(engine) as api:
            await api.post(CHAT, BODY)
            await until(lambda: not api.state.serving.runner.in_flight)  # type: ignore[union-attr]
            callers.clear()
            for path in GETS:
                async with api.http.get(path) as reply:
                    assert reply.status == 200, path
            assert (await api.post("/tokenize", {"prompt": "ab"}))[0] == 200
            assert (await api.post("/detokenize", {"tokens": [97]}))[0] == 200
            await api.post(CHAT, BODY)
            assert callers == {"engine"}

    asyncio.run(scenario())


def test_tokens_and_back() -> None:
    async def scenario() -> None:
        async with server() as api:
            _, reply, _ = await api.post("/tokenize", {"prompt": "h\u00e9", "model": "fake"})
            assert reply == {"count": 3, "max_model_len": 64, "tokens": [104, 0xC3, 0xA9]}
            _, reply, _ = await api.post("/tokenize", {"messages": BODY["messages"]})
            assert bytes(reply["tokens"]) == b"u:Hi;"
            _, reply, _ = await api.post("/tokenize", {"prompt": "a", "return_token_strs": True})
            assert reply["token_strs"] == [None]  # the fake has no texts
            _, reply, _ = await api.post("/detokenize", {"tokens": [104, 0xC3, 0xA9]})
            assert reply == {"prompt": "h\u00e9"}
            for path, body, param in (
                ("/tokenize", {}, "prompt"),
                ("/tokenize", {"prompt": "a", "messages": BODY["messages"]}, "prompt"),
                ("/tokenize", {"prompt": "x" * 999_999}, "prompt"),
                ("/tokenize", {"messages": []}, "messages"),
                ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
                ("/detokenize", {"tokens": [257]}, "tokens[0]"),
                ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
                ("/detokenize", {"tokens": [1 << 70]}, "tokens[0]"),
                ("/detokenize", {}, "tokens"),
            ):
                status, reply, _ = await api.post(path, body)
                assert (status, reply["error"]["param"]) == (400, param), body
            assert (await api.post("/tokenize", {"prompt": "a", "model": "other"}))[0] == 404
            assert (await api.post("/tokenize", b"{}", **{"Content-Type": "text/plain"}))[0] == 415

    asyncio.run(scenario())


def test_tokenising_has_a_queue_with_an_end() -> None:
    async def scenario() -> None:
        async with server() as api:
            assert api.state.serving is not None
            gate = threading.Event()
            jobs = [asyncio.create_task(api.state.serving.beside(gate.wait)) for _ in range(16)]
            await asyncio.sleep(0)
            status, reply, headers = await api.post("/tokenize", {"prompt": "a"})
            assert (status, reply["error"]["code"], headers["Retry-After"]) == (503, "queue_full", "1")
            assert (await api.post(CHAT, BODY))[0] == 200  # answers have threads of their own
            gate.set()
            await asyncio.gather(*jobs)
            assert (await api.post("/tokenize", {"prompt": "a"}))[0] == 200

    asyncio.run(scenario())


def test_server_info_says_what_is_served_and_no_key() -> None:
    async def scenario() -> None:
        async with server(api_keys=("hunter2",), served_names=("a", "b")) as api:
            assert (await api.get("/server_info"))[0] == 401
            _, found, _ = await api.get("/server_info", Authorization="Bearer hunter2")
            assert (found["model"], found["root"], found["max_model_len"]) == ("a", "/models/fake", 64)
            assert found["speculation"]["is_on"]
            assert found["sampling_defaults"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            assert found["limits"]["body_bytes"] == 32 << 20
            assert found["open_routes"] == ["/health", "/ready"]
            assert b"hunter2" not in msgspec.json.encode(found)
        async with server(draft_name="none") as api:
            assert not (await api.get("/server_info"))[1]["speculation"]["is_on"]

    asyncio.run(scenario())


# --- the description


def test_every_route_is_described_and_nothing_else() -> None:
    app = create_app(ServerState(ServerOptions()))
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = openapi.document("1")["paths"]
    assert {(method, path) for path, found in described.items() for method in found} == routes


def test_answers_and_errors_are_as_described() -> None:
    """Real ones, against the schemas; and the schemas refuse what they should."""
    document = openapi.document("1")

    def check(path: str, method: str, status: int, reply: Any) -> None:
        content = document["paths"][path][method]["responses"][str(status)]["content"]
        schema = content["application/json"]["schema"] | {"components": document["components"]}
        jsonschema.validate(reply, schema, cls=jsonschema.Draft202012Validator)

    async def scenario() -> None:
        async with server() as api:
            for path in GETS[1:]:
                check(path, "get", 200, (await api.get(path))[1])
            check("/v1/models/{id}", "get", 200, (await api.get("/v1/models/fake"))[1])
            check("/v1/models/{id}", "get", 404, (await api.get("/v1/models/other"))[1])
            bodies = {
                CHAT: {**BODY, "return_token_ids": True},
                TEXT: {"prompt": "a", "return_token_ids": True},
                "/tokenize": {"prompt": "a"},
                "/detokenize": {"tokens": [97]},
            }
            for path, body in bodies.items():
                reply = (await api.post(path, body))[1]
                check(path, "post", 200, reply)
                with pytest.raises(jsonschema.ValidationError):
                    check(path, "post", 200, {**reply, "choices": 3, "tokens": "a", "prompt": 3})
                status, reply, _ = await api.post(path, b"[]")
                check(path, "post", status, reply)
                request = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
                schema = request["schema"] | {"components": document["components"]}
                jsonschema.validate(body, schema, cls=jsonschema.Draft202012Validator)

    asyncio.run(scenario())


# --- token ids in answers


def test_token_ids_of_chat() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(b"one ", b"two E", b"ND ", b"more"), step_time=0.01)
        async with server(engine) as api:
            body = {**BODY, "stop": ["END"], "return_token_ids": True}
            _, reply, _ = await api.post(CHAT, body)
            assert bytes(reply["prompt_token_ids"]) == b"u:Hi;"
            assert bytes(reply["choices"][0]["token_ids"]) == b"one two END"
            assert len(reply["choices"][0]["token_ids"]) == reply["usage"]["completion_tokens"]
            *events, _ = await api.stream(body)
            ids = [token for event in events for token in event["choices"][0]["token_ids"]]
            assert bytes(ids) == b"one two END"
            assert ["prompt_token_ids" in event for event in events] == [True] + [False] * (len(events) - 1)
            assert "token_ids" not in (await api.post(CHAT, BODY))[1]["choices"][0]

    asyncio.run(scenario())


def test_token_ids_of_completions() -> None:
    async def scenario() -> None:
        async with server() as api:
            _, reply, _ = await api.post(TEXT, {"prompt": ["a", "bc"], "return_token_ids": True})
            assert [bytes(choice["prompt_token_ids"]) for choice in reply["choices"]] == [b"a", b"bc"]
            assert reply["choices"][0]["token_ids"] == [*b"Hello", 256]
            assert "prompt_token_ids" not in reply

    asyncio.run(scenario())
