"""A stand-in for Mistral Small 4's tekken.json, which cannot be shipped: same vocabulary and control tokens.

mistral-common brings a tekken file of version 3 with the same BPE vocabulary. Its version, control tokens,
image block and model settings are replaced by those of the real file, as far as they are known: control
tokens at unknown ids are fillers.
"""

from __future__ import annotations

import atexit
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.text.mistral import MistralTokenizer

CONTROL = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
    36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}
CONTROL_IDS = {text: index for index, text in CONTROL.items()}
NUM_CONTROL = 1000


def tekken_data(num_vocab: int | None = None) -> dict[str, Any]:
    """The content of the file. num_vocab: keep only that many BPE tokens, for files that open at once."""
    import mistral_common

    package = Path(mistral_common.__file__).parent
    data: dict[str, Any] = json.loads((package / "data" / "tekken_240911.json").read_text(encoding="utf-8"))
    if num_vocab is not None:
        data["vocab"] = data["vocab"][:num_vocab]
        data["config"] |= {"num_vocab_tokens": num_vocab, "default_vocab_size": num_vocab + NUM_CONTROL}
    data["config"]["version"] = "v15"
    data["special_tokens"] = [
        {"rank": index, "token_str": CONTROL.get(index, f"<SPECIAL_{index}>"), "is_control": True}
        for index in range(NUM_CONTROL)
    ]
    data["image"] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    data["model_settings_builder"] = {
        "reasoning_effort": {
            "type": "enum",
            "accepts_none": True,
            "default": "none",
            "values": ["none", "high"],
        }
    }
    return data


@lru_cache(maxsize=1)
def tekken_file() -> Path:
    """The file, written once per session and removed at its end."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    path = Path(directory.name) / "tekken.json"
    path.write_text(json.dumps(tekken_data()), encoding="utf-8")
    return path


@lru_cache(maxsize=1)
def tekken_tokenizer() -> MistralTokenizer:
    """Our reading of the file; two seconds, once per session."""
    return MistralTokenizer.from_file(tekken_file())


def spell(*pieces: str) -> list[int]:
    """Token ids: a piece that is a control token's name is that token, any other is text."""
    ids: list[int] = []
    for piece in pieces:
        ids += [CONTROL_IDS[piece]] if piece in CONTROL_IDS else tekken_tokenizer().encode(piece)
    return ids
