"""``haast synth DIR``: a random Mistral Small 4, and its Eagle head, in a layout that is published.

Names, shapes, types and config are those of the real files, the numbers are noise: for trying out a reader,
a server or a disk without 120 GB of weights. It answers with nonsense.

    tiny   2 layers of width 64, written within a second; runs on a CPU
    4gb    7 layers of width 2,048: about 4 GB in FP8, to measure loading
    full   the published sizes. Only headers: files have their length, take up no space and read as zeros;
           ``haast serve --load-format dummy`` fills the model on its device, if there is a tokenizer
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.checkpoint.mistral_tables import VisionShape
from engine.checkpoint.synthetic import write_head, write_headers, write_target
from engine.checkpoint.synthetic_config import SMALL_4, SMALL_4_VISION, TINY, TINY_VISION, head_config
from engine.checkpoint.synthetic_tables import LAYOUTS, Layout, Table, head_table, target_table
from engine.config import EngineConfig, Mistral4Config
from engine.errors import ConfigError

_PUBLISHED_SHARDS: Final[dict[Layout, int]] = {"native-fp8": 7, "native-nvfp4": 13, "hf-fp8": 3}


@dataclass(frozen=True, slots=True)
class Size:
    """What ``--size`` names."""

    config: Mistral4Config
    vision: VisionShape | None
    num_shards: int  # 0: as published


SIZES: Final = {
    "tiny": Size(TINY, TINY_VISION, 1),
    "4gb": Size(
        dataclasses.replace(
            SMALL_4, hidden_size=2048, num_layers=7, intermediate_size=6144, moe_intermediate_size=512
        ),
        None,
        4,
    ),
    "full": Size(SMALL_4, SMALL_4_VISION, 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast synth``."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write the target; new or empty")
    parser.add_argument("--head-dir", type=Path, metavar="DIR", help="write its Eagle head here as well")
    parser.add_argument("--layout", choices=LAYOUTS, default="native-fp8", help="of the target's files")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="full writes headers only")
    parser.add_argument("--headers-only", action="store_true", help="files with headers and holes for data")
    parser.add_argument(
        "--yes-write-everything", action="store_true", help="with --size full: the data too, 71 to 239 GB"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the numbers")
    parser.add_argument(
        "--tekken", type=Path, metavar="FILE", help="a tekken.json to copy: serving needs one"
    )


def run(args: argparse.Namespace) -> int:
    """Write what the flags say. Raises ConfigError before anything is written, CheckpointError for a
    tokenizer that cannot be read.
    """
    if args.headers_only and args.yes_write_everything:
        raise ConfigError("found --headers-only and --yes-write-everything, expected one of them")
    size, layout = SIZES[args.size], args.layout
    headers_only = args.headers_only or (args.size == "full" and not args.yes_write_everything)
    config = size.config if args.tekken is None else _with_vocabulary(size.config, args.tekken)
    head = None if args.head_dir is None else head_config(config)
    head_layout: Layout = "native-bf16" if layout.endswith("bf16") else "native-fp8"
    _check_directories([args.directory] if args.head_dir is None else [args.directory, args.head_dir])
    target_bytes = _num_bytes(target_table(config, layout, size.vision))
    head_bytes = 0 if head is None else _num_bytes(head_table(head, head_layout))
    if not headers_only:
        _check_space(args.directory, target_bytes + head_bytes)
    num_shards = size.num_shards or _PUBLISHED_SHARDS.get(layout, 14)
    if headers_only:
        write_headers(args.directory, config, layout, vision=size.vision, num_shards=num_shards)
    else:
        write_target(
            args.directory, config, layout, seed=args.seed, vision=size.vision, num_shards=num_shards
        )
    _say(args.directory, layout, config, target_bytes, headers_only)
    if head is not None:
        if headers_only:
            write_headers(args.head_dir, head, head_layout)
        else:
            write_head(args.head_dir, head, head_layout, seed=args.seed)
        _say(args.head_dir, head_layout, head, head_bytes, headers_only)
    if args.tekken is not None:
        shutil.copyfile(args.tekken, args.directory / "tekken.json")
    _say_next(args, config, headers_only)
    return 0


def _with_vocabulary(config: Mistral4Config, file: Path) -> Mistral4Config:
    """The config with an embedding for each of the tokenizer's tokens."""
    from engine.text.mistral import MistralTokenizer  # here, because mistral-common is slow to import

    if not file.is_file():
        raise ConfigError(f"--tekken {file}: no such file")
    num_tokens = MistralTokenizer.from_file(file).vocab_size
    return dataclasses.replace(config, vocab_size=max(config.vocab_size, num_tokens))


def _check_directories(directories: list[Path]) -> None:
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ConfigError(f"--head-dir is {directories[-1]}, expected another directory than the target's")
    for directory in directories:
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"{directory}: found a file, expected a new or empty directory")
        found = sorted(entry.name for entry in directory.iterdir())[:4] if directory.exists() else []
        if found:
            raise ConfigError(f"{directory}: found {', '.join(found)}, expected a new or empty directory")


def _check_space(directory: Path, num_bytes: int) -> None:
    """ConfigError unless the disk has room for a tenth more than will be written."""
    above = (directory.absolute(), *directory.absolute().parents)
    free = shutil.disk_usage(next(place for place in above if place.exists())).free
    if free < 1.1 * num_bytes:
        raise ConfigError(
            f"{directory}: {num_bytes / 1e9:.1f} GB are to be written, found {free / 1e9:.1f} GB of free "
            "space; --headers-only takes none"
        )


def _num_bytes(table: Table) -> int:
    return sum(spec.num_bytes for spec in table.values())


def _say(directory: Path, layout: Layout, config: Mistral4Config, num_bytes: int, headers_only: bool) -> None:
    what = "headers only, the data are holes" if headers_only else "random numbers"
    num_files = len(list(directory.glob("*.safetensors")))
    files = "1 file" if num_files == 1 else f"{num_files} files"
    sys.stdout.write(
        f"{directory}: {layout}, {config.num_layers} layers, {num_bytes / 1e6:,.1f} MB in {files}, {what}\n"
    )


def _say_next(args: argparse.Namespace, config: Mistral4Config, headers_only: bool) -> None:
    head = [] if args.head_dir is None else ["--spec-model", str(args.head_dir)]
    if headers_only:
        sys.stdout.write(shlex.join(["haast", "check", str(args.directory), *head]) + "\n")
        if args.tekken is None:
            return
        head += ["--load-format", "dummy"]  # the files have no data that could be loaded
    elif args.tekken is None:
        sys.stdout.write(
            f"Serving needs {args.directory / 'tekken.json'}; write again with --tekken FILE, so that every "
            "token has an embedding.\n"
        )
        return
    length = min(config.max_position_embeddings, EngineConfig().max_model_len)
    words = ["haast", "serve", str(args.directory), *head, "--max-model-len", str(length)]
    sys.stdout.write(shlex.join(words) + "\n")
