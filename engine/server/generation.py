"""One HTTP answer: one or several requests on one ticket, collected or streamed.

A stream has one event per step and none before the first token; the role comes with that token. What a step
could not complete (a cut character, what may become a stop string, the name of a tool) waits for a later
event. The last chunk carries ``metrics``: the usage chunk if the client asked for one, else the chunk with
the last finish reason.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

from aiohttp import web
from msgspec import UNSET, UnsetType

from engine.build import Served
from engine.core import Request
from engine.errors import EngineError
from engine.server import faults
from engine.server.logprobs import Logprobs, Speller
from engine.server.metrics import Metrics, StampedDelta, summarise
from engine.server.output import Output, output_for
from engine.server.protocol import StreamOptions
from engine.server.replies import Choice, Envelope, Form, PromptTokensDetails, Reply, TextChoice, Usage
from engine.server.runner import EngineRunner
from engine.server.sse import ClientGoneError, EventStream
from engine.server.ticket import Ticket
from engine.text.output_parser import Event

log = logging.getLogger(__name__)


class Generation:
    """The answers to one HTTP request. Always ``release`` it: that is what frees the engine of a client that
    left."""

    def __init__(
        self,
        runner: EngineRunner,
        ticket: Ticket,
        outputs: Sequence[Output],
        spellers: Sequence[Speller],
        num_choices: int,
        envelope: Envelope,
        with_token_ids: bool = False,
    ) -> None:
        self._runner, self._ticket, self._envelope = runner, ticket, envelope
        self._outputs, self._spellers, self._num_choices = list(outputs), list(spellers), num_choices
        self._index = {output.request.id: index for index, output in enumerate(outputs)}
        self._begun: set[int] = set()  # answers of which something was sent
        self._with_token_ids = with_token_ids
        self._num_sent = [0] * len(outputs)  # tokens

    @classmethod
    async def start(
        cls,
        runner: EngineRunner,
        served: Served,
        requests: Sequence[Request],
        num_choices: int,
        form: Form,
        model: str,
        arrival: float,
        with_token_ids: bool = False,
    ) -> Generation:
        """Number the requests, of which ``num_choices`` in a row have the same prompt, and submit them.
        Raises the EngineError with which the engine refuses one."""
        numbered = [dataclasses.replace(request, id=runner.new_id()) for request in requests]
        outputs = [output_for(served, request, arrival, form.reading) for request in numbered]
        spellers = [form.speller(served.tokenizer) for _ in outputs]
        ticket = await runner.submit(numbered)
        return cls(runner, ticket, outputs, spellers, num_choices, Envelope(form, model), with_token_ids)

    def release(self) -> None:
        """Abort whatever still runs, and count how it ended. Call once."""
        self._runner.release(self._ticket)
        unfinished = "abort" if self._ticket.error is None else "error"
        for output in self._outputs:
            reason = "stop" if output.finish_reason == "tool_calls" else output.finish_reason
            self._runner.totals.add_request(output.stats, reason or unfinished)

    @property
    def is_complete(self) -> bool:
        return all(output.finish_reason is not None for output in self._outputs)

    async def collect(self) -> Reply:
        """The whole response. Raises EngineError."""
        while not self.is_complete:
            for stamped in await self._ticket.next():
                self._push(stamped)
        choices = [
            self._envelope.form.whole(
                index, output.answer, output.finish_reason or "abort", self._logprobs(index)
            )
            for index, output in enumerate(self._outputs)
        ]
        reply = self._envelope.answer(choices, self._usage(), self._metrics())
        return self._add_token_ids(reply, range(len(choices)))

    async def stream(
        self, request: web.Request, options: StreamOptions, keep_alive_interval: float, request_id: str
    ) -> web.StreamResponse:
        """Stream the response. An error after the headers becomes an event, followed by the usual end mark.

        keep_alive_interval: seconds of silence after which a comment is sent; 0 turns that off. Raises
        ClientGoneError.
        """
        events = EventStream()
        await events.open(request)
        try:
            while not self.is_complete:
                patience = max(keep_alive_interval - events.silence, 0) if keep_alive_interval else None
                deltas = await self._ticket.next(patience)
                for reply in self._chunks(deltas, options):
                    await events.send(reply)
                # Steps may pass without an event: chunks of a long prompt, text that is held back.
                if keep_alive_interval and events.silence >= keep_alive_interval:
                    await events.keep_alive()
            if options.include_usage:
                await events.send(self._envelope.chunk([], self._usage(), self._metrics()))
        except EngineError as error:
            await events.send(faults.reply_of(error))
        except ClientGoneError:
            raise
        except Exception:
            log.exception("%s failed while streaming", request_id)
            await events.send(faults.internal_error(request_id))
        return await events.close()

    def describe(self) -> str:
        """One line for the log."""
        usage, metrics = self._usage(), self._metrics()
        reasons = ",".join(sorted({output.finish_reason or "unfinished" for output in self._outputs}))
        line = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {reasons}"
        if metrics.time_to_first_token_ms is not None:
            line += f", first token after {metrics.time_to_first_token_ms:.0f} ms"
        if metrics.tokens_per_second is not None:
            line += f", {metrics.tokens_per_second:.1f} tok/s"
        spec = metrics.speculative_decoding
        if spec is not None and spec.mean_acceptance_length is not None:
            line += f", acceptance length {spec.mean_acceptance_length:.2f}"
        return line

    def _chunks(self, deltas: list[StampedDelta], options: StreamOptions) -> list[Reply]:
        """The events for what has gathered: one per answer that grew visibly or ended."""
        growth: dict[int, list[Event]] = {}
        for stamped in deltas:
            index = self._index[stamped.delta.request_id]
            if self._outputs[index].finish_reason is None:
                growth.setdefault(index, []).extend(self._push(stamped))
        grown = [index for index, events in growth.items() if events or self._outputs[index].finish_reason]
        replies = []
        for position, index in enumerate(grown):
            is_last = self.is_complete and position == len(grown) - 1
            is_first = index not in self._begun
            reply = self._envelope.chunk(
                [self._piece(index, growth[index])],
                self._usage() if options.continuous_usage_stats else UNSET,
                self._metrics() if is_last and not options.include_usage else UNSET,
            )
            replies.append(self._add_token_ids(reply, [index], with_prompt=is_first))
        return replies

    def _add_token_ids(self, reply: Reply, indexes: Iterable[int], with_prompt: bool = True) -> Reply:
        """Put the tokens behind each choice of a reply, if the client wants them, and those of the prompt.
        indexes: which answers the choices are."""
        if not self._with_token_ids:
            return reply
        for index, choice in zip(indexes, reply.choices, strict=True):
            output = self._outputs[index]
            choice.token_ids = output.token_ids[self._num_sent[index] :]
            self._num_sent[index] = len(output.token_ids)
            if with_prompt:
                holder = choice if isinstance(choice, TextChoice) else reply
                holder.prompt_token_ids = list(output.request.prompt)
        return reply

    def _piece(self, index: int, events: list[Event]) -> Choice:
        is_first = index not in self._begun
        self._begun.add(index)
        reason = self._outputs[index].finish_reason
        return self._envelope.form.piece(index, events, is_first, reason, self._logprobs(index))

    def _logprobs(self, index: int) -> Logprobs | None:
        """Of the tokens of an answer that were not reported yet; None if nobody asks."""
        output = self._outputs[index]
        if output.request.sampling.logprobs is None:
            return None
        return self._spellers[index](output.take_scored())

    def _push(self, stamped: StampedDelta) -> list[Event]:
        output = self._outputs[self._index[stamped.delta.request_id]]
        events = output.push(stamped)
        if output.finish_reason is not None and stamped.delta.finish_reason is None:
            self._runner.abort(self._ticket, [output.request.id])  # a stop string, unknown to the engine
        return events

    def _usage(self) -> Usage:
        firsts = self._outputs[:: self._num_choices]  # a prompt counts once, however many answers it gets
        prompt = sum(len(output.request.prompt) for output in firsts)
        completion = sum(output.num_tokens for output in self._outputs)
        details: PromptTokensDetails | UnsetType = UNSET
        if self._runner.engine.config.prefix_caching:
            details = PromptTokensDetails(sum(output.stats.num_cached for output in firsts))
        return Usage(prompt, completion, prompt + completion, details)

    def _metrics(self) -> Metrics:
        return summarise([output.stats for output in self._outputs])
