"""``haast train``: an EAGLE-3 head for a target, from nothing but the target.

    data      the engine asks itself questions and answers them, a recorder keeps the features
    training  the head learns to continue its own chains
    export    a head directory for ``--spec-model``

The phases are ``draft.train.collect``, ``loop`` and ``export``; here they meet the engine. Each continues
where it was interrupted: finished shards and the last checkpoint are kept in ``--work-dir``.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

from draft.train.chat import TemplateChat
from draft.train.collect import Collector, DataReport, DataSettings
from draft.train.export import Card, export_head
from draft.train.loop import CURVE, Report, Run, TrainSettings
from draft.train.model import default_feature_layers
from draft.train.prepare import prepare
from draft.train.prompts import read_prompts
from draft.train.recorder import FeatureRecorder
from draft.train.shards import Dataset, Manifest, split
from engine.build import DEFAULT_MODEL, build_engine, default_model_path
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.cli.options import bfloat16_is_fast, device_name
from engine.cli.progress import LoadingBar, PhaseBar
from engine.config import EngineConfig
from engine.core import SPECULATION_OFF
from engine.errors import ConfigError
from engine.step import Engine
from engine.text.tokenizer import Tokenizer

_HELDOUT_EVERY = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast train``."""
    data, train = DataSettings(), TrainSettings()
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a GGUF file or a Hugging Face directory; without it, {DEFAULT_MODEL}",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("head"), metavar="DIR", help="where the head goes"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("train-work"),
        metavar="DIR",
        help="data/ and run/ live here; run the command again to continue",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="replaces WORK-DIR/data; training may read several, made with different seeds",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="checkpoints and curve; replaces WORK-DIR/run"
    )
    parser.add_argument("--phase", choices=("all", "data", "train"), default="all", help="what to do")
    parser.add_argument("--device", default="auto", help="cpu or cuda; auto takes a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of data, initialisation and training")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts to answer first, one per line or JSONL; the target's own follow",
    )
    group.add_argument(
        "--tokens", type=int, default=data.tokens, metavar="N", help="answer tokens to collect"
    )
    group.add_argument(
        "--data-minutes", type=float, default=85.0, metavar="MIN", help="time budget of the data phase"
    )
    group.add_argument("--temperature", type=float, default=data.temperature, help="of every second answer")
    group.add_argument("--max-answer-tokens", type=int, default=data.max_answer_tokens, metavar="N")
    group.add_argument(
        "--data-batch", type=int, default=data.batch_size, metavar="N", help="requests at once"
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--feature-layers",
        type=_layers,
        metavar="A,B,C",
        help="hidden states the head reads; the default is a third, two thirds and the end",
    )
    group.add_argument(
        "--draft-vocab", type=int, default=8192, metavar="N", help="size of the draft vocabulary"
    )
    group.add_argument(
        "--init-head",
        type=Path,
        metavar="DIR",
        help="start from this head, to go on with more data; one with the target's output rows gets a new "
        "draft vocabulary; without it, from the target's own layers",
    )
    group.add_argument("--epochs", type=int, default=train.epochs)
    group.add_argument(
        "--max-minutes", type=float, default=80.0, metavar="MIN", help="time budget of training"
    )
    group.add_argument("--batch-tokens", type=int, default=train.batch_tokens, metavar="N")
    group.add_argument("--lr", type=float, default=train.lr)
    group.add_argument("--steps-unrolled", type=int, default=train.num_steps, metavar="K")
    group.add_argument(
        "--chain-share",
        type=float,
        default=train.chain_share,
        help="share of the positions that start a chain past its first step",
    )
    group.add_argument(
        "--share-lm-head",
        action="store_true",
        help="keep the target's output rows: faster, and the head's file is smaller",
    )
    group.add_argument("--eval-every", type=int, default=train.eval_every, metavar="STEPS")


def run(args: argparse.Namespace) -> int:
    """Collect, train, export. Raises ConfigError for options that do not fit together."""
    _check(args)
    device = device_name(args.device)
    checkpoint = open_checkpoint(default_model_path() if args.model is None else args.model)
    name = DEFAULT_MODEL if args.model is None else checkpoint.name
    layers = args.feature_layers or default_feature_layers(checkpoint.config.num_layers)
    if (
        any(not 0 <= layer <= checkpoint.config.num_layers for layer in layers)
        or layers[-1] != checkpoint.config.num_layers
    ):
        raise ConfigError(
            f"--feature-layers is {','.join(map(str, layers))}, expected numbers of 0 to "
            f"{checkpoint.config.num_layers}, the last one {checkpoint.config.num_layers}"
        )
    data_dirs = args.data_dir or [args.work_dir / "data"]
    if args.phase in ("all", "data"):
        _collect(args, checkpoint, name, layers, data_dirs[0], device)
    if args.phase in ("all", "train"):
        _train(args, checkpoint, name, data_dirs, device)
    return 0


# --- data ---------------------------------------------------------------------------------------------------


def recording_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    recorder: FeatureRecorder,
    layers: tuple[int, ...],
    settings: DataSettings,
    device: str,
) -> Engine:
    """The batched engine with a recorder for its draft: float32 on a CPU without bfloat16 units."""
    fast = bfloat16_is_fast(device)
    config = EngineConfig(
        dtype=torch.bfloat16 if fast else torch.float32,
        half_weights=not fast,
        device=device,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.batch_size,
        max_num_batched_tokens=1024,
        kv_cache_memory=4 << 30,
        prefix_caching=False,  # every token's features are recorded, so every token is computed
        speculation=SPECULATION_OFF,
    )
    with LoadingBar() as bar:
        return build_engine(checkpoint, tokenizer.eos_token_ids, recorder, config, bar.update, layers)


def _collect(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    name: str,
    layers: tuple[int, ...],
    data_dir: Path,
    device: str,
) -> None:
    settings = DataSettings(
        tokens=args.tokens,
        max_minutes=args.data_minutes,
        seed=args.seed,
        temperature=args.temperature,
        max_answer_tokens=args.max_answer_tokens,
        batch_size=args.data_batch,
        max_model_len=min(DataSettings().max_model_len, checkpoint.config.max_position_embeddings),
    )
    prompts = read_prompts(args.prompts) if args.prompts is not None else []
    identity = {
        "target": name,
        "feature_layers": list(layers),
        "seed": settings.seed,
        "temperature": settings.temperature,
        "question_temperature": settings.question_temperature,
        "max_answer_tokens": settings.max_answer_tokens,
        "max_model_len": settings.max_model_len,
        "given_prompts": len(prompts),
    }
    manifest = Manifest.open(data_dir, identity)
    if manifest.num_answer_tokens >= settings.tokens or manifest.seconds >= 60 * args.data_minutes:
        sys.stderr.write(f"Data: {manifest.num_answer_tokens} answer tokens are already there\n")
        return
    tokenizer = checkpoint.tokenizer()
    recorder = FeatureRecorder()
    engine = recording_engine(checkpoint, tokenizer, recorder, layers, settings, device)
    with PhaseBar("Data") as bar:

        def show(report: DataReport) -> None:
            share = max(report.answer_tokens / settings.tokens, report.seconds / (60 * args.data_minutes))
            bar.update(
                share,
                f"{report.answer_tokens} answer tokens, {report.documents} answers, "
                f"{report.rejected} of {report.questions} questions rejected",
            )

        Collector(engine, recorder, TemplateChat(tokenizer), manifest, settings, prompts, show).run()


# --- training -----------------------------------------------------------------------------------------------


def _train(
    args: argparse.Namespace, checkpoint: Checkpoint, name: str, data_dirs: list[Path], device: str
) -> None:
    """The head, from the data: trained, exported with its card, and reported on stderr. Raises ConfigError if
    the data is not of this target."""
    dataset, settings = Dataset(*data_dirs), _settings(args, device)
    _check_data(dataset, data_dirs[0], name, checkpoint.config.hidden_size, args.feature_layers)
    training, heldout = split(len(dataset), _HELDOUT_EVERY)
    with LoadingBar() as loading:
        weights = checkpoint.load(torch.float32, device, loading.update)
    eos = checkpoint.tokenizer().eos_token_ids
    head, target = prepare(
        checkpoint.config, weights, dataset, training, args.draft_vocab, eos, args.seed, args.init_head
    )
    weights.clear()
    run_dir = args.run_dir or args.work_dir / "run"
    with PhaseBar("Training") as bar:

        def show(report: Report) -> None:
            bar.update(report.share, _progress(report))

        job = Run(run_dir, settings, head.to(device), target, dataset, training, heldout, show)
        acceptance = job.train()
    counts = dataset.answer_counts(head.config.vocab_size, job.heldout)
    card = Card(
        target=name,
        command="haast train " + " ".join(_shown(args)),
        data=dataset.settings,
        settings=settings.identity(),
        documents=len(dataset),
        answer_tokens=dataset.num_answer_tokens(range(len(dataset))),
        coverage=float(counts[head.t2d.cpu()].sum() / counts.sum().clamp(min=1)),
        data_seconds=dataset.seconds,
        train_seconds=job.progress.seconds,
        device=_describe(device),
        acceptance=acceptance,
    )
    export_head(
        args.output,
        head,
        checkpoint.config.max_position_embeddings,
        card,
        run_dir / CURVE,
        args.share_lm_head,
    )
    sys.stderr.write(
        f"Head: {args.output}; acceptance by depth "
        f"{', '.join(f'{value:.3f}' for value in acceptance.by_depth)}; length "
        f"{', '.join(f'{v:.3f} (chain of {k})' for k, v in acceptance.lengths.items())}\n"
    )


def _check_data(
    dataset: Dataset, where: Path, name: str, hidden_size: int, asked_layers: tuple[int, ...] | None
) -> None:
    """ConfigError unless the data has the features of this target, of the layers asked for if any are."""
    made_for = dataset.settings.get("target")
    layers = tuple(dataset.settings.get("feature_layers", ()))
    if made_for != name or dataset.feature_size != len(layers) * hidden_size:
        raise ConfigError(
            f"{where}: holds {dataset.feature_size} features per token of {made_for}, "
            f"expected {len(layers)} x {hidden_size} of {name}"
        )
    if asked_layers is not None and asked_layers != layers:
        raise ConfigError(
            f"{where}: made with --feature-layers {','.join(map(str, layers))}, "
            f"this run has {','.join(map(str, asked_layers))}"
        )


def _settings(args: argparse.Namespace, device: str) -> TrainSettings:
    return TrainSettings(
        seed=args.seed,
        epochs=args.epochs,
        max_minutes=args.max_minutes,
        batch_tokens=args.batch_tokens,
        lr=args.lr,
        num_steps=args.steps_unrolled,
        chain_share=args.chain_share,
        share_lm_head=args.share_lm_head,
        bf16=bfloat16_is_fast(device),
        eval_every=args.eval_every,
    )


def _progress(report: Report) -> str:
    lengths = report.acceptance.lengths if report.acceptance is not None else {}
    said = "".join(f", {value:.2f} per step with chains of {chain}" for chain, value in lengths.items())
    return f"step {report.step}, loss {report.loss:.3f}, {report.tokens_per_second:.0f} tokens/s{said}"


# --- odds and ends ------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    for flag, low, high in (
        ("tokens", 1, 10**12),
        ("data_batch", 1, 4096),
        ("epochs", 1, 10**6),
        ("batch_tokens", 8, 10**7),
        ("steps_unrolled", 1, 16),
        ("draft_vocab", 2, 10**7),
        ("chain_share", 0.0, 1.0),
        ("max_answer_tokens", 1, 10**6),
        ("eval_every", 1, 10**9),
        ("temperature", 0.0, 100.0),
        ("max_minutes", 0.0, 10**6),
        ("data_minutes", 0.0, 10**6),
    ):
        found = getattr(args, flag)
        if not low <= found <= high:
            raise ConfigError(f"--{flag.replace('_', '-')} is {found}, expected {low} to {high}")
    if not args.lr > 0:
        raise ConfigError(f"--lr is {args.lr}, expected a positive number")


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = ()
    if len(layers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not three layer numbers, as 10,20,30")
    return layers


def _shown(args: argparse.Namespace) -> list[str]:
    """The options that decide the result, as flags; places are left out."""
    words = [] if args.model is None else [Path(args.model).name]
    for flag in (
        "seed",
        "tokens",
        "data_minutes",
        "epochs",
        "max_minutes",
        "batch_tokens",
        "lr",
        "steps_unrolled",
        "chain_share",
        "draft_vocab",
    ):
        words += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    if args.prompts is not None:
        words += ["--prompts", args.prompts.name]
    if args.init_head is not None:
        words += ["--init-head", args.init_head.name]
    return [*words, "--share-lm-head"] if args.share_lm_head else words


def _describe(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
