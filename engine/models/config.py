"""What the one Transformer needs to know about a model, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rope import RopeConfig

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Raises ``ValueError`` on construction if the sizes contradict each other or the kernels cannot serve them.
    """

    family: str  # the model_type of the checkpoint: "llama", "qwen3", "Tiny-K" ...
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # need not be hidden_size / num_heads
    ffn_size: int
    norm_eps: float
    max_position: int  # length of the RoPE tables, so the hard limit on prompt + generated tokens
    rope: RopeConfig
    windows: tuple[int, ...]  # per layer: how many of the last keys a token sees, 0 for all
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS normalisation of each query and key head before the rotation (Qwen3)
    tied_head: bool = False  # the LM head is the embedding matrix itself
    dtype: torch.dtype | None = None  # of the matrices; as declared by the config, and after loading as found
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "max_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim {self.head_dim} is not supported; allowed are the multiples of 8 up to {MAX_HEAD_DIM}")
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim {self.rope.rotary_dim} is larger than head_dim {self.head_dim}")
        if len(self.windows) != self.num_layers or min(self.windows) < 0:
            raise ValueError(f"windows is {self.windows}; it must hold one number >= 0 for each of {self.num_layers} layers")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be >= 0")
