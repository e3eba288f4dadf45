"""Mistral's vocabulary: the published model's ids, bytes that stream, files that are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError, RequestError
from engine.text.detokenizer import Detokenizer
from engine.text.mistral import MistralTokenizer
from engine.text.mistral_chat import encode_chat
from tests.text.tekken import CONTROL, NUM_CONTROL, tekken_data, tekken_file, tekken_tokenizer

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [1, 22177, 1044, 4304, 1033]),
        (
            "The quick brown fox jumps over the lazy dog.",
            [1, 1784, 7586, 22980, 94137, 72993, 2136, 1278, 42757, 10575, 1046],
        ),
        ("función común días 日本語 🎉", [1, 12127, 1963, 35239, 20608, 30367, 15199, 119685, 1142, 1137]),
    ],
)
def test_text_has_the_ids_of_the_published_tokenizer(text: str, ids: list[int]) -> None:
    tokenizer = tekken_tokenizer()
    assert tokenizer.encode(text, add_bos=True) == ids
    assert tokenizer.encode(text) == ids[1:]
    assert tokenizer.decode(ids) == text


def test_the_surface_that_engine_and_server_use() -> None:
    tokenizer = tekken_tokenizer()
    assert tokenizer.vocab_size == 131072
    assert {tokenizer.special_tokens[text]: text for text in CONTROL.values()} == CONTROL
    assert len(tokenizer.special_tokens) == NUM_CONTROL
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.adds_bos) == (1, (2,), True)
    assert tokenizer.reasoning_efforts == ("none", "high")
    assert [tokenizer.token_text(index) for index in (34, 22177, 131072)] == ["[THINK]", "Hello", None]


def test_the_bytes_of_a_token_are_those_of_the_file() -> None:
    tokenizer = tekken_tokenizer()
    assert [tokenizer.token_bytes(index) for index in (0, 2, 34, 999, 131072, 10**9)] == [b""] * 6
    for byte in range(256):  # the first ranks are the single bytes
        assert tokenizer.token_bytes(NUM_CONTROL + byte) == bytes([byte])
    assert tokenizer.decode([1, *tokenizer.encode("Hi"), 2, 131072]) == "Hi"
    assert tokenizer.decode([NUM_CONTROL + 0xE6, NUM_CONTROL + 0x97]) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 131071), max_size=30))
def test_random_tokens_stream_to_the_text_of_the_whole(ids: list[int]) -> None:
    ours = Detokenizer(tekken_tokenizer())
    streamed = "".join(ours.push((index,)) for index in ids) + ours.flush()
    assert streamed == tekken_tokenizer().decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.text("日本語🎉é👩\u200d🚀 \nab", max_size=40))
def test_text_streams_back_token_by_token(text: str) -> None:
    tokenizer = tekken_tokenizer()
    ids = tokenizer.encode(text)
    ours = Detokenizer(tokenizer)
    pieces = [ours.push((index,)) for index in ids]
    assert "".join(pieces) + ours.flush() == text == tokenizer.common.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert min(ids, default=NUM_CONTROL) >= NUM_CONTROL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800", "cannot be encoded as UTF-8"),
        (" " * 1_200_000, "the text cannot be tokenised: Regex error"),
    ],
)
def test_text_that_has_no_tokens_is_the_clients_mistake(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tekken_tokenizer().encode(text)


@lru_cache(maxsize=1)
def _small() -> dict[str, Any]:
    return tekken_data(num_vocab=300)


def _no_settings(data: dict[str, Any]) -> None:
    del data["model_settings_builder"]


def _no_setting(data: dict[str, Any]) -> None:
    data["model_settings_builder"] = {}


def _version(version: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["config"]["version"] = version
        del data["model_settings_builder"]

    return change


def _no_end(data: dict[str, Any]) -> None:
    data["special_tokens"][2]["token_str"] = "<end>"


def _no_vocabulary(data: dict[str, Any]) -> None:
    del data["vocab"]


def _short_vocabulary(data: dict[str, Any]) -> None:
    data["vocab"] = data["vocab"][:256]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_settings, "model_settings_builder is missing, v15 requires it"),
        (_version("v13"), r"config\.version is 'v13', supported: 'v15'"),
        (_version("v99"), "not a tekken file that can be read: ValueError: Unknown version: v99"),
        (_no_end, "special_tokens has no '</s>'"),
        (_no_vocabulary, "not a tekken file that can be read: KeyError: 'vocab'"),
        (_short_vocabulary, "not a tekken file that can be read: AssertionError"),
    ],
)
def test_files_that_cannot_be_honoured(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = copy.deepcopy(_small())
    change(data)
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"tekken\.json: {message}"):
        MistralTokenizer.from_file(path)


def test_files_that_are_no_tekken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tekken\.json: no such file"):
        MistralTokenizer.from_file(tmp_path / "tekken.json")
    for content in ("{", "[]", "[" * 100_000, "\ud800"):
        path = tmp_path / "tekken.json"
        path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
        with pytest.raises(CheckpointError, match=r"tekken\.json: not a tekken file"):
            MistralTokenizer.from_file(path)
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tekken file .* Unrecognized"):
        MistralTokenizer.from_file(other)


def test_a_model_without_the_setting_refuses_it(tmp_path: Path) -> None:
    data = copy.deepcopy(_small())
    _no_setting(data)
    path = tmp_path / "small_tekken.json"
    path.write_text(json.dumps(data))
    tokenizer = MistralTokenizer.from_file(path)
    assert tokenizer.vocab_size == NUM_CONTROL + 300
    assert 36 not in encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    with pytest.raises(RequestError, match="reasoning_effort is 'none', supported: only without it"):
        encode_chat(tokenizer, [{"role": "user", "content": "Hi"}], reasoning_effort="none")


def test_mistral_common_is_imported_when_a_file_is_opened() -> None:
    code = (
        "import sys, engine.text.mistral, engine.text.mistral_chat, engine.text.output_parser\n"
        "heavy = {'mistral_common', 'pydantic', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_stand_in_file_is_written_once() -> None:
    assert tekken_file() == tekken_file()
    assert tekken_file().name == "tekken.json"
