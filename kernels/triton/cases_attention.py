"""How calls of ``paged_attention`` specialise its kernels, for ``compile``: dtypes, head dimensions, groups, windows, trees; and the wide
tiles of ``fast``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from .. import checks
from . import attention
from .launch import Launch


class Variant(NamedTuple):
    """A way to call ``paged_attention``."""

    name: str
    q: torch.dtype
    cache: torch.dtype
    heads: tuple[int, int]  # of queries, of keys and values
    head_dim: int
    window: bool = False
    trees: bool = False
    block_size: int = 16
    wide: bool = False


_F32, _BF16, _F16, _INT8, _FP8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
VARIANTS = (
    Variant("bf16, D = 128", _BF16, _BF16, (32, 8), 128),
    Variant("bf16, window and trees", _BF16, _BF16, (32, 8), 128, window=True, trees=True),
    Variant("bf16, D = 64", _BF16, _BF16, (14, 2), 64, trees=True, block_size=32),
    Variant("bf16, D = 256", _BF16, _BF16, (8, 4), 256, window=True, trees=True),
    Variant("bf16, D = 80, group 24", _BF16, _BF16, (48, 2), 80),
    Variant("fp16 over fp32", _F16, _F32, (32, 8), 128, trees=True),
    Variant("fp16 over int8", _F16, _INT8, (32, 8), 128, window=True, trees=True),
    Variant("bf16 over int8", _BF16, _INT8, (32, 8), 128),
    Variant("bf16 over fp8", _BF16, _FP8, (32, 8), 128),
    Variant("fp32, D = 128", _F32, _F32, (32, 8), 128, window=True, trees=True),
    Variant("fp32 over int8, D = 8", _F32, _INT8, (4, 4), 8),
    Variant("fp32, D = 256", _F32, _F32, (8, 4), 256),
    Variant("fp32, D = 256, all", _F32, _F32, (8, 4), 256, window=True, trees=True),
    Variant("wide bf16", _BF16, _BF16, (32, 8), 128, wide=True),
    Variant("wide bf16, all", _BF16, _BF16, (32, 8), 128, window=True, trees=True, wide=True),
    Variant("wide fp16 over int8", _F16, _INT8, (32, 8), 128, wide=True),
)


def cases() -> Iterator[tuple[str, Iterable[Launch]]]:
    """See ``compile.CASES``."""
    for variant in VARIANTS:
        yield variant.name, _launches(variant)


def _launches(v: Variant) -> Iterator[Launch]:
    tokens, sequences, blocks, max_blocks = 3, 3, 7, 100
    num_heads, kv_heads = v.heads
    scale_bytes = checks.SCALE_BYTES if v.cache.itemsize == 1 else 0
    key_shape = (blocks, kv_heads, v.block_size // 16, v.head_dim + scale_bytes, 16)
    value_shape = key_shape if scale_bytes else (blocks, kv_heads, v.block_size, v.head_dim)

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = torch.empty(tokens, num_heads, v.head_dim, dtype=v.q, device="meta")
    key_cache = torch.empty(key_shape, dtype=v.cache, device="meta")
    value_cache = torch.empty(value_shape, dtype=v.cache, device="meta")
    trees = (ints(sequences), ints(tokens, dtype=torch.int64)) if v.trees else (None, None)
    step = (q, key_cache, value_cache, ints(sequences, max_blocks), ints(sequences + 1), ints(sequences))
    for split in (False,) if v.wide else (True, False):
        yield from attention.launches(torch.empty_like(q), *step, 0.1, 100 if v.window else 0, *trees, split=split, wide=v.wide)
