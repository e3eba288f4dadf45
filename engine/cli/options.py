"""Flags that several verbs share: which model, how to run it, what to draft.

``add_engine_arguments`` declares them, ``engine_config`` turns them into an EngineConfig, ``open_engine``
loads. Flag names are vLLM's where vLLM has one.
"""

from __future__ import annotations

import argparse
import re

import torch

from engine.build import Served, build
from engine.cli.progress import LoadingBar
from engine.config import EngineConfig
from engine.core import Speculation
from engine.errors import ConfigError
from kernels import has_fast_bfloat16

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def add_engine_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Declare MODEL and the flags of model, engine and speculation. dtype: the verb's default for --dtype."""
    default = EngineConfig()
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a GGUF file or a Hugging Face directory; without it, the default pair",
    )
    group.add_argument("--model", "--model-path", dest="model_flag", metavar="MODEL", help=argparse.SUPPRESS)
    group.add_argument(
        "--dtype",
        choices=("auto", "w16a32", *_DTYPES),
        default=dtype,
        help="w16a32 is float32 with weights in float16, for CPUs (elsewhere float32); auto is w16a32 on a "
        "CPU without AVX-512 bfloat16, else bfloat16",
    )
    group.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N; auto takes a GPU if there is one"
    )

    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-model-len",
        type=int,
        default=default.max_model_len,
        metavar="TOKENS",
        help="longest prompt plus answer",
    )
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=default.max_num_seqs,
        metavar="N",
        help="requests that run at once",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=default.max_num_batched_tokens,
        metavar="TOKENS",
        help="size of a prefill step; longer prompts take several",
    )
    group.add_argument(
        "--block-size",
        "--page-size",
        dest="page_size",
        type=int,
        default=default.page_size,
        metavar="TOKENS",
        help="tokens per page of the KV cache",
    )
    group.add_argument(
        "--kv-cache-memory",
        type=num_bytes,
        default=default.kv_cache_memory,
        metavar="BYTES",
        help="memory for the KV cache, as 512MiB or 2GiB",
    )

    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--spec-model",
        metavar="HEAD",
        help="directory of a draft head, or 'ngram' or 'none'; without it, the shipped head "
        "with the default model and none with any other",
    )
    group.add_argument(
        "--spec-nodes",
        type=int,
        default=None,
        metavar="N",
        help="nodes of the draft tree, root included; 1 turns speculation off (default 8, or 4 on a CPU "
        "without AVX-512 bfloat16, where every scored node costs time)",
    )
    group.add_argument(
        "--spec-depth", type=int, default=None, metavar="N", help="levels of the draft tree (default 4, or 3)"
    )
    group.add_argument(
        "--spec-top-k", type=int, default=None, metavar="N", help="children of a node (default 4, or 2)"
    )
    group.add_argument(
        "--spec-draft-vocab",
        type=int,
        default=default.draft_vocab_size,
        metavar="N",
        help="tokens that a head of Mistral Small 4 drafts among, the most frequent; 0 for all",
    )
    group.add_argument(
        "--spec-max-model-len",
        type=int,
        default=default.draft_max_model_len,
        metavar="TOKENS",
        help="such a head drafts for sequences up to this length, longer ones are decoded plainly",
    )
    group.add_argument(
        "--spec-log", metavar="FILE", help="write every step's tree, verdict and times as JSONL"
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the flags describe. Raises ConfigError naming the flag."""
    for flag, low, high in (("spec_nodes", 1, 64), ("spec_depth", 0, 16), ("spec_top_k", 1, 16)):
        if getattr(args, flag) is not None and not low <= getattr(args, flag) <= high:
            name = flag.replace("_", "-")
            raise ConfigError(f"--{name} is {getattr(args, flag)}, expected {low} to {high}")
    device = device_name(args.device)
    tree = default_tree(device)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if bfloat16_is_fast(device) else "w16a32"
    return EngineConfig(
        dtype=torch.float32 if dtype == "w16a32" else _DTYPES[dtype],
        half_weights=dtype == "w16a32" and device == "cpu",
        device=device,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        page_size=args.page_size,
        kv_cache_memory=args.kv_cache_memory,
        speculation=Speculation(
            tree.nodes if args.spec_nodes is None else args.spec_nodes,
            tree.depth if args.spec_depth is None else args.spec_depth,
            tree.top_k if args.spec_top_k is None else args.spec_top_k,
        ),
        draft_vocab_size=args.spec_draft_vocab,
        draft_max_model_len=args.spec_max_model_len,
        spec_log=args.spec_log,
    )


def default_tree(device: str) -> Speculation:
    """The tree where none is asked for.

    Eight nodes are the design's choice for GPUs and CPUs with bfloat16 units, not yet measured there. On the
    one CPU without such units that was tried, scoring eight cost half as much again as scoring one, so fewer
    are drafted.
    """
    return Speculation() if bfloat16_is_fast(device) else Speculation(4, 3, 2)


def model_name(args: argparse.Namespace) -> str | None:
    """The model asked for, None for the default pair."""
    name: str | None = args.model if args.model is not None else args.model_flag
    return name


def open_engine(args: argparse.Namespace) -> Served:
    """Load the model that the flags name, with a progress bar on stderr.

    Raises ConfigError or CheckpointError.
    """
    with LoadingBar() as bar:
        return build(model_name(args), args.spec_model, engine_config(args), bar.update)


def num_bytes(text: str) -> int:
    """Parse a size: '1073741824', '512MiB', '2GB', '1.5g'. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected a number with KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def bfloat16_is_fast(device: str) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    return device != "cpu" or has_fast_bfloat16()


def device_name(name: str) -> str:
    """The device that --device names, "auto" resolved. Raises ConfigError for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}, expected cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}, expected cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, but this machine has no usable CUDA device")
    return name
