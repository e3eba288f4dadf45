"""The training run: batches in a seeded order, AdamW with warm-up and cosine, checkpoints and held-out
acceptance.

The schedule follows whichever is further along, the planned number of steps or the time budget, so a run that
is slower than hoped still ends with a small learning rate. Without a time budget a run that was interrupted
and resumed ends with the same weights as one that was not: the order of batches and the chains drawn depend
on (seed, step) alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from draft.train.batches import generator_for, load_batch, plan_epoch
from draft.train.evaluate import Acceptance, measure
from draft.train.model import Eagle3Module
from draft.train.objective import Objective, TargetSide
from draft.train.shards import Dataset
from draft.train.state import Progress, load_state, save_state
from engine.errors import ConfigError

CHECKPOINT = "state.safetensors"
CURVE = "curve.jsonl"


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Options of a run. max_minutes: time budget of the whole run, None for none; shares are of the whole
    run.
    """

    seed: int = 0
    epochs: int = 6
    max_minutes: float | None = None
    batch_tokens: int = 2048
    lr: float = 1e-3
    warmup_share: float = 0.03
    final_lr_share: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    num_steps: int = 5
    decay: float = 0.8
    chain_share: float = 0.5
    share_lm_head: bool = False
    bf16: bool = False
    eval_every: int = 300
    eval_documents: int = 40
    checkpoint_minutes: float = 3.0

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued: all but the pace of reports."""
        ignored = ("max_minutes", "eval_every", "eval_documents", "checkpoint_minutes")
        return {key: value for key, value in asdict(self).items() if key not in ignored}


@dataclass(frozen=True, slots=True)
class Report:
    """What a run tells while it goes: share done (0 to 1), loss, learning rate, speed, newest acceptance."""

    share: float
    step: int
    loss: float
    lr: float
    tokens_per_second: float
    acceptance: Acceptance | None


def learning_rate(settings: TrainSettings, share: float) -> float:
    """Linear warm-up, then cosine down to ``final_lr_share``. share: 0 to 1 of the run."""
    if share < settings.warmup_share:
        return settings.lr * max(share / settings.warmup_share, 0.01)
    phase = min((share - settings.warmup_share) / (1 - settings.warmup_share), 1.0)
    low = settings.final_lr_share
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * phase)))


class Run:
    """One training run in a directory; ``train`` continues where its checkpoint ended."""

    def __init__(
        self,
        directory: Path,
        settings: TrainSettings,
        head: Eagle3Module,
        target: TargetSide,
        dataset: Dataset,
        training: list[int],
        heldout: list[int],
        report: Callable[[Report], None] | None = None,
    ) -> None:
        """training, heldout: document numbers; acceptance is measured on the greedy ones of heldout."""
        self.directory, self.settings = directory, settings
        self.head, self.target, self.dataset = head, target, dataset
        # a document needs a row that bears loss, and a row needs a feature on both sides
        self.training = [index for index in training if dataset.lengths[index] >= 4]
        self.heldout = [index for index in heldout if dataset.lengths[index] >= 4 and dataset.greedy[index]]
        if not self.training:
            raise ConfigError(
                f"the data holds {len(training)} conversations for training, none of at least 4 tokens; "
                "collect more"
            )
        self._report = report if report is not None else lambda _: None
        head.lm_head.weight.requires_grad_(not settings.share_lm_head)
        matrices = [p for p in head.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in head.parameters() if p.requires_grad and p.dim() == 1]  # norms are not decayed
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.objective = Objective(settings.num_steps, settings.decay, settings.chain_share)
        self.progress = Progress()
        self.acceptance: Acceptance | None = None
        if (directory / CHECKPOINT).exists():
            self.progress = load_state(directory / CHECKPOINT, head, self.optimizer, settings.identity())
            self._cut_curve()

    def train(self, stop_after: int | None = None) -> Acceptance:
        """Train to the end of the schedule, or for ``stop_after`` more steps; returns the held-out
        acceptance.
        """
        settings, progress = self.settings, self.progress
        stop_at = None if stop_after is None else progress.step + stop_after
        last_save = time.monotonic()
        if progress.step == 0:
            self._evaluate(0.0, float("nan"), 0.0)
        share = 1.0
        for share_of_steps, batch in self._batches():
            share = self._share(share_of_steps)
            if share >= 1 or progress.step == stop_at:
                break
            started = time.monotonic()
            lr = learning_rate(settings, share)
            loss, num_tokens = self._step(batch, lr)
            elapsed = time.monotonic() - started
            progress.step += 1
            progress.batch += 1
            progress.tokens += num_tokens
            progress.seconds += elapsed
            speed = num_tokens / max(elapsed, 1e-9)
            self._report(Report(share, progress.step, loss, lr, speed, self.acceptance))
            if progress.step % settings.eval_every == 0:
                self._evaluate(share, loss, lr)
            if time.monotonic() - last_save > 60 * settings.checkpoint_minutes:
                self._save()
                last_save = time.monotonic()
        else:
            share = 1.0
        self._save()
        return self._evaluate(share, float("nan"), 0.0)

    def _batches(self) -> Iterator[tuple[float, list[int]]]:
        """(share of the planned steps done, document numbers) from where the run stands to the last epoch's
        end.

        Whoever takes a step moves ``progress.batch`` on.
        """
        progress, settings = self.progress, self.settings
        for epoch in range(progress.epoch, settings.epochs):
            plan = plan_epoch(
                self.dataset.lengths, self.training, settings.batch_tokens, settings.seed, epoch
            )
            if epoch > progress.epoch:
                progress.epoch, progress.batch = epoch, 0
            while progress.batch < len(plan):
                yield (epoch + progress.batch / len(plan)) / settings.epochs, plan[progress.batch]

    def _share(self, share_of_steps: float) -> float:
        """How far the run is, by steps or by time, whichever is further."""
        if self.settings.max_minutes is None:
            return share_of_steps
        return max(share_of_steps, self.progress.seconds / max(60 * self.settings.max_minutes, 1e-9))

    def _step(self, documents: list[int], lr: float) -> tuple[float, int]:
        settings = self.settings
        device = str(self.head.fc.weight.device)
        batch = load_batch(self.dataset, documents, self.head.fc.weight.dtype, device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(device.split(":")[0], torch.bfloat16) if settings.bf16 else nullcontext()
        with autocast:
            loss = self.objective(
                self.head, self.target, batch, generator_for(settings.seed, self.progress.step, 2)
            )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), settings.clip)
        self.optimizer.step()
        return float(loss.detach()), sum(self.dataset.lengths[index] for index in documents)

    def _evaluate(self, share: float, loss: float, lr: float) -> Acceptance:
        """Held-out acceptance, written to the curve. It is charged to the time budget."""
        started = time.monotonic()
        documents = self.heldout if share >= 1 else self.heldout[: self.settings.eval_documents]
        self.acceptance = measure(
            self.head,
            self.target.embedding,
            self.dataset,
            documents,
            self.settings.num_steps,
            2 * self.settings.batch_tokens,
        )
        self.progress.seconds += time.monotonic() - started
        line = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 1),
            "share": round(share, 4),
            "lr": lr,
            "loss": None if math.isnan(loss) else round(loss, 4),
            "acceptance_by_depth": [round(value, 4) for value in self.acceptance.by_depth],
            "acceptance_length": {str(k): round(v, 4) for k, v in self.acceptance.lengths.items()},
            "heldout_documents": self.acceptance.num_documents,
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return self.acceptance

    def _save(self) -> None:
        save_state(
            self.directory / CHECKPOINT, self.head, self.optimizer, self.progress, self.settings.identity()
        )

    def _cut_curve(self) -> None:
        """Drop what an interrupted run wrote past its checkpoint; it is about to be trained again."""
        path = self.directory / CURVE
        if path.exists():
            lines = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if (entry := json.loads(line))["step"] <= self.progress.step and entry["share"] < 1
            ]
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
