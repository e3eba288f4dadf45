"""Flags of vLLM and SGLang that ``haast serve`` knows and does not have, so that their launch lines work.

A row of the table says which values of a flag are accepted without a word, because haast does that anyway,
and what happens to any other: ``refuse`` stops with one line that says what to use instead, ``note`` goes on
with one line in the log. Flags that do something here, under whichever of the three names, are declared in
``engine.cli.options`` and ``engine.cli.serve``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.cli.parser import FOREIGN_GROUP

Action = Literal["refuse", "note", "accept"]


@dataclass(frozen=True, slots=True)
class Row:
    """A flag: all its spellings, what to say about it, and what to do with which value."""

    flags: tuple[str, ...]
    sentence: str  # what to use, or what happens instead
    silent: tuple[str, ...] = ()  # values that are accepted without a word
    otherwise: Action = "refuse"
    takes: Literal["nothing", "value", "values"] = "value"

    def action(self, value: str) -> Action:
        """What to do with a value, "" if the flag takes none."""
        return "accept" if value.strip().lower() in self.silent else self.otherwise


def _switch(otherwise: Action, sentence: str, *flags: str) -> Row:
    return Row(flags, sentence, otherwise=otherwise, takes="nothing")


_ONE_GPU: Final = (
    "haast runs on one GPU: leave the flag out; `haast check MODEL` says which GPUs hold the model alone, "
    "Mistral Small 4 in FP8 an H200 or B200, in NVFP4 already an H100 with 80 GB"
)
_OWN_CODE: Final = "no code from a checkpoint is ever run: leave the flag out"
_OF_CHECKPOINT: Final = "the checkpoint's own is used: leave the flag out"
_NO_IMAGES: Final = "no effect: requests with images are refused"
_OWN_SERVER: Final = "the server runs no code but its own: put a proxy in front of it"
_PROXY: Final = "put a proxy in front of haast that does this"
_NO_LORA: Final = "adapters are not served: merge them into the checkpoint"
_TOOLS: Final = (
    "what an answer holds is read by the vocabulary's own tokens: use mistral, or leave the flag out"
)

TABLE: Final[tuple[Row, ...]] = (
    # several GPUs and processes
    Row(("--tensor-parallel-size", "-tp", "--tp", "--tp-size"), _ONE_GPU, ("1",)),
    Row(("--pipeline-parallel-size", "-pp", "--pp-size"), _ONE_GPU, ("1",)),
    Row(("--data-parallel-size", "-dp", "--dp-size"), _ONE_GPU, ("1",)),
    Row(("--nnodes",), _ONE_GPU, ("1",)),
    _switch("refuse", _ONE_GPU, "--enable-expert-parallel", "-ep"),
    Row(("--distributed-executor-backend",), "no effect: one process runs one GPU", ("uni", "mp"), "note"),
    _switch("accept", "there is one GPU only", "--disable-custom-all-reduce"),
    # what answers hold
    _switch("accept", "tools are always read where the model has them", "--enable-auto-tool-choice"),
    Row(("--tool-call-parser",), _TOOLS, ("mistral",)),
    Row(("--reasoning-parser",), _TOOLS, ("mistral",)),
    _switch("accept", "every answer has metrics", "--enable-per-request-metrics"),
    Row(("--chat-template",), _OF_CHECKPOINT),
    Row(
        ("--generation-config",),
        "a request's own parameters count, else OpenAI's defaults: use vllm, or leave the flag out",
        ("vllm",),
    ),
    Row(
        ("--override-generation-config", "--default-chat-template-kwargs"),
        "say it in the requests: leave the flag out",
    ),
    Row(
        ("--structured-outputs-config", "--guided-decoding-backend", "--grammar-backend"),
        "there is no structured output yet: leave the flag out",
    ),
    Row(
        ("--seed", "--random-seed"),
        'no effect: a request without a seed draws its own; give one as "seed" in the request',
        otherwise="note",
    ),
    # what is read
    Row(
        ("--tokenizer-mode",),
        "the checkpoint's own file decides, tekken.json or tokenizer.json: use auto, or leave the flag out",
        ("auto", "mistral"),
    ),
    Row(
        ("--config-format",),
        "a directory is read in Mistral's format if it has that, else in Hugging Face's: use auto, or leave "
        "the flag out",
        ("auto", "mistral"),
    ),
    Row(("--tokenizer", "--tokenizer-path", "--hf-config-path"), _OF_CHECKPOINT),
    Row(
        ("--revision", "--tokenizer-revision", "--code-revision"),
        "the commit that main names is served: to pin another, download it with `hf download ID --revision "
        "REVISION --local-dir DIR` and serve DIR",
        ("main",),
    ),
    Row(("--download-dir",), "files go to the Hugging Face cache: set HF_HOME, or serve a directory"),
    _switch("refuse", _OWN_CODE, "--trust-remote-code"),
    Row(
        ("--limit-mm-per-prompt", "--mm-processor-kwargs", "--mm-encoder-tp-mode"),
        _NO_IMAGES,
        otherwise="note",
    ),
    _switch("accept", _NO_IMAGES, "--language-model-only", "--skip-mm-profiling"),
    _switch("refuse", _NO_LORA, "--enable-lora"),
    Row(("--lora-modules", "--lora-paths"), _NO_LORA, takes="values"),
    # memory and steps
    _switch(
        "accept",
        "prompts longer than --max-num-batched-tokens always take several steps",
        "--enable-chunked-prefill",
    ),
    _switch(
        "note",
        "no effect: prompts longer than --max-num-batched-tokens take several steps",
        "--no-enable-chunked-prefill",
    ),
    Row(("--cpu-offload-gb", "--swap-space"), "weights and rows stay on their device: use 0", ("0", "0.0")),
    Row(("--num-gpu-blocks-override",), "use --kv-cache-memory BYTES"),
    Row(
        ("--scheduling-policy", "--schedule-policy"),
        'requests run by their "priority", then in order: leave the flag out',
        ("fcfs", "priority"),
    ),
    Row(
        ("--attention-backend",),
        "no effect: haast has its own attention for each kind of model",
        otherwise="note",
    ),
    Row(
        ("--compilation-config", "-cc", "--cuda-graph-max-bs", "--max-cudagraph-capture-size"),
        "no effect: nothing is compiled, and graphs are captured for up to 32 requests of up to 32 nodes; "
        "--enforce-eager does without them",
        otherwise="note",
    ),
    _switch("note", "no effect: steps are not overlapped", "--async-scheduling"),
    _switch("accept", "steps are not overlapped", "--no-async-scheduling", "--disable-overlap-schedule"),
    # the server
    _switch("accept", "/metrics is always there", "--enable-metrics"),
    _switch("accept", "every answer has its request id", "--enable-request-id-headers"),
    _switch("accept", "usage always has them", "--enable-prompt-tokens-details", "--enable-cache-report"),
    _switch(
        "accept", "there is no such log", "--disable-uvicorn-access-log", "--disable-access-log-for-endpoints"
    ),
    _switch("accept", "there are no such pages", "--disable-fastapi-docs"),
    _switch("refuse", "use --cors-origin ORIGIN", "--allow-credentials"),
    Row(("--allowed-origins",), "use --cors-origin ORIGIN, once for each"),
    Row(("--allowed-methods", "--allowed-headers"), "no effect: use --cors-origin ORIGIN", otherwise="note"),
    Row(("--middleware",), _OWN_SERVER),
    Row(("--response-role",), "the role is always assistant: leave the flag out", ("assistant",)),
    Row(("--stream-interval",), "every step is an event: use 1", ("1",)),
    Row(("--api-server-count", "--tokenizer-worker-num"), "one process serves all: use 1", ("1",)),
    Row(("--log-config-file",), "use --log-level LEVEL"),
    _switch(
        "note",
        "no effect: speed is logged every 10 s while requests run; --log-level warning turns it off",
        "--disable-log-stats",
    ),
    _switch("accept", "requests are not logged", "--disable-log-requests", "--no-enable-log-requests"),
    _switch("refuse", "requests are not logged: leave the flag out", "--enable-log-requests"),
    Row(("--ssl-keyfile", "--ssl-certfile", "--root-path"), _PROXY),
    Row(("--uds",), "the server listens on a port: use --host and --port"),
)


class _Foreign(argparse.Action):
    """Does what its row says; what was typed ends up under the flag's name, notes in ``notes``."""

    def __init__(self, option_strings: Sequence[str], dest: str, row: Row, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self._row = row

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        value = values if isinstance(values, str) else " ".join(values or ())
        said = f"{option_string} {' '.join(value.split())}".rstrip() + f": {self._row.sentence}"
        match self._row.action(value):
            case "refuse":
                parser.error(said)
            case "note":
                namespace.notes = [*notes_of(namespace), said]
            case "accept":
                pass
        setattr(namespace, self.dest, value)


def add_foreign_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the table."""
    group = parser.add_argument_group(FOREIGN_GROUP)
    for row in TABLE:
        shape: dict[str, Any] = {"nargs": {"nothing": 0, "value": None, "values": "*"}[row.takes]}
        if row.takes != "nothing":
            shape["metavar"] = "VALUE"
        group.add_argument(
            *row.flags, action=_Foreign, row=row, default=argparse.SUPPRESS, help=_help(row), **shape
        )


def notes_of(args: argparse.Namespace) -> list[str]:
    """Lines for the log: which of the flags given have no effect, and what happens instead."""
    return list(getattr(args, "notes", ()))


def _help(row: Row) -> str:
    does = {"refuse": "refused", "note": "accepted with a line in the log", "accept": "accepted"}[
        row.otherwise
    ]
    values = f"{', '.join(row.silent)} accepted, else " if row.silent else ""
    return f"{values}{does}: {row.sentence}"
