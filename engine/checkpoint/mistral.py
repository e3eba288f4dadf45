"""Mistral Small 4 and its Eagle head: what their configs say.

Mistral's own ``params.json`` and Hugging Face's ``config.json`` describe the same model in different words;
both become a ``Mistral4Config``. A key we do not know is ignored, except where it could change the positions'
meaning (YaRN), and a known key with a value that we do not implement is refused by name.

The two disputed points are decided here. ``yarn.apply_scale`` false in params.json, and equal ``mscale`` and
``mscale_all_dim`` in config.json, mean that YaRN changes no magnitudes: cosine and sine have length 1 and the
softmax scale is 1 / sqrt(head width). Anything else is refused, because engines disagree on what it means.

Which tensors follow from a config is written in ``checkpoint/mistral_tables.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine.config import Fields, Mistral4Config, YarnScaling
from engine.errors import ConfigError

_PARAMS_HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "tied_embeddings": (False,),
    "sliding_window": (),
    "causal": (True,),
    "attn_bias": (False,),
    "use_biases": (False,),
    "qk_norm": (False,),
    "rope_scaling": (),
}
_MOE_HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "first_k_dense_replace": (0,),
    "num_expert_groups": (1,),
    "num_expert_groups_per_tok": (1,),
    "route_every_n": (1,),
    "use_load_balancing_bias": (False,),
    "renorm_strategy": (),
}
_TEXT_HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "tie_word_embeddings": (False,),
    "sliding_window": (),
    "rope_interleave": (True,),
    "first_k_dense_replace": (0,),
    "n_group": (1,),
    "topk_group": (1,),
    "norm_topk_prob": (True,),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "moe_layer_freq": (1,),
}
_YARN_KEYS: Final = ("factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale")
_ROPE_KEYS: Final = (
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
    "max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
    "llama_4_scaling_beta", "partial_rotary_factor", "truncate",
)  # fmt: skip


def read_params(raw: dict[str, Any], where: str) -> Mistral4Config:
    """The target's config from a parsed params.json. where: the file. Raises ConfigError."""
    fields = Fields(raw, where)
    moe = fields.inner("moe")
    if not moe.raw:
        raise fields.error("moe", "the experts' block of a Mistral Small 4 target")
    return _read_params(fields, moe)


def read_head_params(raw: dict[str, Any], where: str) -> Mistral4Config:
    """The Eagle head's config from its params.json: dense layers, so a ``moe`` block is refused."""
    fields = Fields(raw, where)
    fields.refuse_all_but({"moe": ()})
    return _read_params(fields, None)


def _read_params(fields: Fields, moe: Fields | None) -> Mistral4Config:
    fields.refuse_all_but(_PARAMS_HARMLESS)
    heads = fields.whole("n_heads")
    if fields.whole("n_kv_heads", heads) != heads:
        raise fields.error("n_kv_heads", f"n_heads {heads}: latent attention has no groups")
    if moe is not None:
        moe.refuse_all_but(_MOE_HARMLESS)
    llama_4 = fields.inner("llama_4_scaling")
    yarn = _read_params_yarn(fields.inner("yarn"))
    config = Mistral4Config(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("dim"),
        num_layers=fields.whole("n_layers"),
        num_heads=heads,
        q_lora_rank=fields.whole("q_lora_rank"),
        kv_lora_rank=fields.whole("kv_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim"),
        qk_rope_head_dim=fields.whole("qk_rope_head_dim"),
        v_head_dim=fields.whole("v_head_dim"),
        max_position_embeddings=fields.whole("max_position_embeddings", _stretched(yarn)),
        intermediate_size=fields.whole("hidden_dim") if moe is None else fields.whole("hidden_dim", 0),
        num_experts=0 if moe is None else moe.whole("num_experts"),
        num_experts_per_tok=0 if moe is None else moe.whole("num_experts_per_tok"),
        num_shared_experts=0 if moe is None else moe.whole("num_shared_experts"),
        moe_intermediate_size=0 if moe is None else moe.whole("expert_hidden_dim"),
        routed_scaling_factor=1.0 if moe is None else moe.real("routed_scale", 1.0),
        rms_norm_eps=fields.real("norm_eps"),
        rope_theta=fields.real("rope_theta"),
        yarn=yarn,
        llama_4_beta=llama_4.real("beta") if llama_4.raw else 0.0,
        llama_4_original_positions=(
            llama_4.whole("original_max_position_embeddings") if llama_4.raw else 8192
        ),
    )
    return _check(config, fields.where)


def _read_params_yarn(yarn: Fields) -> YarnScaling | None:
    if not yarn.raw:
        return None
    _refuse_unknown(yarn, _YARN_KEYS)
    if "apply_scale" not in yarn.raw or yarn.flag("apply_scale", True):
        raise yarn.error("apply_scale", "false: engines disagree on what true scales")
    return YarnScaling(
        factor=yarn.real("factor"),
        original_max_position_embeddings=yarn.whole("original_max_position_embeddings"),
        beta_fast=yarn.real("beta"),
        beta_slow=yarn.real("alpha"),
    )


def read_hf_config(raw: dict[str, Any], where: str) -> Mistral4Config:
    """The target's config from a parsed config.json: ``mistral3`` around a ``mistral4`` text_config, or
    ``mistral4`` alone. where: the file. Raises ConfigError.
    """
    outer = Fields(raw, where)
    fields = outer.inner("text_config") if outer.text("model_type", "") == "mistral3" else outer
    if fields.text("model_type", "") != "mistral4":
        raise fields.error("model_type", "'mistral4'")
    fields.refuse_all_but(_TEXT_HARMLESS)
    heads = fields.whole("num_attention_heads")
    if fields.whole("num_key_value_heads", heads) != heads:
        raise fields.error(
            "num_key_value_heads", f"num_attention_heads {heads}: latent attention has no groups"
        )
    rope = _rope_of(fields)
    yarn = _read_hf_yarn(rope, fields)
    eos = fields.wholes("eos_token_id", "a token id or a list of them")
    config = Mistral4Config(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        q_lora_rank=fields.whole("q_lora_rank"),
        kv_lora_rank=fields.whole("kv_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim"),
        qk_rope_head_dim=fields.whole("qk_rope_head_dim"),
        v_head_dim=fields.whole("v_head_dim"),
        max_position_embeddings=fields.whole("max_position_embeddings"),
        intermediate_size=fields.whole("intermediate_size", 0),
        num_experts=fields.whole("n_routed_experts"),
        num_experts_per_tok=fields.whole("num_experts_per_tok"),
        num_shared_experts=fields.whole("n_shared_experts"),
        moe_intermediate_size=fields.whole("moe_intermediate_size"),
        routed_scaling_factor=fields.real("routed_scaling_factor", 1.0),
        rms_norm_eps=fields.real("rms_norm_eps"),
        rope_theta=(rope if fields.absent("rope_theta") else fields).real("rope_theta"),
        yarn=yarn,
        llama_4_beta=0.0 if rope.absent("llama_4_scaling_beta") else rope.real("llama_4_scaling_beta"),
        llama_4_original_positions=8192 if yarn is None else yarn.original_max_position_embeddings,
        eos_token_ids=eos or (2,),
        bos_token_id=fields.whole("bos_token_id", 1, least=0),
    )
    return _check(config, where)


def _rope_of(fields: Fields) -> Fields:
    """``rope_parameters``, or what it was called before transformers 5."""
    names = [name for name in ("rope_parameters", "rope_scaling") if not fields.absent(name)]
    if len(names) > 1:
        raise fields.error("rope_scaling", "only one of rope_parameters and rope_scaling")
    rope = fields.inner(names[0] if names else "rope_parameters")
    if rope.absent("rope_theta") or fields.absent("rope_theta"):
        return rope
    if rope.real("rope_theta") != fields.real("rope_theta"):
        raise rope.error("rope_theta", f"the outer rope_theta {fields.real('rope_theta')}")
    return rope


def _read_hf_yarn(rope: Fields, fields: Fields) -> YarnScaling | None:
    kind = rope.text("type" if rope.absent("rope_type") else "rope_type", "default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise rope.error("type" if rope.absent("rope_type") else "rope_type", "'default' or 'yarn'")
    _refuse_unknown(rope, _ROPE_KEYS)
    rope.refuse_all_but({"attention_factor": (1,), "truncate": (True,)})
    if not rope.absent("partial_rotary_factor"):
        width = fields.whole("qk_rope_head_dim") + fields.whole("qk_nope_head_dim")
        if rope.real("partial_rotary_factor") * width != fields.whole("qk_rope_head_dim"):
            raise rope.error("partial_rotary_factor", f"{fields.whole('qk_rope_head_dim')} of {width}")
    if rope.absent("attention_factor") and rope.real("mscale") != rope.real("mscale_all_dim"):
        raise rope.error("mscale_all_dim", f"mscale {rope.real('mscale')}, so that no magnitude changes")
    return YarnScaling(
        factor=rope.real("factor"),
        original_max_position_embeddings=rope.whole("original_max_position_embeddings"),
        beta_fast=rope.real("beta_fast", 32.0),
        beta_slow=rope.real("beta_slow", 1.0),
    )


def _refuse_unknown(fields: Fields, known: tuple[str, ...]) -> None:
    for key in fields.raw:
        if key not in known:
            raise fields.error(key, f"only the keys {', '.join(known)}")


def _stretched(yarn: YarnScaling | None) -> int | None:
    """Positions that YaRN reaches, for configs that do not say."""
    return None if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)


def _check(config: Mistral4Config, where: str) -> Mistral4Config:
    """Refuse numbers that do not fit together."""
    if config.qk_rope_head_dim % 2:
        raise ConfigError(
            f"{where}: qk_rope_head_dim is {config.qk_rope_head_dim}, expected an even number (rotary pairs)"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise ConfigError(
            f"{where}: {config.num_experts_per_tok} experts per token, expected at most the "
            f"{config.num_experts} there are"
        )
    return config
