"""The data on disk: safetensors shards of finished documents, and a manifest that says how they were made.

    data-dir/manifest.json            settings of the run, and the finished shards with their counts
    data-dir/shard-00000.safetensors  tokens, features, offsets, answer, greedy
    data-dir/prompts.jsonl            one line per document: the user's text

A document of n tokens has n - 1 feature rows (the last token was never run), so document d of a shard with
token offsets o has tokens o[d] .. o[d + 1] and feature rows o[d] - d .. o[d + 1] - d - 1. Example: documents
of 4 and 3 tokens give offsets [0, 4, 7], tokens 0-3 and 4-6, feature rows 0-2 and 3-4.

A shard counts once the manifest names it; the manifest is replaced in one move, so a run that was killed
loses at most the shard it was filling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
PROMPTS = "prompts.jsonl"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt and its answer, as the target saw and wrote them."""

    tokens: Tensor  # [n] int32
    features: Tensor  # [n - 1, F] bfloat16
    answer: Tensor  # [n] bool: tokens the target wrote as its answer
    greedy: bool
    prompt_text: str = ""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A finished shard as the manifest names it. ``next_id``: the first request id that it has not used."""

    file: str
    num_documents: int
    num_tokens: int
    num_answer_tokens: int
    next_id: int
    seconds: float


class Manifest:
    """Settings and finished shards of a data directory."""

    def __init__(self, directory: Path, settings: dict[str, Any], shards: list[ShardEntry]) -> None:
        self.directory, self.settings, self.shards = directory, settings, shards

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any]) -> Manifest:
        """Create the directory, or continue one. Raises ConfigError where the settings differ."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / MANIFEST
        if not path.exists():
            manifest = cls(directory, settings, [])
            manifest.save()
            return manifest
        manifest = cls.read(directory)
        for key in sorted(settings.keys() | manifest.settings.keys()):
            found, expected = manifest.settings.get(key), settings.get(key)
            if json.loads(json.dumps(expected)) != found:
                raise ConfigError(
                    f"{path}: made with {key} = {found!r}, this run has {expected!r}; "
                    "give another --data-dir, or the same options"
                )
        return manifest

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read an existing manifest. Raises ConfigError for a missing or foreign one."""
        path = directory / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version, settings = raw["version"], raw["settings"]
            shards = [ShardEntry(**entry) for entry in raw["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a training data manifest: {error!r}") from error
        if version != _VERSION:
            raise ConfigError(f"{path}: manifest version {version}, expected {_VERSION}")
        return cls(directory, settings, shards)

    def save(self) -> None:
        raw = {
            "version": _VERSION,
            "settings": self.settings,
            "shards": [asdict(entry) for entry in self.shards],
        }
        write_atomically(self.directory / MANIFEST, json.dumps(raw, indent=1) + "\n")

    @property
    def num_answer_tokens(self) -> int:
        return sum(entry.num_answer_tokens for entry in self.shards)

    @property
    def next_id(self) -> int:
        return max((entry.next_id for entry in self.shards), default=0)

    @property
    def seconds(self) -> float:
        """Wall time the finished shards took."""
        return sum(entry.seconds for entry in self.shards)

    def prompt_texts(self) -> list[str]:
        """The user's text of every document in a finished shard, in order."""
        path = self.directory / PROMPTS
        count = sum(entry.num_documents for entry in self.shards)
        if not count:
            return []
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:count]
            return [str(json.loads(line)["prompt"]) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected {count} lines with a prompt each: {error!r}") from error


class ShardWriter:
    """Collects documents and writes a shard whenever ``shard_tokens`` are reached."""

    def __init__(self, manifest: Manifest, shard_tokens: int = 100_000) -> None:
        self._manifest, self._shard_tokens = manifest, shard_tokens
        self._pending: list[Document] = []
        self._count = self._answer_count = 0
        # Lines of a shard that was never finished are cut off, so that line d stays document d.
        _write_lines(manifest.directory / PROMPTS, manifest.prompt_texts())

    @property
    def num_answer_tokens(self) -> int:
        """Answer tokens written and pending."""
        return self._manifest.num_answer_tokens + self._answer_count

    def add(self, document: Document) -> bool:
        """Keep a document; True when a shard is full and should be flushed."""
        self._pending.append(document)
        self._count += document.tokens.shape[0]
        self._answer_count += int(document.answer.sum())
        return self._count >= self._shard_tokens

    def flush(self, next_id: int, seconds: float) -> None:
        """Write the pending documents as one shard and name it in the manifest."""
        docs, self._pending = self._pending, []
        self._count = self._answer_count = 0
        if not docs:
            return
        lengths = torch.tensor([0] + [doc.tokens.shape[0] for doc in docs])
        tensors = {
            "tokens": torch.cat([doc.tokens for doc in docs]).to(torch.int32),
            "features": torch.cat([doc.features for doc in docs]).to(torch.bfloat16),
            "answer": torch.cat([doc.answer for doc in docs]).to(torch.uint8),
            "offsets": lengths.cumsum(0),
            "greedy": torch.tensor([doc.greedy for doc in docs], dtype=torch.uint8),
        }
        directory = self._manifest.directory
        name = f"shard-{len(self._manifest.shards):05d}.safetensors"
        save_file(tensors, str(directory / f"{name}.part"))
        os.replace(directory / f"{name}.part", directory / name)
        with (directory / PROMPTS).open("a", encoding="utf-8") as lines:
            lines.writelines(
                json.dumps({"prompt": doc.prompt_text}, ensure_ascii=False) + "\n" for doc in docs
            )
        self._manifest.shards.append(
            ShardEntry(
                name, len(docs), int(lengths.sum()), int(tensors["answer"].sum()), next_id, round(seconds, 3)
            )
        )
        self._manifest.save()


class Dataset:
    """All documents of one or more data directories; features stay on disk until ``load``."""

    def __init__(self, *directories: Path) -> None:
        """Raises ConfigError for directories without a finished shard, or made for different heads."""
        self.manifests = [Manifest.read(directory) for directory in directories]
        for manifest in self.manifests:
            if not manifest.shards:
                raise ConfigError(f"{manifest.directory}: no finished shard; run the data phase first")
            for key in ("target", "feature_layers"):
                found, expected = manifest.settings.get(key), self.manifests[0].settings.get(key)
                if found != expected:
                    raise ConfigError(
                        f"{manifest.directory}: made with {key} = {found!r}, expected {expected!r} as in "
                        f"{directories[0]}"
                    )
        self._files: list[Any] = []
        self._places: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        self.greedy: list[bool] = []
        self._tokens: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._offsets: list[list[int]] = []
        files = [manifest.directory / entry.file for manifest in self.manifests for entry in manifest.shards]
        for index, file in enumerate(files):
            self._open(file, index)

    def _open(self, path: Path, index: int) -> None:
        try:
            file: Any = safe_open(str(path), framework="pt")
            tokens, answer = file.get_tensor("tokens"), file.get_tensor("answer").bool()
            offsets, greedy = file.get_tensor("offsets").tolist(), file.get_tensor("greedy").tolist()
            rows = file.get_slice("features").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a training shard: {error}") from error
        if offsets[-1] != tokens.shape[0] or rows != tokens.shape[0] - len(greedy):
            raise CheckpointError(
                f"{path}: {tokens.shape[0]} tokens and {rows} feature rows, but {len(greedy)} "
                f"documents end at token {offsets[-1]}"
            )
        self._files.append(file)
        self._tokens.append(tokens)
        self._answers.append(answer)
        self._offsets.append(offsets)
        self._places += [(index, doc) for doc in range(len(greedy))]
        self.lengths += [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
        self.greedy += [bool(flag) for flag in greedy]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def settings(self) -> dict[str, Any]:
        """How the (first) directory was made."""
        return self.manifests[0].settings

    @property
    def seconds(self) -> float:
        """Wall time of all directories together, as if made one after the other."""
        return sum(manifest.seconds for manifest in self.manifests)

    @property
    def feature_size(self) -> int:
        return int(self._files[0].get_slice("features").get_shape()[1])

    def load(self, index: int) -> Document:
        """Read one document."""
        shard, doc = self._places[index]
        start, end = self._offsets[shard][doc], self._offsets[shard][doc + 1]
        features = self._files[shard].get_slice("features")[start - doc : end - doc - 1]
        return Document(
            self._tokens[shard][start:end], features, self._answers[shard][start:end], self.greedy[index]
        )

    def answer_counts(self, vocab_size: int, documents: Sequence[int]) -> Tensor:
        """[V] int64: how often each token occurs in the answers of some documents."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for shard, doc in (self._places[index] for index in documents):
            span = slice(self._offsets[shard][doc], self._offsets[shard][doc + 1])
            counts += torch.bincount(
                self._tokens[shard][span][self._answers[shard][span]].long(), minlength=vocab_size
            )
        return counts

    def num_answer_tokens(self, documents: Sequence[int]) -> int:
        return sum(
            int(self._answers[shard][self._offsets[shard][doc] : self._offsets[shard][doc + 1]].sum())
            for shard, doc in (self._places[index] for index in documents)
        )


def split(num_documents: int, every: int) -> tuple[list[int], list[int]]:
    """(training, held-out) document numbers: every ``every``-th document is held out."""
    heldout = list(range(0, num_documents, every))
    return [index for index in range(num_documents) if index % every], heldout


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _write_lines(path: Path, prompts: Sequence[str]) -> None:
    def lines() -> Iterator[str]:
        return (json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts)

    write_atomically(path, "".join(lines()))
