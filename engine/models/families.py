"""The table of model families: for each ``model_type``, how to read its config and what its tensors are called.

A family the Transformer can express is one more entry: a reader of its config, and a ``Names``. Semantics and defaults of absent keys are
those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import origin
from .config import ModelConfig
from .readers import read_bool, read_dtype, read_float, read_int, read_token_id, read_token_ids, unsupported
from .rope import read_rope
from .weights import Names


@dataclass(frozen=True)
class Family:
    """One entry: ``model_type`` and class names it answers to, its config reader and its tensor names."""

    model_type: str
    classes: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    names: Names


LLAMA_NAMES = Names(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention_norm="model.layers.{i}.input_layernorm",
    qkv=("model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.k_proj", "model.layers.{i}.self_attn.v_proj"),
    out="model.layers.{i}.self_attn.o_proj",
    ffn_norm="model.layers.{i}.post_attention_layernorm",
    gate_up=("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
    down="model.layers.{i}.mlp.down_proj",
    q_norm="model.layers.{i}.self_attn.q_norm",
    k_norm="model.layers.{i}.self_attn.k_norm",
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # a table that old checkpoints carry
)


def _read_llama(raw: Mapping[str, Any]) -> ModelConfig:
    bias = read_bool(raw, "attention_bias")
    return replace(_read_common(raw, "llama"), qkv_bias=bias, out_bias=bias, mlp_bias=read_bool(raw, "mlp_bias"))


def _read_mistral(raw: Mapping[str, Any]) -> ModelConfig:
    config = _read_common(raw, "mistral", default_kv_heads=8)
    return replace(config, windows=(_window(raw),) * config.num_layers)


def _read_qwen2(raw: Mapping[str, Any]) -> ModelConfig:
    config = _read_common(raw, "qwen2", default_kv_heads=32)
    return replace(config, windows=_qwen_windows(raw, config.num_layers), qkv_bias=True)


def _read_qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    config = _read_common(raw, "qwen3", default_kv_heads=32, default_head_dim=128)
    bias = read_bool(raw, "attention_bias")
    return replace(config, windows=_qwen_windows(raw, config.num_layers), qkv_bias=bias, out_bias=bias, qk_norm=True)


def _read_common(
    raw: Mapping[str, Any], family: str, *, default_kv_heads: int | None = None, default_head_dim: int | None = None
) -> ModelConfig:
    """The keys that all families with Llama's layers share.

    Args:
        default_kv_heads: ``num_key_value_heads`` where the key is absent; None, and a null key, mean as many as there are query heads.
        default_head_dim: ``head_dim`` where absent or null; None means hidden_size / num_attention_heads.
    """
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise unsupported("hidden_act", raw["hidden_act"], "silu")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method") if isinstance(raw["quantization_config"], Mapping) else "?"
        raise unsupported("quantization_config.quant_method", method, "none: float32, bfloat16 or float16 weights")
    hidden_size, num_heads = read_int(raw, "hidden_size"), read_int(raw, "num_attention_heads")
    head_dim = read_int(raw, "head_dim", default_head_dim or hidden_size // num_heads)
    num_layers, max_position = read_int(raw, "num_hidden_layers"), read_int(raw, "max_position_embeddings")
    kv_heads = read_int(raw, "num_key_value_heads", num_heads if "num_key_value_heads" in raw else default_kv_heads or num_heads)
    return ModelConfig(
        family=family,
        vocab_size=read_int(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=read_int(raw, "intermediate_size"),
        norm_eps=read_float(raw, "rms_norm_eps", 1e-6),
        max_position=max_position,
        rope=read_rope(raw, head_dim, max_position),
        windows=(0,) * num_layers,
        tied_head=read_bool(raw, "tie_word_embeddings"),
        dtype=read_dtype(raw),
        eos_token_ids=read_token_ids(raw, "eos_token_id"),
        bos_token_id=read_token_id(raw, "bos_token_id"),
        pad_token_id=read_token_id(raw, "pad_token_id"),
    )


def _window(raw: Mapping[str, Any]) -> int:
    """``sliding_window``: 4096 where the key is absent, 0 (all keys) where it is null."""
    return 0 if raw.get("sliding_window", 4096) is None else read_int(raw, "sliding_window", 4096)


def _qwen_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """``layer_types`` where given, else the layers from ``max_window_layers`` on; nothing without ``use_sliding_window``."""
    window = _window(raw) if read_bool(raw, "use_sliding_window") else 0
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise unsupported("max_window_layers", first, "an integer; 0 for a window in every layer")
        return tuple(window if i >= first else 0 for i in range(num_layers))
    allowed = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not isinstance(types, (list, tuple)) or len(types) != num_layers or any(kind not in allowed for kind in types):
        raise unsupported("layer_types", types, f"{num_layers} entries, each {' or '.join(allowed)}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", ("LlamaForCausalLM",), _read_llama, LLAMA_NAMES),
        Family("mistral", ("MistralForCausalLM",), _read_mistral, LLAMA_NAMES),
        Family("qwen2", ("Qwen2ForCausalLM",), _read_qwen2, LLAMA_NAMES),
        Family("qwen3", ("Qwen3ForCausalLM",), _read_qwen3, LLAMA_NAMES),
        Family(origin.MODEL_TYPE, ("Transformer",), origin.read_config, origin.NAMES),
    )
}


def find_family(model_type: object, classes: tuple[str, ...] = ()) -> Family:
    """The family of a ``model_type`` whose model is of one of ``classes`` (a live model's bases, or the config's ``architectures``).

    Raises ``ValueError`` naming what was given and the known families. No ``classes`` means the config does not say.
    """
    known = ", ".join(f"{f.model_type} ({', '.join(f.classes)})" for f in FAMILIES.values())
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(f"model_type {model_type!r} is not supported; known families: {known}")
    if classes and not set(classes) & set(family.classes):
        raise ValueError(f"class {classes[0]!r} of model_type {model_type!r} is not supported; known families: {known}")
    return family
