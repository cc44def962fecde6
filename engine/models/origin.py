"""The origin model ("Tiny-K" of Happy-LLM): its config, its tensor names, and a live object recognised by its parts.

Llama-2 blocks with interleaved RoPE of base 10000 and a head tied to the embedding. Weights are read; the model's ``forward`` is never
called and none of its code is needed, so exported folders load without remote code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .config import ModelConfig
from .readers import read_dtype, read_float, read_int, read_token_id, read_token_ids
from .rope import RopeConfig, rope_tables
from .weights import Names

MODEL_TYPE = "Tiny-K"
ROPE_THETA = 10000.0
# The fields of the origin's config that matter to decoding, with its defaults.
DEFAULTS: dict[str, Any] = {
    "dim": 768,
    "n_layers": 12,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 6144,
    "hidden_dim": None,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "max_seq_len": 512,
}
# What a bare state dict cannot tell; the rest is read off the shapes.
NOT_IN_SHAPES = ("n_heads", "norm_eps", "max_seq_len", "eos_token_id", "bos_token_id", "pad_token_id")

NAMES = Names(
    embedding="tok_embeddings",
    final_norm="norm",
    head="output",
    attention_norm="layers.{i}.attention_norm",
    qkv=("layers.{i}.attention.wq", "layers.{i}.attention.wk", "layers.{i}.attention.wv"),
    out="layers.{i}.attention.wo",
    ffn_norm="layers.{i}.ffn_norm",
    gate_up=("layers.{i}.feed_forward.w1", "layers.{i}.feed_forward.w3"),
    down="layers.{i}.feed_forward.w2",
    ignored=r"layers\.\d+\.attention\.mask|freqs_(cos|sin)",
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The config of an exported folder or a live model's ``args``; absent fields have the origin's defaults."""
    values = {**DEFAULTS, **raw}
    dim, n_heads, n_layers = read_int(values, "dim"), read_int(values, "n_heads"), read_int(values, "n_layers")
    if dim % n_heads:
        raise ValueError(f"config: n_heads = {n_heads} does not divide dim = {dim}")
    multiple = read_int(values, "multiple_of")
    head_dim = dim // n_heads
    return ModelConfig(
        family=MODEL_TYPE,
        vocab_size=read_int(values, "vocab_size"),
        hidden_size=dim,
        num_layers=n_layers,
        num_heads=n_heads,
        num_kv_heads=read_int(values, "n_kv_heads", n_heads),
        head_dim=head_dim,
        # two thirds of four times the width, as in Llama, rounded up
        ffn_size=read_int(values, "hidden_dim", multiple * math.ceil(8 * dim // 3 / multiple)),
        norm_eps=read_float(values, "norm_eps", 1e-5),
        max_position=read_int(values, "max_seq_len"),
        rope=RopeConfig(ROPE_THETA, head_dim, interleaved=True),
        windows=(0,) * n_layers,
        tied_head=True,
        dtype=read_dtype(values),
        eos_token_ids=read_token_ids(values, "eos_token_id"),
        bos_token_id=read_token_id(values, "bos_token_id"),
        pad_token_id=read_token_id(values, "pad_token_id"),
    )


def config_from_tensors(tensors: Mapping[str, Tensor], overrides: Any = None) -> ModelConfig:
    """The config of a bare state dict: sizes from the shapes, ``NOT_IN_SHAPES`` from ``overrides`` or the origin's defaults.

    Args:
        overrides: a mapping, or the origin's own config object. Sizes it gives must agree with the shapes, which loading checks.
    """
    given = _overrides(overrides)
    vocab_size, dim = _matrix(tensors, "tok_embeddings.weight")
    n_heads = read_int(given, "n_heads", DEFAULTS["n_heads"])
    hint = (
        ""
        if "n_heads" in given
        else f"; n_heads {n_heads} was assumed, a state dict does not hold it: pass origin_config={{'n_heads': ...}}"
    )
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    kv_rows = _matrix(tensors, "layers.0.attention.wk.weight")[0]
    if dim % n_heads or kv_rows % (dim // n_heads):
        raise ValueError(f"n_heads {n_heads} does not fit dim {dim} with {kv_rows} rows of layers.0.attention.wk.weight{hint}")
    shapes = {
        "dim": dim,
        "vocab_size": vocab_size,
        "n_layers": max(layers) + 1,
        "n_kv_heads": kv_rows // (dim // n_heads),
        "hidden_dim": _matrix(tensors, "layers.0.feed_forward.w1.weight")[0],
    }
    try:
        return read_config({**shapes, **given})
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None


def _overrides(overrides: Any) -> dict[str, Any]:
    """The fields of ``origin_config=`` that are set; an unknown key of a mapping is an error."""
    fields = (*DEFAULTS, *NOT_IN_SHAPES)
    if overrides is None:
        return {}
    if isinstance(overrides, Mapping):
        unknown = [key for key in overrides if key not in fields]
        if unknown:
            raise ValueError(f"origin_config: unknown {', '.join(map(repr, unknown))}; known are {', '.join(dict.fromkeys(fields))}")
        return {key: value for key, value in overrides.items() if value is not None}
    return {key: value for key in fields if (value := getattr(overrides, key, None)) is not None}


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors or tensors[name].dim() != 2:
        found = list(tensors[name].shape) if name in tensors else "nothing"
        raise ValueError(f"not a state dict of the origin model: {name} should be a matrix, found {found}")
    rows, columns = tensors[name].shape
    return rows, columns


def is_origin_state(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of the origin's state dict."""
    return "tok_embeddings.weight" in tensors and "layers.0.attention.wq.weight" in tensors


def is_origin_model(model: Any) -> bool:
    """Whether a live module has the origin's parts, whichever of its versions and wherever its class was defined."""
    parts = ("tok_embeddings", "layers", "norm", "output", "args")
    if not all(hasattr(model, part) for part in parts) or not len(model.layers):
        return False
    layer = model.layers[0]
    attention, feed_forward = getattr(layer, "attention", None), getattr(layer, "feed_forward", None)
    return (
        all(hasattr(attention, part) for part in ("wq", "wk", "wv", "wo"))
        and all(hasattr(feed_forward, part) for part in ("w1", "w2", "w3"))
        and hasattr(layer, "attention_norm")
        and hasattr(layer, "ffn_norm")
    )


def config_from_model(model: Any) -> ModelConfig:
    """The config of a live origin model, from its ``args``; ``ValueError`` if its own RoPE tables are not those of its config."""
    args = model.args
    fields = (*DEFAULTS, *NOT_IN_SHAPES)
    given = {key: getattr(args, key) for key in fields if hasattr(args, key)}
    # Exact where the config leaves it to a rule that a fork may have changed.
    given["hidden_dim"] = model.layers[0].feed_forward.w1.weight.shape[0]
    config = read_config(given)
    table = getattr(model, "freqs_cos", None)
    if isinstance(table, Tensor):
        expected = rope_tables(config.rope, config.max_position)[0]
        # A module cast to bfloat16 has rounded tables: within 2^-8.
        if table.shape != expected.shape or (table.cpu().float() - expected).abs().max() > 0.01:
            raise ValueError("the model's freqs_cos is not the origin's table (base 10000, no scaling) of its dim, n_heads and max_seq_len")
    return config
