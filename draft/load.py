"""Read head checkpoints: a directory with config.json and safetensors.

Layouts: SafeAILab's EAGLE-3 (``fc``, ``midlayer.*``, ``norm``, ``lm_head``, ``d2t``, ``t2d``), the same with
the layer called ``layers.0`` (as speculators and vLLM export it), and EAGLE-1/2 (``fc``, ``layers.N.*``,
optional ``norm``). A bare ``pytorch_model.bin`` is refused: unpickling runs code.

Before the target is built only the config is needed, for it says which features the head reads
(``read_head``); the weights follow when the target's embedding exists (``HeadCheckpoint.build``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from draft.eagle import EagleModel
from draft.eagle3 import Eagle3Model
from draft.head import FeatureDraft
from draft.planner import Planner
from engine.checkpoint.dummy import HEAD_SEED, fill_plain
from engine.config import POST_NORM, Fields, LlamaConfig
from engine.errors import CheckpointError
from engine.graphs import Graphs
from engine.roles import Target

_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_THREE_LAYERS = "three layer numbers"


@dataclass(frozen=True, slots=True)
class HeadCheckpoint:
    """A head on disk, its config read and its weights not yet."""

    path: Path
    kind: str  # "eagle3" or "eagle"
    config: LlamaConfig
    feature_layers: tuple[int, ...]
    draft_vocab_size: int

    def build(
        self,
        target: Target,
        num_slots: int,
        *,
        shared_noise: bool = True,
        half: bool = True,
        planner: Planner | None = None,
        graphs: Graphs | None = None,
    ) -> FeatureDraft:
        """Load the weights and attach the head to its target. Raises CheckpointError naming file and tensor.

        half: round the head's matrices to float16 where that is faster (on a CPU in float32); planner:
        decides how much to draft; graphs: capture proposals.
        """
        weights = self.read(target.embedding.dtype, str(target.embedding.device))
        # Published heads often say 2048, whatever their target takes.
        positions = max(self.config.max_position_embeddings, target.max_positions)
        shape = dataclasses.replace(self.config, max_position_embeddings=positions)
        if self.config.hidden_size != target.hidden_size:
            raise CheckpointError(
                f"{self.path / 'config.json'}: the head's hidden_size is {self.config.hidden_size}, "
                f"the target's {target.hidden_size}"
            )
        embedding = weights.pop("embed_tokens.weight", target.embedding)
        _check(self.path, "embed_tokens.weight", embedding, (target.vocab_size, target.hidden_size))
        if self.kind == "eagle3":
            self._prepare_eagle3(weights, target)
            config = dataclasses.replace(shape, vocab_size=self.draft_vocab_size)
            check_shapes(self.path, weights, eagle3_shapes(config, self.draft_vocab_size))
            head: Eagle3Model | EagleModel = Eagle3Model(
                config, weights, embedding, self.feature_layers, num_slots, half=half
            )
        else:
            weights.pop("lm_head.weight", None)  # some exports repeat the target's
            check_shapes(self.path, weights, eagle_shapes(self.config, weights))
            head = EagleModel(shape, weights, embedding, target.logits, num_slots)
        name = f"{self.kind} ({self.path.name})"
        return FeatureDraft(head, name, shared_noise=shared_noise, planner=planner, graphs=graphs)

    def read(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Every tensor of the directory; see ``read_weights``."""
        return read_weights(self.path, dtype, device)

    def _prepare_eagle3(self, weights: dict[str, Tensor], target: Target) -> None:
        """Normalise names and fill in what a checkpoint may leave out."""
        for name in [name for name in weights if name.startswith("layers.0.")]:
            weights["midlayer." + name.removeprefix("layers.0.")] = weights.pop(name)
        if self.draft_vocab_size == target.vocab_size and "d2t" not in weights:
            weights["d2t"] = torch.zeros(
                self.draft_vocab_size, dtype=torch.int64, device=target.embedding.device
            )
        if "d2t" not in weights:
            raise CheckpointError(
                f"{self.path}: tensor 'd2t' is missing, though draft_vocab_size is "
                f"{self.draft_vocab_size} of {target.vocab_size}"
            )
        _check(self.path, "d2t", weights["d2t"], (self.draft_vocab_size,))
        token_ids = torch.arange(self.draft_vocab_size, device=weights["d2t"].device) + weights["d2t"]
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= target.vocab_size:
            raise CheckpointError(
                f"{self.path}: d2t points to tokens {int(token_ids.min())}..{int(token_ids.max())}, "
                f"the target has 0..{target.vocab_size - 1}"
            )
        if len(set(token_ids.tolist())) != len(token_ids):
            raise CheckpointError(f"{self.path}: d2t maps two draft tokens to the same target token")
        t2d = weights.pop("t2d", None)
        if t2d is not None:
            _check(self.path, "t2d", t2d, (target.vocab_size,))
            if int(t2d.sum()) != self.draft_vocab_size or not bool(t2d[token_ids].all()):
                raise CheckpointError(f"{self.path}: t2d and d2t do not name the same draft vocabulary")
        if "lm_head.weight" not in weights:
            weights["lm_head.weight"] = target.output_rows(token_ids)


def read_head(path: str | Path) -> HeadCheckpoint:
    """Read and check a head's config.json. Raises CheckpointError for files, ConfigError for values."""
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        found = "no such directory" if not path.is_dir() else "the directory has no config.json"
        raise CheckpointError(
            f"head {path}: {found}; expected a directory with config.json and model.safetensors"
        )
    try:
        raw: dict[str, Any] = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{file}: not a JSON object ({error})") from error
    fields = Fields(raw, str(file))
    architectures = [] if fields.absent("architectures") else raw["architectures"]
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise fields.error("architectures", "a list of names")
    eagle3 = "draft_vocab_size" in raw or "eagle3" in "".join(architectures[:1]).lower()
    raw.setdefault("num_hidden_layers", 1)
    raw.setdefault("max_position_embeddings", 2048)
    config = LlamaConfig.from_hf(raw, str(file))
    if not eagle3:
        return HeadCheckpoint(path, "eagle", config, (POST_NORM,), config.vocab_size)
    if config.num_layers != 1:
        raise CheckpointError(f"{file}: num_hidden_layers is {config.num_layers}, EAGLE-3 heads have 1")
    extra = fields.inner("eagle_config")
    source = fields if extra.absent(_LAYER_IDS) else extra
    layers = source.wholes(_LAYER_IDS, _THREE_LAYERS, least=POST_NORM)
    if len(layers) != 3 and not source.absent(_LAYER_IDS):
        raise source.error(_LAYER_IDS, _THREE_LAYERS)
    draft_vocab_size = fields.whole("draft_vocab_size", config.vocab_size, most=config.vocab_size)
    return HeadCheckpoint(path, "eagle3", config, layers, draft_vocab_size)


@dataclass(frozen=True, slots=True)
class DummyHeadCheckpoint(HeadCheckpoint):
    """A head of which only the config is read; it drafts among the first tokens of the vocabulary."""

    def read(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Random numbers in every shape that the config asks for (engine.checkpoint.dummy)."""
        if self.kind == "eagle":
            return fill_plain(eagle_shapes(self.config, {}), dtype, device, HEAD_SEED)
        shapes = eagle3_shapes(self.config, self.draft_vocab_size)
        del shapes["d2t"]
        weights = fill_plain(shapes, dtype, device, HEAD_SEED)
        weights["d2t"] = torch.zeros(self.draft_vocab_size, dtype=torch.int64, device=device)
        return weights


def read_dummy_head(path: str | Path) -> DummyHeadCheckpoint:
    """``read_head``, for a head whose weights are not there or not wanted."""
    head = read_head(path)
    return DummyHeadCheckpoint(head.path, head.kind, head.config, head.feature_layers, head.draft_vocab_size)


def published_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """What published EAGLE-3 heads read when their config does not say: inputs of layers 2, n // 2, n - 3."""
    return (2, num_layers // 2, num_layers - 3)


def eagle3_shapes(config: LlamaConfig, draft_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an EAGLE-3 checkpoint (without the optional ones)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (q_size, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_size, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_size, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, q_size),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab_size, hidden),
        "d2t": (draft_vocab_size,),
    }


def eagle_shapes(config: LlamaConfig, weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an EAGLE-1/2 checkpoint; norms and bias only where the checkpoint has them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden)}
    optional: dict[str, tuple[int, ...]] = {"fc.bias": (hidden,), "norm.weight": (hidden,)}
    for i in range(config.num_layers):
        prefix = f"layers.{i}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q_size),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
        optional[f"{prefix}.input_layernorm.weight"] = (hidden,)
    return shapes | {name: shape for name, shape in optional.items() if name in weights}


def read_weights(path: Path, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Every tensor of a head's directory, numbers in ``dtype``.

    Raises CheckpointError naming file and tensor.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.glob("*.bin"))
        hint = (
            f"; {pickled[0].name} is a pickle, which we do not load: convert it to safetensors"
            if pickled
            else ""
        )
        raise CheckpointError(f"head {path}: no *.safetensors file{hint}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - not a dict
                    tensor = reader.get_tensor(name)
                    if tensor.is_floating_point():
                        if not bool(torch.isfinite(tensor).all()):
                            raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinite values")
                        tensor = tensor.to(dtype)
                    weights[name.removeprefix("model.")] = tensor.to(device)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    return weights


def _check(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"head {path}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}"
        )


def check_shapes(path: Path, weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """CheckpointError unless exactly these tensors are there, in these shapes."""
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unexpected:
        raise CheckpointError(f"head {path}: missing tensors {missing}, unexpected tensors {unexpected}")
    for name, shape in shapes.items():
        _check(path, name, weights[name], shape)
