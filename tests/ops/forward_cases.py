"""Arguments of ``rope_append``, and values that caches with scales must be ready for."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import empty_caches

HOSTILE = {
    "zeros": [0.0, -0.0],
    "ties": [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5],
    "one": [3.0],
    "nan": [1.0, torch.nan],
    "inf": [1.0, torch.inf],
    "minus inf": [-torch.inf, 2.0],
    "nan first": [torch.nan, 1e30],
    "large": [3.4e38, -3.4e38, 1e37],
    "subnormal": [1e-40, -3e-41, 1e-45],
    "scale underflows": [1e-45, -7e-45],
    "coarse scale": [2e-43, -1.9e-43, 1.4e-45],
    "equal": [-1.0] * 24,
}


def rope_case(
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rot: int,
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    norm: torch.dtype | None = None,
    interleaved: bool = False,
) -> dict[str, Any]:
    """Arguments of rope_append; every third slot is -1, the caches start as NaN."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(tokens * 1000 + head_dim + rot)
    angles = torch.rand(60, rot // 2, generator=generator) * 6
    num_blocks = -(-tokens // block_size) + 2
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens].int()
    slots[1::3] = -1
    return {
        "qkv": torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator),
        "positions": torch.randint(0, 60, (tokens,), generator=generator, dtype=torch.int32),
        "slots": slots,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "key_cache": torch.full((num_blocks, num_kv_heads, block_size // 16, head_dim, 16), torch.nan, dtype=dtype),
        "value_cache": torch.full((num_blocks, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype),
        "num_heads": num_heads,
        "interleaved": interleaved,
        "q_norm": None if norm is None else torch.randn(head_dim, generator=generator).to(norm),
        "k_norm": None if norm is None else torch.randn(head_dim, generator=generator).to(norm),
        "norm_eps": 1e-5,
    }


def with_caches(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The case with caches of any dtype."""
    num_blocks, num_kv_heads, block_size, head_dim = case["value_cache"].shape
    key_cache, value_cache = empty_caches(num_blocks, num_kv_heads, block_size, head_dim, dtype)
    return {**case, "key_cache": key_cache, "value_cache": value_cache}
