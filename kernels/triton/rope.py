"""``rope_append`` on a GPU in Triton: its launch (contract in ``api``; the kernel in ``rope_heads``).

The grid depends on shapes alone and calls can be captured in a CUDA graph. Values out of range, which are not read before the launch, are
not followed: a slot outside the cache writes nothing, and a position outside the tables does not turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import checks
from .launch import Launch, check_device, launch, power_of_two, run
from .rope_heads import rope_heads

_TOKENS = 16  # of a program; a multiple of a sub-block


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    num_heads: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """See ``api.rope_append``."""
    sizes = checks.rope_append(qkv, positions, slots, cos, sin, key_cache, value_cache, num_heads, q_norm, k_norm)
    check_device(qkv.device, "qkv")
    checks.device_has(key_cache.device, key_cache.dtype)
    out = qkv.new_empty((len(qkv), num_heads, sizes.head_dim))
    run(
        launches(out, qkv, positions, slots, cos, sin, key_cache, value_cache, sizes, interleaved, q_norm, k_norm, norm_eps), qkv.device
    )  # fmt: skip
    return out


def launches(
    out: Tensor,
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    sizes: checks.CacheShape,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> Sequence[Launch]:
    """The kernel of a call, with its grid and arguments."""
    rows, num_heads, head_dim = out.shape
    scaled = key_cache.dtype in checks.SCALED_DTYPES
    given = {
        "qkv": qkv, "positions": positions, "slots": slots, "cos": cos, "sin": sin, "keys": key_cache, "values": value_cache,
        "key_scales": key_cache.view(torch.float32) if scaled else None, "out": out,
        "value_scales": value_cache.view(torch.float32) if scaled else None, "q_norm": q_norm, "k_norm": k_norm, "eps": norm_eps,
        "limit": checks.cache_limit(key_cache.dtype) if scaled else 1.0,
        "rows": rows, "max_position": len(cos), "num_blocks": sizes.num_blocks, "num_heads": num_heads,
        "num_kv_heads": sizes.num_kv_heads, "HEAD_DIM": head_dim, "HALF": cos.shape[1], "INTERLEAVED": interleaved,
        "BLOCK_SIZE": sizes.block_size, "BLOCK_D": power_of_two(head_dim), "TOKENS": _TOKENS,
    }  # fmt: skip
    return [launch(rope_heads, (triton.cdiv(rows, _TOKENS), num_heads + 2 * sizes.num_kv_heads), given)]
