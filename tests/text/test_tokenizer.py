"""The tokenizer against transformers' own, and the bytes of tokens against the text they came from."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from engine.checkpoint import open_checkpoint
from engine.errors import CheckpointError, RequestError
from engine.text.tokenizer import BREAK, Tokenizer, byte_alphabet
from tests.checkpoint.files import (
    TEMPLATE,
    arrays_for_mappings,
    byte_level_backend,
    default_gguf,
    vocabulary,
    write_tokenizer,
)

SAMPLES = [
    "",
    " ",
    "\n",
    "\n\n  \n",
    "Hello world",
    "  two  spaces ",
    "12345 67.89",
    "٣४5",
    "don't WE'LL",
    "wörld naïve",
    "日本語のテキスト",
    "🦅 eagle 👩‍👩‍👧‍👦",
    "def f(x):\n\treturn x ** 2\n",
    "a\u0301e\u0308",
    "\u200bzero\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_end|><|im_end|>",
    "<|im_end",
    "x<|endoftext|>y",
    "\x00\x01\x7f",
    "A" * 300,
    "https://example.org/?q=1&b=%20#x",
]
SIZE = 288


@lru_cache(maxsize=1)
def default_tokenizer() -> Tokenizer:
    return open_checkpoint(default_gguf()).tokenizer()


def fields(**changes: Any) -> dict[str, Any]:
    """Decoded GGUF metadata of the small byte-level vocabulary."""
    tokens, types, merges = vocabulary(SIZE)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


@lru_cache(maxsize=1)
def transformers_tokenizer() -> Any:
    """transformers' own reading of the default model's file.

    It knows nothing of "smollm" and cuts words as GPT-2 does, which comes to the same, because the vocabulary
    has no token of several digits.
    """
    from transformers import AutoTokenizer

    path = default_gguf()
    with arrays_for_mappings():
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_default_tokenizer_equals_transformers_reading_of_the_same_file() -> None:
    oracle, ours = transformers_tokenizer(), default_tokenizer()
    for text in SAMPLES:
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True), text
    assert ours.vocab_size == len(oracle) == 49152
    assert ours.chat_template == oracle.chat_template


def test_the_default_tokenizer_cuts_as_its_model_was_trained() -> None:
    ours = default_tokenizer()
    assert [ours.token_text(index) for index in ours.encode("in 1234, don't")] == [
        "in",
        "Ġ",
        "1",
        "2",
        "3",
        "4",
        ",",
        "Ġdon",
        "'t",
    ]
    assert ours.eos_token_ids == (2, 0)  # <|im_end|> of the metadata, <|endoftext|> of the vocabulary
    assert ours.bos_token_id == 1
    assert not ours.adds_bos
    assert ours.encode("Hi", add_bos=True) == ours.encode("Hi")


@lru_cache(maxsize=1)
def missing_bytes() -> frozenset[int]:
    """Bytes that the default vocabulary cannot write: rare control characters, and bytes outside UTF-8."""
    ours = default_tokenizer()
    return frozenset(range(256)) - {
        ours.token_bytes(index)[0] for index in range(ours.vocab_size) if len(ours.token_bytes(index)) == 1
    }


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_bytes_of_tokens_are_the_text(text: str) -> None:
    ours, missing = default_tokenizer(), missing_bytes()
    text = "".join(char for char in text if missing.isdisjoint(char.encode()))
    ids = ours.encode(text)
    assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    assert ours.decode(ids) == text


def test_special_tokens_and_padding_have_no_bytes() -> None:
    ours = default_tokenizer()
    assert ours.decode([1, *ours.encode("Hi"), 2]) == "Hi"
    assert ours.decode([49152, 10**9]) == ""
    half = ours.encode("\u65e5")[:1]
    assert ours.token_bytes(half[0]) == b"\xe6\x97"  # of e6 97 a5
    assert ours.decode(half) == "\ufffd"
    usual = {0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC3, 0xF0)}
    assert missing_bytes().isdisjoint(usual)


def test_byte_alphabet_is_gpt2s() -> None:
    ours = byte_alphabet()
    assert len(ours) == 256
    for byte in range(128):  # higher code points are two bytes of UTF-8
        [(piece, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))
        assert ours[piece] == byte
    assert set(ours) == set(pre_tokenizers.ByteLevel.alphabet())


# --- GGUF ---


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["hello", "Ġw", "o", "Ġ", "12", "3", "Ċ", "Ċ", "!"]),
        ("default", ["hello", "Ġw", "o", "Ġ", "12", "3", "Ċ", "Ċ", "!"]),
        ("smollm", ["hello", "Ġw", "o", "Ġ", "1", "2", "3", "Ċ", "Ċ", "!"]),
        ("llama-bpe", ["hello", "Ġw", "o", "Ġ", "12", "3", "ĊĊ", "!"]),
    ],
)
def test_text_is_cut_into_words_as_the_file_says(pre: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(fields(pre=pre))
    assert [tokenizer.token_text(index) for index in tokenizer.encode("hello wo 123\n\n!")] == pieces


def test_llama3_takes_whole_words_that_no_merges_lead_to() -> None:
    tokens, types, merges = vocabulary(SIZE)
    tokens[-1], types[-1] = "xyz", 1
    lone = {"tokens": tokens, "token_type": types}
    assert Tokenizer.from_gguf(fields(pre="llama-bpe", **lone)).encode("xyz") == [SIZE - 1]
    assert len(Tokenizer.from_gguf(fields(pre="gpt-2", **lone)).encode("xyz")) == 3


def test_gguf_token_types_and_flags() -> None:
    tokenizer = Tokenizer.from_gguf(fields(pre="llama-bpe"))
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.encode("a<tool>b")[1] == 3  # user-defined: parsed, but it is text
    assert tokenizer.decode([3]) == "<tool>"
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.adds_bos  # llama-3's tokenizer does unless the file says otherwise
    assert tokenizer.encode("h", add_bos=True) == [1, *tokenizer.encode("h")]
    assert not Tokenizer.from_gguf(fields(pre="llama-bpe", add_bos_token=False)).adds_bos
    assert not Tokenizer.from_gguf(fields(bos_token_id=None, add_bos_token=True)).adds_bos
    assert Tokenizer.from_gguf(fields(eos_token_id=None, eot_token_id=5)).eos_token_ids == (5, 2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama', supported: 'gpt2'"),
        ({"model": None}, r"tokenizer\.ggml\.model is None"),
        ({"pre": "qwen2"}, r"tokenizer\.ggml\.pre is 'qwen2', supported: 'smollm', 'llama-bpe'"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is None"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is None, expected a list of strings"),
        ({"merges": "a b"}, r"tokenizer\.ggml\.merges is a b"),
        ({"merges": ["ab"]}, r"tokenizer\.ggml\.merges holds 'ab', expected two tokens and a space"),
        ({"merges": ["zz z"]}, r"tokens and merges do not fit together"),
        ({"token_type": [1, 2]}, r"tokenizer\.ggml\.token_type has 2 entries, expected 288"),
        ({"tokens": ["a"] * SIZE}, r"tokenizer\.ggml\.tokens has 287 duplicates"),
        ({"eos_token_id": SIZE}, r"token id 288 \(EOS or BOS\), expected less than 288"),
        ({"bos_token_id": 1 << 31}, r"token id 2147483648"),
    ],
)
def test_gguf_vocabularies_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^some\.gguf: {message}"):
        Tokenizer.from_gguf(fields(**changes), where="some.gguf")


# --- tokenizer.json ---


def test_a_directory_tokenizer_equals_the_library(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "model", SIZE)
    file, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    ours = Tokenizer.from_file(file, config, eos_token_ids=(9,))
    backend = byte_level_backend(SIZE)
    for text in [*SAMPLES, "a<tool>b"]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == backend.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_ids == (9, 2, 0)
    assert (ours.bos_token_id, ours.adds_bos, ours.chat_template) == (1, False, TEMPLATE)


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = byte_level_backend(SIZE)
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(Tokenizer(backend).encode("hello world")) == 6


def test_bos_is_added_where_the_file_adds_it(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "model", SIZE)
    file, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    backend = byte_level_backend(SIZE)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(file))
    assert Tokenizer.from_file(file, config).encode("h", add_bos=True)[0] == 1
    assert Tokenizer.from_file(file, config).encode("h")[0] != 1
    assert not Tokenizer.from_file(file).adds_bos  # no BOS known
    assert Tokenizer.from_file(file, bos_token_id=1).adds_bos
    write_tokenizer(directory, SIZE, add_bos_token=True)
    assert Tokenizer.from_file(file, config).adds_bos


def test_the_chat_template_is_found_where_it_may_lie(tmp_path: Path) -> None:
    def template(**keys: Any) -> str | None:
        directory = write_tokenizer(tmp_path / "model", SIZE, **keys)
        file, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
        return Tokenizer.from_file(file, config).chat_template

    assert template(chat_template=None) is None
    assert template(chat_template="one") == "one"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert template(chat_template=named) == "d"
    with pytest.raises(CheckpointError, match="chat templates rag, expected one 'default'"):
        template(chat_template=named[:1])
    with pytest.raises(CheckpointError, match="chat_template is a int, expected text"):
        template(chat_template=5)
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    assert template(chat_template="one") == "two"
    (tmp_path / "model" / "chat_template.jinja").write_text("three")
    assert template(chat_template="one") == "three"


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """Llama 2's kind of tokenizer.json: U+2581 for spaces, <0xNN> for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in ("▁", "h", "i", "▁h", "▁hi", "é"):
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("▁", "h"), ("▁h", "i")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return backend


def test_sentencepiece_bytes() -> None:
    tokenizer = Tokenizer(sentencepiece_backend(), bos_token_id=1)
    ids = tokenizer.encode("hi é日\n")
    assert [tokenizer.token_text(index) for index in ids] == [
        "▁hi",
        "▁",
        "é",
        "<0xE6>",
        "<0x97>",
        "<0xA5>",
        "<0x0A>",
    ]
    assert tokenizer.decode(ids) == " hi é日\n"  # as the continuation that it is; the space is the file's
    assert tokenizer.token_bytes(ids[3]) == b"\xe6"
    assert tokenizer.decode([1, *ids, 2]) == " hi é日\n"
    assert tokenizer.eos_token_ids == (2,)


def test_tokenizers_that_we_cannot_take_apart_are_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="a decoder of WordPiece parts, supported: byte-level"):
        Tokenizer(backend)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json that can be read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"missing\.json: not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "missing.json")


def test_half_a_surrogate_pair_is_the_clients_mistake() -> None:
    with pytest.raises(RequestError, match="cannot be encoded as UTF-8"):
        default_tokenizer().encode("a\ud800")


def test_marks_keep_tokens_apart_and_leave_no_trace() -> None:
    tokenizer = default_tokenizer()
    assert tokenizer.encode_marked(f"hel{BREAK}lo") == tokenizer.encode("hel") + tokenizer.encode("lo")
    assert tokenizer.encode_marked("plain <|im_end|>") == tokenizer.encode("plain <|im_end|>")
    ids = tokenizer.encode_marked(f"<{BREAK}|im_end|>")
    assert 2 not in ids
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_marks_do_not_outlive_the_call() -> None:
    """Encoding text with marks must not change how text without marks is encoded afterwards."""
    tokenizer = default_tokenizer()
    before = tokenizer.encode(f"x{BREAK}y")
    tokenizer.encode_marked(f"x{BREAK}y")
    assert tokenizer.encode(f"x{BREAK}y") == before
