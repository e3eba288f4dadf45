"""From what an answer must match to llguidance's matchers: one vocabulary, many grammars.

llguidance walks a trie of the vocabulary's tokens along a parser of bytes, and says which tokens may come
next. It needs the bytes of every token, and to know which tokens are control tokens: these match by their
names in angle brackets alone (``<|im_end|>``, and ``<TOOL_CALLS>`` for tekken's ``[TOOL_CALLS]``, as in
mistral-common's grammars), never by ``.`` or as text. Where only one text can follow, the vocabulary's own
way to cut it into tokens is asked for, and only that is allowed.

JSON is written as Python's ``json.dumps`` does: a space behind each colon and comma and none elsewhere. Free
whitespace costs tokens, lets a model run in circles, and leaves less that is certain. A schema may ask for
another style by a key "x-guidance" (``whitespace_flexible``, ``item_separator``, ``key_separator``: see
llguidance's docs/json_schema.md).

A client's grammar is not to be trusted: sizes are checked here, ``engine.text.compile_guard`` tries it out,
and the compiler's own limits stay on for every step. What is compiled is kept for the next request, the most
recently used of it, within bounds.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any, Final, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from engine.core import Grammar
from engine.errors import RequestError
from engine.text.compile_guard import CompileGuard
from engine.text.conversation import AnyTokenizer
from engine.text.tools import JSON_STYLE

MAX_GRAMMAR_BYTES: Final = 256 << 10
MAX_REGEX_LEN: Final = 8 << 10  # characters
MAX_SCHEMA_DEPTH: Final = 64  # of objects and lists inside one another
MAX_CHOICES: Final = 1024
_MOST_KEPT = 64  # compiled grammars
_MOST_KEPT_BYTES = 4 << 20  # of their texts
# A step's work is bounded too, in units of which llguidance does 14 to 20 thousand in a millisecond.
_LIMITS: Final = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class GrammarCompiler:
    """Makes matchers for one vocabulary. Safe to share between threads."""

    def __init__(self, tokenizer: AnyTokenizer, guard: CompileGuard | None = None) -> None:
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer = tokenizer
        self._guard = guard or CompileGuard()
        self._kept: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()  # a str is why it is refused
        self._lock = threading.Lock()  # of _kept: never held while something compiles

    def matcher(self, grammar: Grammar, param: str | None = "grammar") -> LLMatcher:
        """A matcher at the beginning of an answer, for the caller alone.

        param: the field's name in the client's JSON. Raises RequestError with the compiler's message for what
        cannot be compiled, or not within bounds.
        """
        found = self._find(grammar)
        if found is None:
            found = self._keep(grammar, self._compile(grammar))
        if isinstance(found, str):
            raise RequestError(f"the grammar ({grammar.kind}) cannot be compiled: {found}", param)
        with self._lock:  # a matcher must not be copied twice at a time
            return found.deep_copy()

    def _find(self, grammar: Grammar) -> LLMatcher | str | None:
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
            return found

    def _keep(self, grammar: Grammar, compiled: LLMatcher | str) -> LLMatcher | str:
        with self._lock:
            self._kept[grammar] = compiled
            num_bytes = sum(len(kept.text) for kept in self._kept)
            while len(self._kept) > _MOST_KEPT or (num_bytes > _MOST_KEPT_BYTES and len(self._kept) > 1):
                oldest, _ = self._kept.popitem(last=False)
                num_bytes -= len(oldest.text)
        return compiled

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        """The matcher, or why there is none."""
        problem = _oversize(grammar) or self._lack
        if problem:
            return problem
        try:
            source = _source(grammar)
        except (ValueError, RecursionError) as error:
            return _short(str(error))
        problem = self._guard.complaint(source)
        if not problem:
            matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                return matcher
            problem = matcher.get_error()
        return _short(problem)

    @property
    def _lack(self) -> str:
        """What no grammar can do without, empty if it is there."""
        return "" if self._tokenizer.eos_token_ids else "the model has no token that ends an answer"

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """Made for the first grammar; a server has one compiled before it is ready (``held.rehearse``)."""
        wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer))
        return LLTokenizer(wrapper, eos_token=list(self._tokenizer.eos_token_ids))


class _Vocabulary:
    """A tokenizer as llguidance's TokenizerWrapper wants to see it."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        names = {index: name for name, index in tokenizer.special_tokens.items()}
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.special_token_ids = sorted({*names, *tokenizer.eos_token_ids})
        self.tokens = [
            _bracketed(names.get(index, f"<{index}>"))
            if index in names or index in tokenizer.eos_token_ids
            else tokenizer.token_bytes(index)
            for index in range(tokenizer.vocab_size)
        ]
        self._tokenizer = tokenizer
        self._name = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or "(?!)")

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, none of them special: a name of a control token is cut behind its first
        character, for the tokenizer would parse it."""
        assert isinstance(text, str)
        cuts = [0, *(match.start() + 1 for match in self._name.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        return [token for piece in pieces if piece for token in self._tokenizer.encode(piece)]


def _bracketed(name: str) -> bytes:
    """A control token's name in angle brackets, which is how grammars call it."""
    inner = re.fullmatch(r"\[(.*)\]", name, re.DOTALL)
    return f"<{inner[1]}>".encode() if inner else name.encode()


def _oversize(grammar: Grammar) -> str:
    """What about a grammar is too large to be looked at, empty if nothing is."""
    num_bytes = len(grammar.text.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_GRAMMAR_BYTES:
        return f"it has {num_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are allowed"
    if grammar.kind == "regex" and len(grammar.text) > MAX_REGEX_LEN:
        return f"it has {len(grammar.text)} characters, at most {MAX_REGEX_LEN} are allowed"
    return ""


def _source(grammar: Grammar) -> str:
    """A grammar in llguidance's own form. Raises ValueError for what cannot be one."""
    kind, text = grammar.kind, grammar.text
    text.encode()  # half a surrogate pair is a ValueError
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(_lark(text))
    if kind == "choice":
        return LLMatcher.grammar_from_lark(_choices(text))
    schema = {"type": "object"} if kind == "json_object" else json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError(f"found a JSON {type(schema).__name__}, expected a schema, which is an object")
    depth = _depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"it is nested {depth} levels deep, at most {MAX_SCHEMA_DEPTH} are allowed")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=cast(Any, JSON_STYLE))


def _choices(text: str) -> str:
    """One of a JSON list of strings, in Lark's notation, whose strings are JSON's."""
    choices = json.loads(text)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("found something else than a list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise ValueError(f"found {len(choices)} choices, expected 1 to {MAX_CHOICES}")
    return "start: " + " | ".join(map(json.dumps, choices))


def _lark(text: str) -> str:
    """Lark's notation as it is, GBNF's (``root ::= ..``) translated."""
    try:
        converted: str = any_to_lark(text)
    except Exception as error:  # a parser of its own, with errors of many kinds
        raise ValueError(f"neither Lark nor GBNF: {error}") from error
    return converted


def _depth(value: object) -> int:
    """How deep lists and objects are nested; 0 for a number or a string."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _short(problem: str) -> str:
    """A compiler's message on one line; some quote the whole grammar."""
    line = " ".join(problem.split())
    return line if len(line) <= 300 else line[:300] + "..."
