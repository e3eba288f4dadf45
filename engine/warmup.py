"""The first steps of an engine, on made-up text, before anybody waits for them.

What they leave behind is what steps cost here: of trees of many sizes and of several sequences at once. The
planner would else have to find that out on the first requests, and a size whose first steps happened to be
slow would long be left alone. What made-up text says of acceptance is forgotten.

A few dozen steps, in which everything also runs for the first time: memory is touched, libraries set up their
threads, a device compiles. And where steps are captured (``engine.graphs``), these are: greedy ones in the
first round, sampled ones in the second. Rarer ones are when they first come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from engine.config import EngineConfig
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from engine.step import Engine

_ROUNDS = 2  # through all sizes, since a machine has slow moments
_STEPS = 4  # of a size in a round: the prompt's, the one in which the head takes it in, two as they will be
_PROMPT = 24  # tokens
_MOST_SEQS = 8  # at once; what more of them cost is a straight line from there
_SALT = "warm-up"


def sizes(config: EngineConfig) -> Iterator[tuple[int, Speculation]]:
    """(sequences, what each drafts) to be timed: within the limits, two numbers of rows of the target an
    octave, and levels of the draft, alone and side by side."""
    most = config.speculation
    shapes = [SPECULATION_OFF]
    for nodes in (2, 3, 4, 6, 8, 12):
        depth = min(nodes - 1, most.depth)
        if most.has_tree and nodes <= most.nodes + most.lookup:
            shapes += [Speculation(nodes, depth, 1 if depth == nodes - 1 else most.top_k)]
    yield from ((1, shape) for shape in shapes)
    for num_seqs in (2, _MOST_SEQS):
        if num_seqs <= config.max_num_seqs:
            yield from ((num_seqs, shape) for shape in shapes[:2])


def warm_up(engine: Engine, progress: Callable[[float, str], None] = lambda share, text: None) -> None:
    """Run a few steps of every size on an idle engine, if they are captured or its speculation is planned; of
    others nothing is to be learned. progress(share, what) is called as it goes on."""
    has_head, captured = engine.draft.rows is not None, engine.graphs.are_on
    if not captured and not (engine.config.planned and has_head):
        return
    assert engine.num_running == engine.num_waiting == 0, "others wait"
    log, engine.step_log = engine.step_log, None
    ids = itertools.count(-1, -1)
    kinds = [kind for kind in sizes(engine.config) if has_head or kind[1].is_off]
    for number, (num_seqs, shape) in enumerate(kinds * _ROUNDS):
        progress(number / (len(kinds) * _ROUNDS), f"{num_seqs} requests, {shape.nodes} nodes")
        temperature = float(captured and number >= len(kinds))
        requests = [_request(next(ids), engine, shape, temperature) for _ in range(num_seqs)]
        if requests[0].sampling.max_tokens < 1:
            break
        for request in requests:
            engine.add(request)
        decodes = 0
        while engine.has_work and decodes < _STEPS:
            engine.step()
            decodes += not any(seq.forced for seq in engine.scheduler.running)
        for request in requests:
            engine.abort(request.id)
        engine.scheduler.take_aborted()
    progress(1.0, "done")
    engine.graphs.falls_back = True  # from here on a request would pay for what cannot be captured
    engine.step_log = log
    engine.draft.start_over()
    engine.scheduler.prefixes.num_asked = engine.scheduler.prefixes.num_found = 0


def _request(number: int, engine: Engine, shape: Speculation, temperature: float) -> Request:
    config, vocab_size = engine.config, engine.target.vocab_size
    prompt = tuple((number * 7919 + place * 104729) % vocab_size for place in range(_PROMPT))
    room = min(config.max_model_len - _PROMPT, _STEPS * (shape.nodes + 1))
    sampling = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=room)
    return Request(number, prompt, sampling, shape, cache_salt=_SALT)
