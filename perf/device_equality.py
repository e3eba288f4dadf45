"""Does a GPU say what the CPU says: ``python -m perf.device_equality [--model FILE] [--json FILE]``.

The same pair answers the same prompts on both, in float32 without TF32, plain and speculative, greedy and
sampled with the same seeds. Answers that differ are counted. Two devices add numbers in different orders, so
where the CPU's two best tokens are as near as rounding (``TIE`` in log-probability) either may come out, and
everything behind it differs; such answers are counted apart. Any other difference of a greedy answer makes
the exit code 1. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from engine.build import DEFAULT_HEAD, build, default_model_path
from engine.cli.options import device_name
from engine.config import EngineConfig
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from engine.errors import ConfigError, EngineError
from engine.step import Engine
from engine.text.conversation import conversation_ids
from perf import document
from perf.latency import DEFAULT_PROMPTS, read_prompts
from perf.provenance import provenance

TIE: Final = 1e-3
_CONTEXT: Final = 1024


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to answer: everybody's temperature, and what to draft (None: as the engine decides)."""

    name: str
    temperature: float
    speculation: Speculation | None


MODES: Final = (
    Mode("plain_greedy", 0.0, SPECULATION_OFF),
    Mode("speculative_greedy", 0.0, None),
    Mode("plain_sampled", 0.8, SPECULATION_OFF),
    Mode("speculative_sampled", 0.8, None),
)


@dataclass(slots=True)
class Answer:
    """Tokens, and how far each was ahead of the next best."""

    token_ids: list[int]
    gaps: list[float]


def answers(engine: Engine, prompts: Sequence[Sequence[int]], mode: Mode, max_tokens: int) -> list[Answer]:
    """All prompts at once on an idle engine, each with a seed of its own."""
    found = [Answer([], []) for _ in prompts]
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(
            temperature=mode.temperature, seed=number, max_tokens=max_tokens, ignore_eos=True, logprobs=2
        )
        engine.add(Request(number, tuple(prompt), sampling, mode.speculation, cache_salt=mode.name))
    while engine.has_work:
        for delta in engine.step():
            if delta.finish_reason == "error":
                raise EngineError(f"prompt {delta.request_id}, {mode.name}: {delta.error}")
            answer = found[delta.request_id]
            answer.token_ids += delta.token_ids
            answer.gaps += [one.top[0][1] - one.top[1][1] for one in delta.logprobs]
    return found


def differences(expected: Sequence[Answer], found: Sequence[Answer], greedy: bool) -> dict[str, Any]:
    """How many answers differ, and of greedy ones how many of those where the expected token was a tie."""
    places = [
        next(
            (at for at, pair in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if pair[0] != pair[1]),
            None,
        )
        for a, b in zip(expected, found, strict=True)
    ]
    differing = [number for number, place in enumerate(places) if place is not None]
    counts: dict[str, Any] = {"answers": len(expected), "differing": len(differing)}
    if greedy:
        gaps = [expected[number].gaps[places[number] or 0] for number in differing]
        counts |= {"ties": sum(gap < TIE for gap in gaps), "gaps": [round(gap, 6) for gap in gaps]}
    return counts


def all_answers(
    model: str, head: str, device: str, num_prompts: int, max_tokens: int
) -> dict[str, list[Answer]]:
    """What a pair answers on a device in float32, by the name of the mode. Raises EngineError."""
    config = EngineConfig(dtype=torch.float32, device=device, max_model_len=_CONTEXT, kv_cache_memory=1 << 29)
    served = build(model, head, config)
    prompts = [
        conversation_ids(served.tokenizer, [{"role": "user", "content": one.prompt}])
        for one in read_prompts(DEFAULT_PROMPTS)[:num_prompts]
    ]
    return {mode.name: answers(served.engine, prompts, mode, max_tokens) for mode in MODES}


def compare(expected: dict[str, list[Answer]], found: dict[str, list[Answer]]) -> dict[str, dict[str, Any]]:
    """The counts of every mode."""
    return {
        mode.name: differences(expected[mode.name], found[mode.name], mode.temperature == 0) for mode in MODES
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print. Returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m perf.device_equality", description=about)
    parser.add_argument("--model", metavar="FILE", help="a GGUF file or directory; the default model if none")
    parser.add_argument("--spec-model", metavar="HEAD", default=str(DEFAULT_HEAD))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-prompts", type=int, default=8, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    document.add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        if min(args.num_prompts, args.max_tokens) < 1:
            raise ConfigError("--num-prompts and --max-tokens must be at least 1")
        device = device_name(args.device)
        model = str(default_model_path()) if args.model is None else args.model
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        asked = model, args.spec_model
        modes = compare(
            *(all_answers(*asked, where, args.num_prompts, args.max_tokens) for where in ("cpu", device))
        )
    except EngineError as error:
        sys.stderr.write(f"device_equality: error: {error}\n")
        return 1
    result = {
        "benchmark": "device_equality", "model": Path(model).name, "modes": modes, "tf32": False,
        "max_tokens": args.max_tokens, **provenance(device, "float32"),
    }  # fmt: skip
    document.write(result, args.json)
    return int(
        any(counts["differing"] > counts.get("ties", counts["differing"]) for counts in modes.values())
    )


if __name__ == "__main__":
    sys.exit(main())
