"""The grammar of an answer in Mistral's format: mistral-common's own, filled in for one request.

    [THINK]..[/THINK] text [TOOL_CALLS]name[ARGS]{..}[TOOL_CALLS]name[ARGS]{..}
    [THINK]..[/THINK] {..}                                                          an answer in JSON

Thoughts, and text before the calls, stay free: that is how the model was trained. Which functions are called,
how often and with what arguments is held. mistral-common leaves all names open unless some function is
strict, so each is given to it as a strict one; what ``strict`` means is already in the schemas of the
arguments (``engine.text.tools``).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from engine.text.mistral import MistralTokenizer
from engine.text.tools import ToolUse

if TYPE_CHECKING:
    from mistral_common.guidance.grammar_factory import GrammarFactory


def answer_grammar(tokenizer: MistralTokenizer, use: ToolUse | None, answer: str | None = None) -> str:
    """Lark grammar (llguidance's) of an answer that calls functions as ``use`` says; None: no calls.

    answer: JSON schema of an answer that is no call, None for any text.
    """
    from mistral_common.protocol.instruct.tool_calls import Function, Tool, ToolChoiceEnum

    assert use is not None or answer is not None, "free text needs no grammar"
    mode, tools, must_call = ToolChoiceEnum.none, None, False
    if use is not None:
        must_call = use.must_call
        mode = ToolChoiceEnum.required if must_call else ToolChoiceEnum.auto
        tools = [
            Tool(function=Function(name=each.name, parameters=each.arguments_schema(), strict=True))
            for each in use.functions
        ]
    factory = _factory(tokenizer)
    return factory.get_lark_from_jinja(
        template=factory.select_jinja_template(),
        mode=mode,
        tools=tools,
        json_schema=None if answer is None or must_call else json.loads(answer),
        parallel_tool_calls=use is None or use.parallel,
        json_only=use is None,
        force_tool_names=False,
    )


@lru_cache(maxsize=1)
def _factory(tokenizer: MistralTokenizer) -> GrammarFactory:
    """Made once per model: it reads the whole vocabulary, which takes a second."""
    from mistral_common.guidance.grammar_factory import GrammarFactory

    return GrammarFactory(tokenizer.common)
