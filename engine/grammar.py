"""Answers that match a grammar: what may follow each node of a tree, and where only one token may.

Everything rests on one function: *after a path, what may come?* (``Place.after``). The path is the answer so
far and the drafted tokens of a node, and the result depends on nothing else. Plain decoding and speculation
ask the same question, so they choose the same tokens; so does whoever drafts, which spares nodes that could
never be accepted. llguidance's matcher is a cursor that moves to where the next question is asked, forward by
consuming and backward by rolling back, so nobody has to put it back where it was. It is given a drafted token
only after the mask before that token was found to allow it.

Where only one token may follow, it is *forced*: chosen whatever the model or other edits say of it, for which
reason this edit comes last. So the choice is known without asking the model, and the scheduler may emit
forced tokens at once; they pass through the model later, as a prompt does.

An answer ends where nothing may follow, or at an end token, which is allowed where the grammar is complete.
What goes wrong in a matcher (its limits on a step's work, for one) leaves no token to choose: that ends the
request, with an error, and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask
from torch import Tensor

from engine.core import Batch, DraftTree, Grammar, Request, SamplingParams, Sequence
from engine.errors import RequestError
from engine.text.grammar import GrammarCompiler

NEVER = float("-inf")
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Next:
    """What may follow a path: some tokens (``allowed``, [V] bool on the host), or nothing because of ``end``.

    only: the token, if there is no other. problem: says what went wrong where end is "error".
    """

    allowed: Tensor
    only: int | None = None
    end: Literal["stop", "error"] | None = None
    problem: str = ""


class MatcherError(Exception):
    """A matcher gave up. Never leaves this module."""


class Place:
    """Where one sequence is in its grammar.

    start: makes a matcher at the beginning of an answer; mask_len: tokens that its masks speak of;
    vocab_size: the model's tokens, which may be more (padding) and are then never allowed.
    """

    def __init__(self, start: Callable[[], LLMatcher], mask_len: int, vocab_size: int) -> None:
        self._start = start
        self._mask = np.zeros((1, (mask_len + 31) // 32), dtype=np.int32)
        self._mask_len = min(mask_len, vocab_size)
        self._nothing = torch.zeros(vocab_size, dtype=torch.bool)
        self._matcher: LLMatcher | None = None
        self._answer: list[int] = []  # the matcher is behind these tokens, which stay ..
        self._ahead: Path = ()  # .. and these, which need not
        self._after: dict[Path, Next] = {}

    def advance(self, answer: list[int]) -> None:
        """Paths begin behind ``answer`` from now on: the one of the last call, and what came since."""
        step = tuple(answer[len(self._answer) :])
        if not step:
            return
        length = len(step)
        self._after = {path[length:]: found for path, found in self._after.items() if path[:length] == step}
        if self._matcher is not None and self._ahead[:length] != step:
            try:
                self._go(step)
            except MatcherError:
                self._matcher = None  # whoever asks next is told
        self._answer += step
        self._ahead = self._ahead[length:]

    def after(self, path: Path) -> Next:
        """What may follow the answer and ``path``, drafted tokens of any kind: where they cannot be, that is
        an error."""
        found = self._after.get(path)
        if found is None:
            found = self._after[path] = self._find(path)
        return found

    def _find(self, path: Path) -> Next:
        if path and not self._allows(path[:-1], path[-1]):
            return Next(self._nothing, end="error", problem=f"token {path[-1]} does not match the grammar")
        try:
            self._go(path)
            return self._look()
        except (MatcherError, RequestError, ValueError) as error:
            self._matcher = None  # in an error it stays in it; other paths may do without it
            return Next(self._nothing, end="error", problem=f"the grammar cannot go on: {error}")

    def _allows(self, path: Path, token: int) -> bool:
        return 0 <= token < len(self._nothing) and bool(self.after(path).allowed[token])

    def _go(self, path: Path) -> None:
        """Move the matcher behind ``path``. Raises MatcherError, or RequestError if there is none."""
        if self._matcher is None:
            self._matcher, self._ahead = self._start(), ()
            self._consume(self._answer)
        common = 0
        while common < min(len(path), len(self._ahead)) and path[common] == self._ahead[common]:
            common += 1
        surplus = len(self._ahead) - common
        if surplus and not self._matcher.rollback(surplus):
            raise MatcherError(self._matcher.get_error())
        self._consume(path[common:])
        self._ahead = path

    def _consume(self, tokens: Items[int]) -> None:
        assert self._matcher is not None
        if self._matcher.try_consume_tokens(list(tokens)) != len(tokens):
            raise MatcherError(self._matcher.get_error() or "a token does not match")

    def _look(self) -> Next:
        """What may come where the matcher is. Raises MatcherError if it cannot tell."""
        assert self._matcher is not None
        fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            raise MatcherError(self._matcher.get_error())
        if self._matcher.is_stopped():
            if not self._matcher.is_accepting():
                raise MatcherError("no text matches it")
            return Next(self._nothing, end="stop")
        bits = np.unpackbits(self._mask[0].view(np.uint8), count=self._mask_len, bitorder="little")
        num = int(np.count_nonzero(bits))
        if num == 0:
            raise MatcherError("no token matches it")
        allowed = self._nothing.clone()
        allowed[: self._mask_len] = torch.from_numpy(bits.view(np.bool_))
        return Next(allowed, int(bits.argmax()) if num == 1 else None)


class Grammars:
    """The sequences that have a grammar, and where each of them is in it; an Edit (``engine.edits``).

    compiler: None where there is no tokenizer, and hence no grammar; vocab_size: the model's.
    """

    def __init__(self, compiler: GrammarCompiler | None, vocab_size: int) -> None:
        self._compiler, self._vocab_size = compiler, vocab_size
        self._places: dict[int, Place] = {}

    def check(self, request: Request) -> None:
        """Raises RequestError for a grammar that cannot be compiled."""
        if request.sampling.grammar is not None:
            self._start(request.sampling.grammar)

    def applies(self, params: SamplingParams) -> bool:
        return params.grammar is not None

    def __call__(self, logits: Tensor, batch: Batch, tree: DraftTree, rows: list[int]) -> None:
        """Leave in every row what the grammar allows after its node. Rows that no answer can get to, or
        behind an answer's end, may say anything."""
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        for row in rows:
            seq = batch.seqs[row]
            place = self._place(seq, batch.known_tokens(row, len(seq.request.prompt)))
            paths: list[Path] = [()]
            for token, parent in zip(tokens[row][1:], parents[row][1:], strict=True):
                paths.append((*paths[parent], token) if parent >= 0 else ())
            found = [place.after(path) for path in paths]
            allowed = torch.stack([one.allowed for one in found]).to(logits.device)
            logits[row].masked_fill_(~allowed, NEVER)
            for node, one in enumerate(found):
                if one.only is not None:
                    logits[row, node, one.only] = 0.0

    def allowed(self, seq: Sequence, path: Path) -> Tensor:
        """As roles.DraftMask."""
        return self._place(seq, seq.tokens[len(seq.request.prompt) :]).after(path).allowed

    def after(self, seq: Sequence) -> Next:
        """What may follow all that is known of a sequence."""
        return self._place(seq, (seq.tokens + seq.forced)[len(seq.request.prompt) :]).after(())

    def forget(self, seq: Sequence) -> None:
        self._places.pop(seq.request.id, None)

    def _place(self, seq: Sequence, answer: list[int]) -> Place:
        place = self._places.get(seq.request.id)
        if place is None:
            grammar = seq.request.sampling.grammar
            assert grammar is not None
            assert self._compiler is not None, "checked when the request came"
            place = Place(partial(self._start, grammar), self._compiler.vocab_size, self._vocab_size)
            self._places[seq.request.id] = place
        place.advance(answer)
        return place

    def _start(self, grammar: Grammar) -> LLMatcher:
        if self._compiler is None:
            raise RequestError("this engine was built without a tokenizer and knows no grammars", "grammar")
        return self._compiler.matcher(grammar)
