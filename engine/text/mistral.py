"""Mistral's tekken vocabulary: ``engine.text.tokenizer.Tokenizer``'s surface over mistral-common.

A tekken.json holds byte sequences and ranks; the first 1000 ids are control tokens, a BPE token's id is its
rank + 1000. Three things differ from a tokenizer.json:

*Text is only text.* ``encode`` never yields a control token: "[INST]" in a prompt is five ordinary tokens, as
it is for mistral-common. Whoever wants control tokens sends token ids, or messages, which
``engine.text.mistral_chat`` encodes. Beware of the tokenizer.json that lies beside the published weights: it
parses "[INST]" wherever it finds it.

*There is no template.* The format of a conversation is code in mistral-common, chosen by the version in the
file; we serve v15, Mistral Small 4's, and refuse others by name.

*The file knows the model's settings.* ``reasoning_efforts`` are the values that ``reasoning_effort`` may
take.

mistral-common takes a second to import, so that happens when the first file is opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as CommonTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

VERSION = "v15"
_BOS, _EOS = "<s>", "</s>"
# what mistral-common raises on a broken file, besides its own exceptions: some of its checks are asserts
_FILE_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)


class MistralTokenizer:
    """The vocabulary of one model. Safe to share between threads: nothing changes after construction."""

    def __init__(self, common: CommonTokenizer[Any, Any, Any, Any, Any], where: str = "tekken.json") -> None:
        """common: mistral-common's tokenizer of the file ``where``. Raises CheckpointError, see
        ``from_file``."""
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        tekken = common.instruct_tokenizer.tokenizer
        if not isinstance(tekken, Tekkenizer):
            raise CheckpointError(f"{where}: a {type(tekken).__name__}, expected a tekken vocabulary")
        if tekken.version.value != VERSION:
            raise CheckpointError(
                f"{where}: config.version is {tekken.version.value!r}, supported: {VERSION!r}"
            )
        settings = tekken.model_settings_builder
        if settings is None:
            raise CheckpointError(f"{where}: model_settings_builder is missing, {VERSION} requires it")
        self.common = common
        """What encodes conversations; validates as for serving."""
        self._tekken: Tekkenizer = tekken
        self.vocab_size: int = tekken.n_words
        self.special_tokens: dict[str, int] = {
            tekken.id_to_piece(index): index for index in sorted(tekken.special_ids)
        }
        for text in (_BOS, _EOS):
            if text not in self.special_tokens:
                raise CheckpointError(f"{where}: special_tokens has no {text!r}")
        self.bos_token_id: int = self.special_tokens[_BOS]
        self.eos_token_ids: tuple[int, ...] = (self.special_tokens[_EOS],)
        self.adds_bos = True
        self.chat_template: str | None = None
        effort = settings.reasoning_effort
        self.reasoning_efforts: tuple[str, ...] = () if effort is None else tuple(map(str, effort.values))
        """Values that ``reasoning_effort`` may take; empty if the model has no such setting."""

    @classmethod
    def from_file(cls, tekken_json: Path) -> MistralTokenizer:
        """Read a tekken file of version v15; "tekken" must be part of its name, as mistral-common wants it.

        Raises CheckpointError for a file that is missing, broken or of another version.
        """
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as CommonTokenizer

        where = str(tekken_json)
        if not tekken_json.is_file():
            raise CheckpointError(f"{where}: no such file, expected a tekken.json")
        try:
            common = CommonTokenizer.from_file(where, mode=ValidationMode.serving)
        except (MistralCommonException, *_FILE_ERRORS) as error:
            raise CheckpointError(f"{where}: not a tekken file that can be read: {_reason(error)}") from error
        return cls(common, where)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text, none of them special; with ``add_bos`` <s> goes first.

        Raises RequestError for half a surrogate pair, and for text that the pattern cannot cut into words (a
        million spaces in a row).
        """
        check_unicode(text)
        try:
            return self._tekken.encode(text, bos=add_bos, eos=False)
        except ValueError as error:
            raise RequestError(f"the text cannot be tokenised: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some tokens: their bytes as UTF-8, U+FFFD for what is not; special tokens have none."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for special tokens and for ids past the vocabulary (padded models)."""
        assert token_id >= 0, token_id
        return self._tekken.id_to_byte_piece(token_id) if token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str | None:
        """The token as text, special tokens by name, cut characters as U+FFFD; None past the vocabulary."""
        return self._tekken.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else None


def check_unicode(text: str, param: str | None = None) -> None:
    """Refuse half a surrogate pair, which JSON can carry and UTF-8 cannot; it would silently become U+FFFD.

    Raises RequestError(param).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text cannot be encoded as UTF-8: {error}", param) from error


def _reason(error: Exception) -> str:
    """What went wrong, on one line and short: some of these errors quote whole tables."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
