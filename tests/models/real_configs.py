"""config.json of well-known checkpoints, as far as it bears on decoding, and the same options on a small model."""

from __future__ import annotations

from typing import Any

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip

LLAMA_32_1B: dict[str, Any] = {
    **LLAMA_31_8B, "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
    "tie_word_embeddings": True,
}  # fmt: skip

MISTRAL_7B_V01: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip

QWEN2_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

REAL: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3.1-8b": LLAMA_31_8B,
    "llama-3.2-1b": LLAMA_32_1B,
    "mistral-7b-v0.1": MISTRAL_7B_V01,
    "qwen2-0.5b": QWEN2_05B,
    "qwen3-0.6b": QWEN3_06B,
}


def small(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The same options on a model of three layers: as many query heads per KV head, small sizes, ids inside the vocabulary."""
    groups = raw["num_attention_heads"] // raw["num_key_value_heads"]
    kv_heads = 2 if groups > 1 else 4
    heads = groups * kv_heads
    head_dim = 16
    sizes = {
        # two families whose head_dim is their own key may have heads * head_dim != hidden_size
        "hidden_size": heads * head_dim if "head_dim" not in raw else 8 * heads,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": [2, 3] if isinstance(raw["eos_token_id"], list) else 2,
        "pad_token_id": None,
    }
    if "head_dim" in raw:
        sizes["head_dim"] = head_dim
    return {**raw, **sizes, **changes}


# Every option that changes the arithmetic, on a small model.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: small(raw) for name, raw in REAL.items()},
    "llama biases": small(LLAMA_31_8B, attention_bias=True, mlp_bias=True),
    "llama linear scaling": small(LLAMA_2_7B, rope_scaling={"type": "linear", "factor": 2.0}),
    "llama yarn": small(LLAMA_2_7B, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "llama yarn mscale": small(
        LLAMA_2_7B,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
    ),
    "llama head_dim 24, one kv head": small(LLAMA_2_7B, head_dim=24, num_key_value_heads=1),
    "mistral window": small(MISTRAL_7B_V01, sliding_window=24),
    "mistral no window": small(MISTRAL_7B_V01, sliding_window=None, head_dim=32),
    "qwen2 window layers": small(QWEN2_05B, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen2 untied": small(QWEN2_05B, tie_word_embeddings=False),
    "qwen3 biases and layer types": small(
        QWEN3_06B,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=17,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3 head_dim 128": small(QWEN3_06B, head_dim=128, hidden_size=64),
}
