"""Tiny random Mistral Small 4 pairs, engines around them, and what their pools should hold.

Weights have the scale of an effect: queries, keys and logits spread over one or two units (see
tests.conftest). ``echo_pair`` is the counterpart of ``rig.echo_model``: a head that is often right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft.head import FeatureDraft
from draft.mistral_eagle import MistralEagleModel
from draft.none import NoDraft
from engine.config import EngineConfig, Mistral4Config, YarnScaling
from engine.core import Request, SamplingParams, Speculation
from engine.core import Sequence as Seq
from engine.graphs import Graphs
from engine.models.mistral4 import Mistral4
from engine.nn.linear import Linear
from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight
from engine.pages import PagePool
from engine.roles import Draft
from engine.step import Engine
from tests.conftest import matrix, norm_weight
from tests.engine import rig
from tests.engine.rig import Recording
from tests.oracles import mistral4 as oracle

# The original context is 16 positions, so that the tests' prompts go far past it.
YARN = YarnScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.5)


@dataclass(frozen=True)
class Pair:
    """A target and its head; weights by native name."""

    config: Mistral4Config
    weights: dict[str, Tensor]
    head_config: Mistral4Config
    head: dict[str, Tensor]


def attention_weights(generator: torch.Generator, config: Mistral4Config, prefix: str) -> dict[str, Tensor]:
    """Attention and both norms of a layer."""
    hidden, heads, rank = config.hidden_size, config.num_heads, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    name = f"{prefix}.attention."
    return {
        f"{prefix}.attention_norm.weight": norm_weight(generator, hidden),
        name + "wq_a.weight": matrix(generator, config.q_lora_rank, hidden),
        name + "q_a_norm.weight": norm_weight(generator, config.q_lora_rank),
        name + "wq_b.weight": matrix(generator, queries, config.q_lora_rank, 1.5),
        name + "wkv_a_with_mqa.weight": matrix(generator, config.latent_dim, hidden, 1.5),
        name + "kv_a_norm.weight": norm_weight(generator, rank),
        name + "wkv_b.weight": matrix(
            generator, heads * (config.qk_nope_head_dim + config.v_head_dim), rank, 1.3
        ),
        name + "wo.weight": matrix(generator, hidden, heads * config.v_head_dim),
        f"{prefix}.ffn_norm.weight": norm_weight(generator, hidden),
    }


def mlp_weights(generator: torch.Generator, hidden: int, inner: int, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}.w1.weight": matrix(generator, inner, hidden, 1.5),
        f"{prefix}.w3.weight": matrix(generator, inner, hidden, 1.5),
        f"{prefix}.w2.weight": matrix(generator, hidden, inner),
    }


def expert_weights(generator: torch.Generator, config: Mistral4Config, prefix: str) -> dict[str, Tensor]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size

    def stack(rows: int, columns: int, gain: float) -> Tensor:
        return torch.stack([matrix(generator, rows, columns, gain) for _ in range(config.num_experts)])

    weights = {
        f"{prefix}.gate.weight": matrix(generator, config.num_experts, hidden, 2.0),
        f"{prefix}.experts.w1": stack(inner, hidden, 1.5),
        f"{prefix}.experts.w3": stack(inner, hidden, 1.5),
        f"{prefix}.experts.w2": stack(hidden, inner, 1.0),
    }
    if config.num_shared_experts:
        shared = inner * config.num_shared_experts
        weights |= mlp_weights(generator, hidden, shared, f"{prefix}.shared_experts")
    return weights


def tiny_mistral4(seed: int = 0, **overrides: Any) -> tuple[Mistral4Config, dict[str, Tensor]]:
    """A random target in float32; overrides replace fields of its config."""
    config = dataclasses.replace(
        Mistral4Config(
            vocab_size=97,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=6,
            qk_rope_head_dim=8,
            v_head_dim=10,
            max_position_embeddings=512,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            moe_intermediate_size=16,
            yarn=YARN,
            llama_4_beta=0.1,
            llama_4_original_positions=16,
            eos_token_ids=(),
        ),
        **overrides,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "tok_embeddings.weight": torch.randn(config.vocab_size, config.hidden_size, generator=generator),
        "norm.weight": norm_weight(generator, config.hidden_size),
        "output.weight": matrix(generator, config.vocab_size, config.hidden_size, 2.0),
    }
    for layer in range(config.num_layers):
        weights |= attention_weights(generator, config, f"layers.{layer}")
        weights |= expert_weights(generator, config, f"layers.{layer}")
    return config, weights


def tiny_head(
    config: Mistral4Config, seed: int = 0, *, num_layers: int = 2, norm: bool = True
) -> tuple[Mistral4Config, dict[str, Tensor]]:
    """A random head for a target: as wide, with a dense MLP."""
    head = dataclasses.replace(
        config, num_layers=num_layers, num_experts=0, num_shared_experts=0, intermediate_size=48
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    hidden = config.hidden_size
    weights = {"eagle_linear.weight": matrix(generator, hidden, 2 * hidden)}
    if norm:
        weights["norm.weight"] = norm_weight(generator, hidden)
    for layer in range(num_layers):
        weights |= attention_weights(generator, head, f"layers.{layer}")
        weights |= mlp_weights(generator, hidden, head.intermediate_size, f"layers.{layer}.feed_forward")
    return head, weights


def random_pair(seed: int = 0, **overrides: Any) -> Pair:
    config, weights = tiny_mistral4(seed, **overrides)
    return Pair(config, weights, *tiny_head(config, seed))


def echo_pair(seed: int = 0, gain: float = 0.3) -> Pair:
    """A target whose layers add little to the embedding, and a head that computes it nearly without them.

    The head reads its feature a little, or the state oracle would not see a wrong one.
    """
    pair = random_pair(seed)
    hidden = pair.config.hidden_size

    def damped(weights: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
        return {n: t * (by if ".wo." in n or ".w2" in n else 1.0) for n, t in weights.items()}

    weights, head = damped(pair.weights, gain), damped(pair.head, 0.1)
    feature_part = 0.2 * head["eagle_linear.weight"][:, hidden:]
    head |= {
        "eagle_linear.weight": torch.cat((torch.eye(hidden), feature_part), 1),
        "norm.weight": weights["norm.weight"],
    }
    return dataclasses.replace(pair, weights=weights, head=head)


def owned(weights: Mapping[str, Weight], device: str = "cpu") -> dict[str, Weight]:
    """A dict of its own for an engine to consume; on a CPU tensors are shared."""
    return {name: of.to(device) if isinstance(of, Tensor) else of for name, of in weights.items()}


def is_matrix(name: str) -> bool:
    """Whether the published FP8 files quantise a weight."""
    return not any(part in name for part in ("norm", "gate.weight", "tok_embeddings", "output"))


def to_fp8(weight: Tensor) -> Fp8Weight:
    """One scale per matrix: a quarter of the codes' range is left unused, as static scales do."""
    scale = weight.abs().amax(dim=(-2, -1)) / 336
    return Fp8Weight((weight / scale[..., None, None]).to(torch.float8_e4m3fn), scale, scale)


def to_nvfp4(weight: Tensor, generator: torch.Generator) -> Nvfp4Weight:
    """Random codes and block scales of a weight's shape and size: any bytes are a valid matrix."""
    *stack, rows, columns = weight.shape
    codes = torch.randint(0, 256, (*stack, rows, columns // 2), generator=generator, dtype=torch.uint8)
    blocks = 1.0 + torch.rand(*stack, rows, columns // 16, generator=generator)
    # codes have a root mean square of about 2.9, block scales of about 1.5
    divisor = 4.4 / weight.square().mean(dim=(-2, -1)).sqrt()
    return Nvfp4Weight(codes, blocks.to(torch.float8_e4m3fn), divisor)


# --- engines


def make_engine(
    pair: Pair,
    draft: str = "none",
    *,
    speculation: Speculation = rig.TREE,
    page_size: int = 4,
    num_pages: int = 120,
    weights: Mapping[str, Weight] | None = None,
    head: Mapping[str, Weight] | None = None,
    token_ids: Tensor | None = None,
    eos: tuple[int, ...] = (),
    max_num_batched_tokens: int = 48,
    max_num_seqs: int = 8,
    device: str = "cpu",
    graphs: Graphs | None = None,
) -> Engine:
    """draft: "none" or "eagle"; weights and head: instead of the pair's own; token_ids: the only tokens that
    the head may name; device: for plain weights alone."""
    config = EngineConfig(
        device=device,
        max_model_len=200,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        speculation=speculation,
    )
    num_slots = num_pages * page_size
    layers = MistralEagleModel.feature_layers if draft == "eagle" else ()
    target = Mistral4(pair.config, owned(weights or pair.weights, device), num_slots, layers)
    proposer: Draft = NoDraft()
    if draft == "eagle":
        output = target.logits if token_ids is None else Linear(target.output_rows(token_ids))
        network = MistralEagleModel(
            pair.head_config, owned(head or pair.head, device), target.embedding, output, num_slots, token_ids
        )
        proposer = FeatureDraft(network, "eagle", graphs=graphs)
    return Engine(config, target, proposer, PagePool(num_pages, page_size), eos, graphs=graphs)


def plain_tokens(
    pair: Pair, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **kwargs: Any
) -> list[tuple[int, ...]]:
    """Each prompt alone, without speculation."""
    return [
        make_engine(pair, **kwargs).generate([prompt], param)[0].token_ids
        for prompt, param in zip(prompts, params, strict=True)
    ]


def pool_layout(latents: Sequence[Tensor]) -> Tensor:
    """Per layer [T, D] -> [layers, 1, 1, T, D]."""
    return torch.stack(list(latents))[:, None, None]


def state_error(pair: Pair, recording: Recording) -> float:
    """The largest difference between a pool's rows and the rows computed from the committed tokens."""
    worst = 0.0
    for request in {snapshot.request_id for snapshot in recording.snapshots}:
        mine = [snapshot for snapshot in recording.snapshots if snapshot.request_id == request]
        tokens = max((snapshot.tokens for snapshot in mine), key=len)
        seen = oracle.forward(pair.config, pair.weights, tokens)
        target = pool_layout(seen.latents)
        head = target
        if len(tokens) > 1:
            rows = oracle.head_forward(
                pair.head_config, pair.head, pair.weights, tokens[1:], seen.post_norm[:-1]
            )
            head = pool_layout(rows.latents)
        for snapshot in mine:
            assert tokens[: len(snapshot.tokens)] == snapshot.tokens, "a committed token changed"
            for held, truth in ((snapshot.target_rows, target), (snapshot.head_rows, head)):
                if held is not None and held.shape[3]:
                    worst = max(worst, float((held - truth[:, :, :, : held.shape[3]]).abs().max()))
    return worst


def sequence(number: int, num_rows: int, pages: list[int]) -> Seq:
    """A sequence that has ``num_rows`` rows in its pool."""
    return Seq(Request(number, (0,), SamplingParams()), [0] * (num_rows + 1), [], pages)
