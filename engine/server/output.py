"""The answer side of one request: deltas in, text out.

The engine ends a request at an end-of-text token, a stop token or the length; stop strings are found here,
because only here are bytes put together to text. Used by the server on its event loop and by the command line
in process.
"""

from __future__ import annotations

from engine.build import Served
from engine.core import SPECULATION_OFF, FinishReason, Request, Speculation
from engine.server.metrics import RequestStats, StampedDelta
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer


def output_for(served: Served, request: Request, arrival: float) -> Output:
    """The answer side of a request to a served model."""
    speculation = request.speculation or served.engine.config.speculation
    if served.draft_name == "none":
        speculation = SPECULATION_OFF
    return Output(served.tokenizer, request, speculation, arrival)


class Output:
    """Grows by ``push``; complete when ``finish_reason`` is set.

    If that happened before the engine's own end (a stop string), the owner has to abort the request in the
    engine. ``speculation`` is what the request will draft, ``arrival`` its time of arrival
    (``time.perf_counter`` seconds).
    """

    def __init__(
        self, tokenizer: Tokenizer, request: Request, speculation: Speculation, arrival: float
    ) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.stats = RequestStats(arrival, 0 if speculation.is_off else speculation.depth)
        self._detokenizer = Detokenizer(tokenizer, request.sampling.stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text so far, without what is held back."""
        return "".join(self._pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens that made the answer, the end-of-text token included."""
        return self.stats.num_tokens

    def push(self, stamped: StampedDelta) -> str:
        """Take one step's delta; returns the text that became certain. What follows a stop string is not
        counted."""
        if self.finish_reason is not None:
            return ""
        text, num_tokens = self._detokenize(stamped.delta.token_ids)
        self.stats.record(stamped, num_tokens)
        if self._detokenizer.stopped is not None:
            self.finish_reason = "stop"
        elif stamped.delta.finish_reason is not None:
            self.finish_reason = stamped.delta.finish_reason
            text += self._detokenizer.flush()
        if text:
            self._pieces.append(text)
        return text

    def _detokenize(self, token_ids: tuple[int, ...]) -> tuple[str, int]:
        """Text and number of tokens used. With stop strings it goes token by token, so that the count does
        not depend on how many tokens a step emitted."""
        if not self.request.sampling.stop:
            return self._detokenizer.push(token_ids), len(token_ids)
        text = ""
        for count, token in enumerate(token_ids, start=1):
            text += self._detokenizer.push((token,))
            if self._detokenizer.stopped is not None:
                return text, count
        return text, len(token_ids)
