"""What holds an answer to its form: what a request says about JSON and about tools, as one grammar.

    response_format     tools           the answer
    -                   free to use     anything; there is no grammar
    -                   demands         text and calls as demanded (``ToolUse.needs_grammar``)
    a JSON schema       any             a call as demanded, or JSON
    a JSON schema       -               JSON; after thoughts, in a format that has them

Everything is compiled here, before the engine sees the request and off its thread, so that what cannot be
compiled is refused under the name of the field that said it. Tools are tried even where nothing holds the
answer: a schema that makes no sense is not shown to a model.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Final

from engine.core import Grammar
from engine.errors import RequestError
from engine.server.structured import Wanted
from engine.text.conversation import AnyTokenizer, answer_grammar
from engine.text.grammar import GrammarCompiler
from engine.text.tools import JSON_STYLE, ToolUse, tool_use

_ANY_OBJECT: Final = '{"type": "object"}'


def answer_holder(
    tokenizer: AnyTokenizer, compiler: GrammarCompiler, use: ToolUse | None, wanted: Wanted | None
) -> Grammar | None:
    """The grammar of an answer, None if it is free. use: of tools, None without any; wanted: what the request
    says about the text.

    Raises RequestError naming the field: for what cannot be compiled, and for tools beside a grammar that is
    no JSON, which leaves no room for calls.
    """
    if wanted is not None:
        compiler.matcher(wanted.grammar, wanted.param)
    schema = None if wanted is None else _schema(wanted.grammar)
    if use is None and schema is None:
        return None if wanted is None else wanted.grammar
    if wanted is not None and schema is None:
        raise RequestError(
            f"{wanted.param} leaves no room for calls of tools; leave out one of the two, or set tool_choice "
            "to 'none'",
            wanted.param,
        )
    lark = answer_grammar(tokenizer, use, schema)
    if lark is None:
        return None if wanted is None else wanted.grammar
    grammar = Grammar("lark", lark)
    _compile(compiler, grammar, use)
    is_free = schema is None and use is not None and not use.needs_grammar
    return None if is_free else grammar


def rehearse(tokenizer: AnyTokenizer, compiler: GrammarCompiler) -> None:
    """Make at the start what the first grammar would else wait for, and everybody with it: vocabularies are
    read whole, which takes a large one seconds. One that can have no grammar says so to whoever asks."""
    use = tool_use([{"type": "function", "function": {"name": "rehearsal"}}], must_call=True)
    with suppress(RequestError):
        answer_holder(tokenizer, compiler, use, None)


def _schema(grammar: Grammar) -> str | None:
    """The JSON schema of a grammar as it goes into another one; None if it is no JSON."""
    if grammar.kind not in ("json_object", "json_schema"):
        return None
    schema = json.loads(grammar.text if grammar.kind == "json_schema" else _ANY_OBJECT)
    return json.dumps({"x-guidance": JSON_STYLE, **schema} if isinstance(schema, dict) else schema)


def _compile(compiler: GrammarCompiler, grammar: Grammar, use: ToolUse | None) -> None:
    """Try a grammar. If it is refused, find the function that it is refused for."""
    try:
        compiler.matcher(grammar, "tools")
    except RequestError:
        for function in () if use is None else use.functions:
            compiler.matcher(Grammar("json_schema", json.dumps(function.arguments_schema())), function.param)
        raise
