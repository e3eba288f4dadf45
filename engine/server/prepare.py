"""From a client's request to the engine's: render, tokenise, check against model and context.

These functions take time with long prompts; the server runs them in a thread. Cheap bounds come first, so
that a prompt of many megabytes is refused before it is tokenised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from engine.config import EngineConfig
from engine.core import Grammar, Request
from engine.errors import ContextLengthError, RequestError
from engine.server import protocol
from engine.server.held import answer_holder
from engine.server.sampling_fields import choice_seed, sampling_params
from engine.server.tool_fields import use_of
from engine.text.conversation import AnyTokenizer, conversation_ids, conversation_size
from engine.text.grammar import GrammarCompiler
from engine.text.tools import ToolUse


@dataclass(frozen=True)
class Preparer:
    """Knows the model's vocabulary and context. Requests get id 0; whoever submits them numbers them.

    compiler: the engine's; tries grammars out before the engine sees them.
    """

    tokenizer: AnyTokenizer
    config: EngineConfig
    compiler: GrammarCompiler

    def chat(self, call: protocol.ChatRequest) -> list[Request]:
        """A request for each answer to the conversation. Raises RequestError, ContextLengthError among
        them."""
        messages = protocol.messages(call)
        self._check_size(conversation_size(self.tokenizer, messages), "messages")
        use = use_of(call.tools, call.tool_choice, call.parallel_tool_calls)
        tools = None if use is None else use.tools
        self._check_size(conversation_size(self.tokenizer, messages, tools), "tools")
        grammar = self._grammar(call, use)
        ids = conversation_ids(self.tokenizer, messages, tools=tools, reasoning_effort=call.reasoning_effort)
        return self._requests(call, ids, "messages", grammar)

    def completion(self, call: protocol.CompletionRequest) -> list[Request]:
        """The requests for each answer to each prompt, prompt by prompt. Raises RequestError,
        ContextLengthError among them."""
        grammar = self._grammar(call)
        return [
            request
            for prompt in protocol.prompts(call)
            for request in self._requests(call, self._prompt_ids(prompt), "prompt", grammar)
        ]

    def _grammar(self, call: protocol.GenerationRequest, use: ToolUse | None = None) -> Grammar | None:
        return answer_holder(self.tokenizer, self.compiler, use, protocol.grammar_of(call))

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.text_ids(prompt, add_bos=True)
        self.check_ids(prompt, "prompt")
        return prompt

    def text_ids(self, text: str, add_bos: bool) -> list[int]:
        """Tokens of a text that is not hopelessly long. Raises RequestError."""
        self._check_size(len(text.encode()), "prompt")
        return self.tokenizer.encode(text, add_bos=add_bos)

    def _requests(
        self, call: protocol.GenerationRequest, ids: list[int], param: str, grammar: Grammar | None
    ) -> list[Request]:
        if not ids:
            raise RequestError("the prompt has no tokens, at least one is needed", param)
        if len(ids) >= self.config.max_model_len:
            error = ContextLengthError(len(ids), self.config.max_model_len)
            error.param = param
            raise error
        self.check_ids(call.stop_token_ids or [], "stop_token_ids")
        sampling = sampling_params(call, len(ids), self.config.max_model_len, self.tokenizer)
        sampling = replace(sampling, grammar=grammar)
        first = Request(
            id=0,
            prompt=tuple(ids),
            sampling=sampling,
            speculation=protocol.speculation(call, self.config.speculation),
            priority=call.priority or 0,
            cache_salt=call.cache_salt or "",
        )
        seeds = [choice_seed(sampling.seed, choice) for choice in range(call.num_choices)]
        return [replace(first, sampling=replace(sampling, seed=seed)) for seed in seeds]

    def check_ids(self, ids: list[int], param: str) -> None:
        """Refuse ids that are no tokens (RequestError)."""
        for position, token in enumerate(ids):
            if not 0 <= token < self.tokenizer.vocab_size:
                raise RequestError(
                    f"token id {token} is outside the vocabulary of {self.tokenizer.vocab_size} tokens",
                    f"{param}[{position}]",
                )

    def _check_size(self, num_bytes: int, param: str) -> None:
        """Refuse text that cannot fit even if every token were as long as the longest of the vocabulary."""
        if num_bytes <= self.config.max_model_len:
            return
        at_least = num_bytes // self._longest_token
        if at_least >= self.config.max_model_len:
            raise RequestError(
                f"the prompt has {num_bytes} bytes, hence at least {at_least} tokens, but at most "
                f"{self.config.max_model_len - 1} fit (max_model_len is {self.config.max_model_len}, "
                "one token is needed for the answer)",
                param,
                ContextLengthError.code,
            )

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the longest token, at least 1."""
        return max(1, *(len(self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.vocab_size)))
