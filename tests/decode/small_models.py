"""Small random models for the tests of the loop."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A live random Llama whose logits are spread enough that draws differ."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2, "bos_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()
