"""A tiny target and an EAGLE-3 head on disk, for benchmarks that are run from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.checkpoint.files import write_hf, write_tokenizer
from tests.conftest import tiny_eagle3, tiny_llama


def write_pair(root: Path) -> tuple[Path, Path]:
    """(directory of the target, directory of the head)."""
    config, weights = tiny_llama(5, vocab_size=300, max_position_embeddings=2048)
    target = write_tokenizer(write_hf(root / "target", config, weights), config.vocab_size)
    raw, tensors = tiny_eagle3(config, 5, draft_vocab_size=200)
    (root / "head").mkdir()
    (root / "head" / "config.json").write_text(json.dumps(raw))
    save_file(tensors, root / "head" / "model.safetensors")
    return target, root / "head"
