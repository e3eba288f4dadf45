"""Flags that several verbs share: which model, how to run it, what to draft.

``add_engine_arguments`` declares them, ``engine_config`` turns them into an EngineConfig; what they name is
loaded by ``engine.cli.loading``. Flag names are vLLM's where vLLM has one; SGLang's names are aliases.
"""

from __future__ import annotations

import argparse
import re
from typing import Final

import torch

from engine.cli import speculative
from engine.cli.environment import Switch
from engine.cli.speculative import asked
from engine.config import EngineConfig
from engine.core import Speculation
from engine.errors import ConfigError
from kernels import has_fast_bfloat16

GPU_MEMORY_UTILIZATION: Final = 0.9  # where --kv-cache-memory is not given
# As vLLM spells them; None is that of --dtype.
KV_DTYPES: Final = {"auto": None, "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def add_engine_arguments(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Declare MODEL and the flags of model, engine and speculation. dtype: the verb's default for --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a GGUF file, a Hugging Face or Mistral directory, or a hub name; without it, the default pair",
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
        "--load-format",
        choices=("auto", "safetensors", "mistral", "dummy"),
        default="auto",
        help="dummy fills model and head of this shape with random numbers, without reading weights, to "
        "measure speed; any other reads the files, whose format is found out",
    )
    group.add_argument("--device", default="auto", help="cpu or cuda; auto takes a GPU if there is one")

    group.add_argument(
        "--kv-cache-dtype",
        choices=tuple(KV_DTYPES),
        default="auto",
        metavar="KIND",
        help="of the model's KV rows: auto is that of --dtype; fp8 (fp8_e4m3), for CUDA devices, takes "
        "half of bfloat16's memory and changes answers a little",
    )
    group.add_argument(
        "--quantization",
        metavar="KIND",
        help="refuse the model unless it is stored so: fp8 or nvfp4; a checkpoint is always served as stored",
    )
    _add_step_arguments(parser.add_argument_group("engine"))
    _add_speculation_arguments(parser.add_argument_group("speculation"))


def _add_step_arguments(group: argparse._ArgumentGroup) -> None:
    default = EngineConfig()
    group.add_argument(
        "--max-model-len",
        "--context-length",
        type=int,
        default=default.max_model_len,
        metavar="TOKENS",
        help="longest prompt plus answer",
    )
    group.add_argument(
        "--max-num-seqs",
        "--max-running-requests",
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
        help="tokens of a step, prompts and drafts together; a prompt that does not fit takes several steps",
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
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        type=float,
        metavar="SHARE",
        help=f"of a GPU's memory for weights, activations and KV cache (default {GPU_MEMORY_UTILIZATION}); "
        "no effect on a CPU or with --kv-cache-memory",
    )
    group.add_argument(
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        type=num_bytes,
        metavar="BYTES",
        help="memory for the KV cache, as 512MiB or 2GiB (default on a CPU 1GiB); on a GPU what "
        "--gpu-memory-utilization leaves",
    )
    group.add_argument(
        "--enforce-eager",
        "--disable-cuda-graph",
        action=Switch,
        off=("--no-enforce-eager",),
        default=default.enforce_eager,
        help="on a GPU: launch the kernels of a step one by one, without CUDA graphs; slower, but nothing is "
        "captured at start",
    )
    group.add_argument(
        "--pdl",
        action=Switch,
        off=("--no-pdl",),
        default=default.pdl,
        help="programmatic dependent launch, on a GPU of compute capability 9.0 or more: kernels of CUDA "
        "graphs begin before the one before has ended, and fetch weights meanwhile; not yet measured",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=Switch,
        off=("--no-enable-prefix-caching", "--disable-radix-cache"),
        default=default.prefix_caching,
        help="keep the KV rows of requests for later ones that begin with the same tokens; on unless turned "
        "off with --no-enable-prefix-caching",
    )


def _add_speculation_arguments(group: argparse._ArgumentGroup) -> None:
    default = EngineConfig()
    group.add_argument(
        "--spec-model",
        "--speculative-draft-model-path",
        "--speculative-draft-model",
        metavar="HEAD",
        help="directory of a draft head, or 'ngram' or 'none'; without it, the shipped head "
        "with the default model and none with any other",
    )
    group.add_argument(
        "--spec-method",
        "--speculative-algorithm",
        type=str.lower,
        choices=speculative.METHODS,
        help="what the head must be; ngram and none need no --spec-model",
    )
    group.add_argument(
        "--spec-tokens",
        type=int,
        metavar="K",
        help="tokens to draft: a tree of K and the root, up to K deep; with --spec-top-k 1 a chain",
    )
    group.add_argument(
        "--spec-nodes",
        "--speculative-num-draft-tokens",
        type=int,
        default=None,
        metavar="N",
        help="most nodes of the draft tree, root included; 1 turns speculation off (default 12; with "
        "--spec-plan fixed 8, or 4 on a CPU without AVX-512 bfloat16, where every scored node costs time)",
    )
    group.add_argument(
        "--spec-depth",
        "--speculative-num-steps",
        type=int,
        default=None,
        metavar="N",
        help="most levels of the draft tree (default 5; fixed: 4, or 3)",
    )
    group.add_argument(
        "--spec-top-k",
        "--speculative-eagle-topk",
        type=int,
        default=None,
        metavar="N",
        help="most children of a node (default 4; fixed: 4, or 2)",
    )
    group.add_argument(
        "--spec-lookup",
        type=int,
        default=None,
        metavar="N",
        help="tokens that prompt lookup may add to a head's draft where the text repeats itself (default 8, "
        "but no more than --spec-tokens; 0 turns it off)",
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
        metavar="TOKENS",
        help="such a head drafts for sequences up to this length, longer ones are decoded plainly "
        f"(default {default.draft_max_model_len})",
    )
    group.add_argument(
        speculative.FLAG,
        "-sc",
        metavar="JSON",
        help="all of the above in vLLM's form; keys: model, method, num_speculative_tokens (as "
        "--spec-tokens: a tree of that many tokens and that deep, with top_k 1 a chain), max_model_len, and "
        "ours tree (as --spec-nodes), depth, top_k",
    )
    group.add_argument(
        "--spec-plan",
        choices=("auto", "fixed"),
        default="auto",
        help="auto: decide for every request and step whether plain decoding, a chain, a tree or prompt "
        "lookup should cost least, up to the sizes above; fixed: always draft all (default %(default)s)",
    )
    group.add_argument(
        "--spec-log", metavar="FILE", help="write every step's tree, verdict and times as JSONL"
    )
    group.add_argument(
        "--canary",
        type=float,
        default=default.canary,
        metavar="SHARE",
        help="share of the steps to decode once more without speculation; tokens that differ are counted "
        "and, where rounding does not explain it, logged as errors; 0.001 costs little, 0 is off",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the flags describe. Raises ConfigError naming the flag."""
    share = args.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--gpu-memory-utilization is {share}, expected more than 0 and at most 1")
    if not 0 <= args.canary <= 1:
        raise ConfigError(f"--canary is {args.canary}, expected a share of all steps, 0 to 1")
    default, draft = EngineConfig(), asked(args)
    device = device_name(args.device)
    decides = device != "cpu" and args.kv_cache_memory is None
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
        kv_cache_dtype=KV_DTYPES[args.kv_cache_dtype],
        kv_cache_memory=default.kv_cache_memory if args.kv_cache_memory is None else args.kv_cache_memory,
        gpu_memory_utilization=(GPU_MEMORY_UTILIZATION if share is None else share) if decides else None,
        prefix_caching=args.enable_prefix_caching,
        speculation=draft.size(default_tree(device, args.spec_plan)),
        planned=args.spec_plan == "auto",
        draft_vocab_size=args.spec_draft_vocab,
        draft_max_model_len=default.draft_max_model_len
        if draft.max_model_len is None
        else draft.max_model_len,
        enforce_eager=args.enforce_eager,
        pdl=args.pdl,
        canary=args.canary,
        spec_log=args.spec_log,
        dummy_weights=args.load_format == "dummy",
    )


def default_tree(device: str, plan: str = "auto") -> Speculation:
    """The tree where none is asked for: the largest for a planner, or what is always drafted without one.

    Eight nodes are the design's choice for GPUs and CPUs with bfloat16 units, not yet measured there. On the
    one CPU without such units that was tried, scoring eight cost half as much again as scoring one, so fewer
    are drafted.
    """
    if plan == "auto":
        return Speculation(12, 5, 4, lookup=8)
    return Speculation(lookup=8) if bfloat16_is_fast(device) else Speculation(4, 3, 2, lookup=8)


def model_name(args: argparse.Namespace) -> str | None:
    """The model asked for, None for the default pair. Raises ConfigError if two were typed."""
    typed: str | None = args.model
    flag: str | None = args.model_flag
    if typed is None:
        return flag
    sources = {given.flag: given.source for given in args.given}
    if flag not in (None, typed) and sources["--model"] == "flag":
        raise ConfigError(f"found the model {typed} and --model {flag}, expected one of them")
    return typed


def notes(args: argparse.Namespace, config: EngineConfig) -> list[str]:
    """Which of the flags given have no effect, and what happens instead."""
    if args.gpu_memory_utilization is None or config.gpu_memory_utilization is not None:
        return []
    where = "on a CPU" if config.device == "cpu" else "with --kv-cache-memory"
    size = config.kv_cache_memory / (1 << 30)
    return [
        f"--gpu-memory-utilization {args.gpu_memory_utilization}: no effect {where}; the KV cache may take "
        f"{size:.2f} GiB (--kv-cache-memory)"
    ]


def num_bytes(text: str) -> int:
    """Parse a size: '1073741824', '512MiB', '2GB', '1.5g'. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?)\s*([kmg]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} is not a size, expected a number with KiB, MiB or GiB"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def bfloat16_is_fast(device: str) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    return device != "cpu" or has_fast_bfloat16()


def device_name(name: str) -> str:
    """The device that --device names, "auto" resolved. Raises ConfigError for one that is not there.

    Of several GPUs there is only the first: kernels are launched on a thread's current device, and a server
    has more than one thread.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}, expected cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}, expected cpu or cuda")
    if device.type == "cuda" and device.index:
        raise ConfigError(f"--device is {name!r}, expected cuda, with CUDA_VISIBLE_DEVICES={device.index}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, but this machine has no usable CUDA device")
    return name
