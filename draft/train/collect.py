"""The data phase: the engine asks itself questions and answers them, and the recorder keeps the features.

Two kinds of requests share the engine so that its batch is always full: *questions* (the template's user
turn, continued by sampling) and *answers* (every second one greedy, the others at ``temperature``). A
question that looks like text and is new waits to be answered; an answer becomes a document. Request ids are
the seeds, so a resumed run, which starts behind the last id of a finished shard, draws new questions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from draft.train.prompts import MAX_PROMPT_TOKENS, OPENERS, looks_like_text
from draft.train.recorder import FeatureRecorder, Recording
from draft.train.shards import Document, Manifest, ShardWriter
from engine.core import Delta, Request, SamplingParams

_SHARD_SECONDS = 600.0  # a slow machine writes smaller shards, so that little is lost when it is stopped


class Generator(Protocol):
    """What is needed of the engine."""

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Delta]: ...

    @property
    def has_work(self) -> bool: ...


class ChatFormat(Protocol):
    """The target's text side."""

    def user_turn(self, opener: str) -> list[int]:
        """Token ids of the template up to the user's text, and of the first words of that text."""
        ...

    def question(self, user_text: str) -> list[int]:
        """Token ids of a conversation with one user message, up to where the answer starts."""
        ...

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of token ids without control tokens."""
        ...


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How the data is made. ``tokens``: answer tokens wanted; temperature: of every second answer."""

    tokens: int = 1_000_000
    max_minutes: float | None = None
    seed: int = 0
    temperature: float = 0.8
    question_temperature: float = 0.9  # at 1 a small model's questions are half nonsense
    max_answer_tokens: int = 320
    max_model_len: int = 1024
    batch_size: int = 32
    shard_tokens: int = 100_000


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the data phase tells while it goes. Seconds include those of earlier, interrupted runs."""

    answer_tokens: int
    documents: int
    questions: int
    rejected: int
    seconds: float


class Collector:
    """Fills a data directory up to ``settings.tokens`` answer tokens or the time budget."""

    def __init__(
        self,
        engine: Generator,
        recorder: FeatureRecorder,
        chat: ChatFormat,
        manifest: Manifest,
        settings: DataSettings,
        prompts: Sequence[str] = (),
        report: Callable[[DataReport], None] | None = None,
    ) -> None:
        """prompts: texts to answer first; when they are used up, the target's own follow."""
        self._engine, self._recorder, self._chat = engine, recorder, chat
        self._manifest, self._settings = manifest, settings
        self._report = report if report is not None else lambda _: None
        self._writer = ShardWriter(manifest, settings.shard_tokens)
        self._next_id = manifest.next_id
        known = manifest.prompt_texts()
        self._seen = set(known)
        self._waiting = deque(dict.fromkeys(text for text in prompts if text not in self._seen))
        self._seen.update(self._waiting)
        self._questions: dict[int, str] = {}  # request id -> opener
        self._answers: dict[int, tuple[str, bool]] = {}  # request id -> (user text, greedy)
        self._num_answers = len(known)
        self._num_questions = self._num_rejected = 0
        self._documents = len(known)

    def run(self) -> None:
        """Work until enough is collected; what is under way at the end is given up."""
        started = shard_started = time.monotonic()
        earlier = self._manifest.seconds
        settings = self._settings
        while self._writer.num_answer_tokens < settings.tokens:
            elapsed = earlier + time.monotonic() - started
            if settings.max_minutes is not None and elapsed >= 60 * settings.max_minutes:
                break
            self._fill()
            full = False
            for delta in self._engine.step():
                if delta.finish_reason is not None:
                    full |= self._finished(delta.request_id, delta.finish_reason == "stop")
            if full or time.monotonic() - shard_started > _SHARD_SECONDS:
                self._writer.flush(self._next_id, time.monotonic() - shard_started)
                shard_started = time.monotonic()
            self._report(
                DataReport(
                    self._writer.num_answer_tokens,
                    self._documents,
                    self._num_questions,
                    self._num_rejected,
                    elapsed,
                )
            )
        self._writer.flush(self._next_id, time.monotonic() - shard_started)

    def _fill(self) -> None:
        """Keep the engine's batch full, answers before questions."""
        while len(self._questions) + len(self._answers) < self._settings.batch_size:
            if self._waiting:
                self._ask(self._waiting.popleft())
            else:
                self._invent()

    def _invent(self) -> None:
        """Let the target write a user turn."""
        number = self._take_id()
        opener = OPENERS[(number // 2) % len(OPENERS)] if number % 2 else ""
        self._questions[number] = opener
        self._engine.add(
            Request(
                number,
                tuple(self._chat.user_turn(opener)),
                SamplingParams(
                    temperature=self._settings.question_temperature,
                    seed=self._seed(number),
                    max_tokens=MAX_PROMPT_TOKENS + 1,
                ),
            )
        )

    def _ask(self, text: str) -> None:
        """Let the target answer."""
        greedy = self._num_answers % 2 == 0
        self._num_answers += 1
        prompt = self._chat.question(text)
        if len(prompt) + 16 > self._settings.max_model_len:
            return
        number = self._take_id()
        self._answers[number] = (text, greedy)
        self._engine.add(
            Request(
                number,
                tuple(prompt),
                SamplingParams(
                    temperature=0.0 if greedy else self._settings.temperature,
                    seed=self._seed(number),
                    max_tokens=min(
                        self._settings.max_answer_tokens, self._settings.max_model_len - len(prompt)
                    ),
                ),
            )
        )

    def _finished(self, number: int, ended: bool) -> bool:
        """Put a finished request to use; True when a shard is full."""
        recording = self._recorder.take(number)
        if number in self._questions:
            self._keep_question(recording, self._questions.pop(number), ended)
            return False
        text, greedy = self._answers.pop(number)
        answer = torch.zeros(len(recording.tokens), dtype=torch.bool)
        answer[recording.prompt_len :] = True
        self._documents += 1
        return self._writer.add(
            Document(
                torch.tensor(recording.tokens, dtype=torch.int32), recording.features, answer, greedy, text
            )
        )

    def _keep_question(self, recording: Recording, opener: str, ended: bool) -> None:
        self._num_questions += 1
        written = recording.tokens[recording.prompt_len :]
        text = (opener + self._chat.text(written)).strip()
        if ended and text not in self._seen and looks_like_text(text, len(written)):
            self._seen.add(text)
            self._waiting.append(text)
        else:
            self._num_rejected += 1

    def _take_id(self) -> int:
        number = self._next_id
        self._next_id += 1
        return number

    def _seed(self, number: int) -> int:
        return self._settings.seed * 1_000_003 + number
