"""Tokens <-> text, one class over the ``tokenizers`` library whatever the file format.

Three questions decide everything here.

*Which strings are control tokens?* Those the file marks as special (tokenizer.json: ``special``; GGUF: type
3). In the prompt of a completion they are parsed. In the content of a chat message they must not be, or a
user could close their own turn; ``engine.text.chat`` marks such places with ``BREAK``, and ``encode_marked``
drops the mark after it has kept the characters around it apart.

*What are the bytes of a token?* Either its characters stand for bytes (GPT-2's alphabet: a space is U+0120),
or they are text in which U+2581 is a space and <0xNN> one byte (sentencepiece). ``decode`` is the
concatenation of these bytes and nothing else, so text can be streamed token by token; in particular the
leading space of a sentencepiece word stays.

*When does an answer end?* At the config's EOS ids, and at any end-of-turn token that the vocabulary marks as
special.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from engine.errors import CheckpointError, RequestError

# Digits only, so that no filter of a template changes it; not to be guessed, so that no client can write it.
BREAK = f"\ufdd0{secrets.randbits(64)}\ufdd0"

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|eot|>",
    "</s>",
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """The vocabulary of one model. Safe to share between threads: nothing changes after construction."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        adds_bos: bool = False,
        chat_template: str | None = None,
        where: str = "tokenizer",
    ) -> None:
        """``where`` names the file in errors (CheckpointError). Truncation and padding are switched off."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {
            token.content: index for index, token in added.items() if token.special
        }
        for token_id in (*eos_token_ids, *(() if bos_token_id is None else (bos_token_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"{where}: token id {token_id} (EOS or BOS), expected less than {self.vocab_size}"
                )
        ends = (self.special_tokens[text] for text in END_OF_TURN if text in self.special_tokens)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos_token_ids, *ends)))
        self.bos_token_id = bos_token_id
        self.adds_bos = adds_bos and bos_token_id is not None  # texts began with BOS in training
        self.chat_template = chat_template
        self._bytes = _bytes_of_all(backend, self.vocab_size, where)

    @classmethod
    def from_file(
        cls,
        tokenizer_json: Path,
        tokenizer_config: Path | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
    ) -> Tokenizer:
        """Read a Hugging Face tokenizer. The chat template is chat_template.jinja beside it, or the config's
        own.

        ``eos_token_ids`` and ``bos_token_id`` come from config.json and generation_config.json; the tokenizer
        config's EOS is added, its BOS wins. Raises CheckpointError.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # the library raises bare Exception, for a missing file too
            raise CheckpointError(
                f"{tokenizer_json}: not a tokenizer.json that can be read: {error}"
            ) from error
        config: dict[str, Any] = {}
        if tokenizer_config is not None and tokenizer_config.is_file():
            config = read_json(tokenizer_config)
        eos = _named_token(backend, config.get("eos_token"))
        bos = _named_token(backend, config.get("bos_token"))
        bos = bos_token_id if bos is None else bos
        starts = backend.encode("", add_special_tokens=True).ids[:1]  # a post-processor may put BOS first
        return cls(
            backend,
            eos_token_ids=(*eos_token_ids, *(() if eos is None else (eos,))),
            bos_token_id=bos,
            adds_bos=bool(config.get("add_bos_token", bos is not None and starts == [bos])),
            chat_template=_find_template(tokenizer_json.parent, config),
            where=str(tokenizer_json),
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], where: str = "gguf") -> Tokenizer:
        """Build the byte-level BPE that a GGUF file's metadata describes.

        fields: decoded metadata, key -> Python value. Raises CheckpointError for other models and
        pre-tokenizers.
        """
        kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        if kind != "gpt2":
            raise CheckpointError(
                f"{where}: tokenizer.ggml.model is {kind!r}, supported: 'gpt2' (byte-level BPE)"
            )
        tokens, merges, types = (
            _string_list(fields, "tokens", where),
            _string_list(fields, "merges", where),
            fields.get("tokenizer.ggml.token_type"),
        )
        if not isinstance(types, list) or len(types) != len(tokens):
            found = len(types) if isinstance(types, list) else types
            raise CheckpointError(
                f"{where}: tokenizer.ggml.token_type has {found} entries, expected {len(tokens)}"
            )
        vocab = {token: index for index, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            raise CheckpointError(f"{where}: tokenizer.ggml.tokens has {len(tokens) - len(vocab)} duplicates")
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        bad = next((merge for merge in merges if merge.count(" ") != 1), None)
        if bad is not None:
            raise CheckpointError(
                f"{where}: tokenizer.ggml.merges holds {bad!r}, expected two tokens and a space"
            )
        try:
            # llama-3 takes a word that is a token whole, even where no chain of merges leads to it
            model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe")
            backend = tokenizers.Tokenizer(model)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{where}: tokens and merges do not fit together: {error}") from error
        backend.pre_tokenizer = _pre_tokenizer(pre, where)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(
            [
                AddedToken(token, normalized=False, special=True)
                for token, kind in zip(tokens, types, strict=True)
                if kind == _CONTROL
            ]
        )
        backend.add_tokens(
            [
                AddedToken(token, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == _USER_DEFINED
            ]
        )
        eos = (fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
        return cls(
            backend,
            eos_token_ids=[index for index in eos if index is not None],
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
            chat_template=fields.get("tokenizer.chat_template"),
            where=where,
        )

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text; special tokens in it are parsed.

        ``add_bos`` is for the start of a text that no template wrote: BOS goes first if the model expects it
        there (``adds_bos``; SmolLM2, say, has a BOS but was not trained to see it).
        Raises RequestError for half a surrogate pair, which JSON can carry and UTF-8 cannot.
        """
        ids = _encode(self._backend, text)
        if add_bos and self.adds_bos:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    def encode_marked(self, text: str) -> list[int]:
        """``encode`` of a text without its ``BREAK`` marks, but no token reaches across a mark."""
        mark_id = self._marked_backend.token_to_id(BREAK)
        return [index for index in _encode(self._marked_backend, text) if index != mark_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some tokens: their bytes as UTF-8, U+FFFD for what is not; special tokens have none."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for special tokens and for ids past the vocabulary (padded models)."""
        assert token_id >= 0, token_id
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (special tokens too); None for an unused id."""
        text: str | None = self._backend.id_to_token(token_id)
        return text

    @cached_property
    def _marked_backend(self) -> tokenizers.Tokenizer:
        """A copy in which BREAK is a token; made when the first message holds a control string."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(BREAK, normalized=False, special=True)])
        return backend


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    except TypeError as error:  # what the library raises for a str that is not Unicode text
        raise RequestError(f"the text cannot be encoded as UTF-8: {error}") from error
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: found a JSON {type(raw).__name__}, expected an object")
    return raw


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, character -> byte: printable bytes are themselves, the others U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(hidden)
    }


def _pre_tokenizer(pre: Any, where: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before merging, by llama.cpp's name for it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("gpt-2", "default"):
        return gpt2
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre == "llama-bpe":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise CheckpointError(
        f"{where}: tokenizer.ggml.pre is {pre!r}, supported: 'smollm', 'llama-bpe', 'gpt-2', 'default'"
    )


def _bytes_of_all(backend: tokenizers.Tokenizer, size: int, where: str) -> list[bytes]:
    """[size] bytes of each token id, empty for special tokens and gaps."""
    spec = json.loads(backend.to_str())
    kinds = _kinds(spec.get("decoder")) | _kinds(spec.get("pre_tokenizer"))
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()

        def piece_bytes(piece: str) -> bytes:
            known = all(char in alphabet for char in piece)
            return bytes(alphabet[char] for char in piece) if known else piece.encode()
    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:

        def piece_bytes(piece: str) -> bytes:
            byte = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()
    else:
        raise CheckpointError(
            f"{where}: a decoder of {', '.join(sorted(kinds)) or 'no'} parts, supported: byte-level "
            "(ByteLevel) and sentencepiece (Metaspace or Replace, ByteFallback)"
        )
    table = [b""] * size
    for piece, index in backend.get_vocab(with_added_tokens=False).items():
        table[index] = piece_bytes(piece)
    for index, token in backend.get_added_tokens_decoder().items():
        table[index] = b"" if token.special else token.content.encode()
    return table


def _kinds(node: Any) -> set[str]:
    """Every "type" in a part of a tokenizer's JSON."""
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_kinds, node.values()))
    return set().union(*map(_kinds, node)) if isinstance(node, list) else set()


def _named_token(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    """Id of a token that a tokenizer_config names, as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    index: int | None = backend.token_to_id(text) if isinstance(text, str) else None
    return index


def _find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, else the tokenizer config's; of several named ones, 'default'."""
    own_file, wrapped = directory / "chat_template.jinja", directory / "chat_template.json"
    try:
        if own_file.is_file():
            return own_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{own_file}: cannot be read: {error}") from error
    found = read_json(wrapped).get("chat_template") if wrapped.is_file() else config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if "default" not in named:
            raise CheckpointError(
                f"{directory}: chat templates {', '.join(map(str, named))}, expected one 'default'"
            )
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{directory}: chat_template is a {type(found).__name__}, expected text")
    return found


def _string_list(fields: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = fields.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.{key} is {str(value)[:40]}, expected a list of strings"
        )
    return value
