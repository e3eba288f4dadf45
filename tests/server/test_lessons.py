"""What went wrong in other servers, and does not here: a test for each published lesson.

Lessons with a room of their own are tested there: CVE-2024-28224 (host names) and CVE-2025-48956 (headers) in
``test_access``, CVE-2026-43632 (side routes) in ``test_side``, files that lie about their sizes in
``tests/checkpoint``, what must never be written in ``tests/test_imports``.
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import hmac
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.http_parser import HttpRequestParserPy
from aiohttp.web_urldispatcher import StaticResource

from engine.checkpoint import hub
from engine.core import Request, SamplingParams
from engine.errors import CheckpointError, ConfigError, RequestError
from engine.server import lifecycle, openapi
from engine.server.app import create_app
from engine.server.state import ServerOptions, ServerState
from tests.engine.rig import make_engine, prompts_of, random_model
from tests.server.fakes import server
from tests.server.test_launch_line import refusal
from tests.test_imports import ROOT, imports, sources

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


# --- no number without a bound


@pytest.mark.parametrize("body", [{**BODY, "n": 16384}, {**BODY, "n": 1 << 70}, {**BODY, "best_of": 16384}])
def test_cve_2026_34756_n_is_bounded(body: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with server() as api:
            assert (await api.post(CHAT, body))[0] == 400
            assert api.engine.added == []

    asyncio.run(scenario())


def test_cve_2026_73559_the_list_of_prompts_is_bounded() -> None:
    async def scenario() -> None:
        async with server() as api:
            for prompt in (["a"] * 17, [[1]] * 100_000):
                status, reply, _ = await api.post(TEXT, {"prompt": prompt})
                assert (status, reply["error"]["param"]) == (400, "prompt")
            assert api.engine.added == []

    asyncio.run(scenario())


def integers() -> Iterator[tuple[str, str]]:
    """(path, field) of every field of a body that takes a whole number."""
    document = openapi.document("1")
    for path, name in ((CHAT, "ChatRequest"), (TEXT, "CompletionRequest")):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            kinds = [schema, *schema.get("anyOf", ())]
            if any(kind.get("type") == "integer" for kind in kinds):
                yield path, field


@pytest.mark.parametrize(("path", "field"), list(integers()))
def test_cve_2026_21869_every_integer_has_a_range(path: str, field: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            body = BODY if path == CHAT else {"prompt": "a"}
            for value in (-(1 << 70), -(1 << 63) - 1, 1 << 63, 1 << 70):
                status, reply, _ = await api.post(path, {**body, field: value})
                assert (status, reply["error"]["param"]) == (400, field), value
            assert api.engine.added == []

    asyncio.run(scenario())


def test_the_integers_are_found() -> None:
    assert {"n", "seed", "top_k", "max_tokens", "priority"} <= {field for _, field in integers()}


# --- strings that become keys


@pytest.mark.parametrize("salt", ["", "x" * 129, "a b", "a\n", "\0", "\u00e9", "a'; drop", "{}"])
def test_cve_2026_105756_a_salt_is_short_and_plain(salt: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            status, reply, _ = await api.post(CHAT, {**BODY, "cache_salt": salt})
            assert (status, reply["error"]["param"]) == (400, "cache_salt")

    asyncio.run(scenario())


def test_cve_2025_46570_a_salt_hides_what_others_asked() -> None:
    engine = make_engine(random_model())
    prompt = tuple(prompts_of([40])[0])
    found = []
    for number, salt in enumerate(("mine", "theirs", "", "mine")):
        engine.add(Request(number, prompt, SamplingParams(temperature=0, max_tokens=2), cache_salt=salt))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        found.append(deltas[-1].num_cached)
    assert found[:3] == [0, 0, 0]
    assert found[3] > 30


def test_cve_2025_46570_each_of_several_keys_has_a_salt_of_its_own() -> None:
    """Whatever a client sends as its salt, it finds no row that another key's client left."""

    async def salts_of(*keys: str) -> list[list[str]]:
        async with server(api_keys=keys) as api:
            for key in keys:
                for more in ({}, {"cache_salt": "mine"}, {"cache_salt": "mine"}):
                    headers = {"Authorization": f"Bearer {key}"}
                    assert (await api.post(CHAT, BODY | more, **headers))[0] == 200
            salts = [request.cache_salt for request in api.engine.added]
            for salt in salts[3:]:  # what another client has, should it become known
                body = BODY | {"cache_salt": salt}
                assert (await api.post(CHAT, body, Authorization=f"Bearer {keys[0]}"))[0] == 200
                assert api.engine.added[-1].cache_salt not in salts
            return [salts[at : at + 3] for at in range(0, len(salts), 3)]

    assert asyncio.run(salts_of("alone")) == [["", "mine", "mine"]]
    first, second = asyncio.run(salts_of("first", "second"))
    assert [first[1], second[1]] == [first[2], second[2]]  # its own rows each of them finds
    assert len({*first, *second}) == 4
    assert not any("first" in salt or "mine" in salt for salt in first)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "a/../../b", "fake%00", "/fake"]
)
def test_cve_2024_37032_a_models_name_is_no_path(name: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            async with api.http.get(f"/v1/models/{name}") as reply:
                assert reply.status == 404
            status, answer, _ = await api.post(CHAT, {**BODY, "model": name})
            assert (status, answer["error"]["code"]) == (404, "model_not_found")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "name", ["../secret", "org/..", "org/../x", "/no/such", "org/name/file", "org/na me"]
)
def test_cve_2026_103663_a_hub_name_is_no_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_download", lambda hub_id: pytest.fail(f"{hub_id} was asked for"))
    with pytest.raises(CheckpointError, match="not a hub name"):
        hub.local_directory(name)


# --- checks that are everywhere


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (Request(0, (), SamplingParams()), "prompt"),
        (Request(0, (97,), SamplingParams()), "prompt"),
        (Request(0, (-1,), SamplingParams()), "prompt"),
        (Request(0, (1,), SamplingParams(max_tokens=0)), "max_tokens"),
        (Request(0, (1,), SamplingParams(temperature=float("nan"))), "temperature"),
        (Request(0, (1,), SamplingParams(top_k=1 << 40)), "top_k"),
        (Request(0, (1,), SamplingParams(seed=1 << 63)), "seed"),
        (Request(0, (1,), SamplingParams(), priority=1 << 31), "priority"),
        (Request(0, (1,), SamplingParams(), cache_salt="x" * 129), "cache_salt"),
    ],
)
def test_cve_2026_116173_the_engine_checks_what_the_routes_check(request_: Request, param: str) -> None:
    engine = make_engine(random_model())
    with pytest.raises(RequestError) as caught:
        engine.add(request_)
    assert caught.value.param == param


def test_cve_2026_41523_checks_survive_python_without_asserts() -> None:
    code = """
from engine.core import Request, SamplingParams
from engine.errors import RequestError
from engine.scheduler import check_request
from engine.server import protocol
assert False, 'asserts are on'
bad = [b'{}', b'{"messages": []}', b'[]', b'{', b'{"messages": [{"role": "user"}]}']
hi = b'{"messages": [{"role": "user", "content": "a"}], '
bad += [hi + more + b'}' for more in (b'"n": 99', b'"temperature": 3', b'"seed": 1e99', b'"stop": [""]',
    b'"cache_salt": "a b"', b'"tools": [[]]', b'"stream_options": {"include_usage": true}')]
refused = 0
for body in bad:
    try:
        protocol.decode_chat(body)
    except RequestError:
        refused += 1
good = SamplingParams()
for request in (Request(0, (), good), Request(0, (9,), good), Request(0, (1,), good, priority=1 << 31),
                Request(0, (1,), SamplingParams(top_p=0.0))):
    try:
        check_request(request, 9)
    except RequestError:
        refused += 1
print(refused, len(bad) + 4)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, asked = done.stdout.split()
    assert refused == asked


def test_cve_2025_59425_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return ours == theirs

    monkeypatch.setattr(hmac, "compare_digest", compare)

    async def scenario() -> None:
        async with server(api_keys=("first", "second")) as api:
            for key, status in (("first", 200), ("second", 200), ("firs", 401), ("", 401)):
                compared.clear()
                assert (await api.get("/version", Authorization=f"Bearer {key}"))[0] == status
                assert len(compared) == 2  # both, whichever fits
                assert {len(value) for pair in compared for value in pair} == {32}  # hashes

    asyncio.run(scenario())


# --- what is never read, run or fetched


def test_cve_2025_62164_no_tensor_comes_from_a_request() -> None:
    async def scenario() -> None:
        async with server() as api:
            pickled = "gASVHQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAR0cnVllIWUUpQu"
            assert (await api.post(TEXT, {"prompt_embeds": pickled}))[0] == 400
            assert (await api.post(TEXT, {"prompt": {"embeds": pickled}}))[0] == 400
            assert api.engine.added == []

    asyncio.run(scenario())


def test_cve_2025_32444_one_socket_and_no_message_queue() -> None:
    """Nothing listens but the HTTP server, and nothing unpickles: tests/test_imports holds that."""
    doors = []
    for path in sources(("engine", "draft", "verify", "kernels")):
        tree = ast.parse(path.read_text())
        modules = {name.split(".")[0] for _, name in imports(path, tree)}
        assert not modules & {"zmq", "multiprocessing", "xmlrpc", "socketserver"}, path
        if "socket" in modules:
            doors.append(path.relative_to(ROOT).as_posix())
    assert doors == ["engine/server/lifecycle.py"]


def test_cve_2026_22807_no_code_from_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no code from a checkpoint is ever run" in refusal(capsys, "--trust-remote-code")
    for path in sources(("engine", "draft")):
        text = path.read_text()
        assert "auto_map" not in text, path
        if path.is_relative_to(ROOT / "engine" / "checkpoint"):
            assert "importlib" not in text, path


def test_cve_2026_47155_all_files_have_one_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights come from the commit that the small files came from, whatever main names by then."""
    asked: list[str | None] = []
    commit = tmp_path / "0123abcd"
    commit.mkdir()

    def snapshot(hub_id: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
        asked.append(revision)
        return commit

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    assert hub.local_directory("org/name") == (commit, "org/name")
    assert asked == [None, "0123abcd"]
    for flag in ("--revision", "--tokenizer-revision", "--code-revision"):
        assert "--local-dir DIR" in refusal(capsys, flag, "other")


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest", "file:///etc/passwd", "https://ok.example\\@evil", "data:,x"]
)
def test_cve_2026_24779_nothing_is_fetched_for_a_client(url: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            part = {"type": "image_url", "image_url": {"url": url}}
            status, reply, _ = await api.post(CHAT, {"messages": [{"role": "user", "content": [part]}]})
            assert (status, reply["error"]["param"]) == (400, "messages[0].content[0].type")

    asyncio.run(scenario())


def test_cve_2026_24779_the_server_has_no_client() -> None:
    for path in sorted((ROOT / "engine" / "server").rglob("*.py")):
        names = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert not names & {"ClientSession", "urlopen", "urlretrieve", "create_connection"}, path


# --- the HTTP library


def test_cve_2025_69223_nothing_is_decompressed() -> None:
    async def scenario() -> None:
        async with server() as api:
            bomb = gzip.compress(b'{"prompt": "' + b"a" * (4 << 20) + b'"}')
            for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
                status, reply, _ = await api.post(TEXT, bomb, **{"Content-Encoding": encoding})
                assert (status, reply["error"]["code"]) == (415, "unsupported_media_type")

    asyncio.run(scenario())


def test_cve_2025_69224_the_lenient_parser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "HttpRequestParser", HttpRequestParserPy)
    with pytest.raises(ConfigError, match="compiled HTTP parser"):
        asyncio.run(lifecycle.serve(ServerOptions(port=0), lambda: pytest.fail("must not load")))


SMUGGLED = (
    b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;\nx\r\nhello\r\n0\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n\r\nhello",
    b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
)


@pytest.mark.parametrize("request_", SMUGGLED)
def test_cve_2025_69224_no_request_hides_in_another(request_: bytes) -> None:
    async def scenario() -> None:
        async with server() as api:
            host, port = api.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request_)
            answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the connection is closed
            writer.close()
            assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
            assert answer.count(b"HTTP/1.") == 1

    asyncio.run(scenario())


def test_cve_2025_69226_no_files_are_served() -> None:
    app = create_app(ServerState(ServerOptions()))
    assert not [found for found in app.router.resources() if isinstance(found, StaticResource)]
