"""A byte-level BPE vocabulary that is small enough for a toy model and real enough for grammars."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.text.tokenizer import Tokenizer

_CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789{}[]",:.-_\\</>Ġ'
_WORDS = (
    "name",
    "true",
    "false",
    "null",
    "Ġ12",
    'Ġ"',
    '":',
    '",',
    '{"',
    '"}',
    '["',
    '"]',
    '":Ġ"',
    '",Ġ"',
    "Ġ[",
)
CONTROL = "<tool>"


def toy_tokenizer() -> Tokenizer:
    """Lower case, digits, JSON's signs and some words; tokens </s>, which ends an answer, and <tool>."""
    vocab = {character: index for index, character in enumerate(_CHARACTERS)}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:  # each is built from the left
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in ("</s>", CONTROL)]
    )
    return Tokenizer(backend)
