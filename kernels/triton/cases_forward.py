"""How the small ops of a forward specialise their kernels, for ``compile``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..quantized import QuantizedWeight
from . import cache, elementwise, rope
from .launch import Launch


class Variant(NamedTuple):
    """A model, and the dtype of its cache."""

    name: str
    dtype: torch.dtype
    cache: torch.dtype
    head_dim: int
    rot: int
    num_kv_heads: int
    norm: bool = False
    interleaved: bool = False
    table: str = "float"  # the format of the embedding
    tokens: int = 48


VARIANTS = (
    Variant("forward bf16", torch.bfloat16, torch.bfloat16, 128, 128, 8),
    Variant("forward int8 cache", torch.bfloat16, torch.int8, 128, 128, 8, norm=True, table="int4"),
    Variant("forward fp8 cache", torch.bfloat16, torch.float8_e4m3fn, 128, 128, 8, table="int8"),  # only where the GPU has it
    Variant("forward fp16", torch.float16, torch.float32, 256, 64, 1, interleaved=True),
    Variant("forward fp32", torch.float32, torch.float32, 256, 256, 3, norm=True),
    Variant("forward odd", torch.float32, torch.bfloat16, 40, 24, 3, norm=True),
)


def cases() -> Iterator[tuple[str, Iterator[Launch]]]:
    """See ``compile.CASES``."""
    for variant in VARIANTS:
        yield variant.name, _launches(variant)


def _table(v: Variant, width: int) -> Tensor | QuantizedWeight:
    if v.table == "float":
        return torch.empty((128256, width), dtype=v.dtype, device="meta")
    shapes = {"int4": ((width // 64, 128256, 32), (width // 64, 128256, 2)), "int8": ((128256, width), (128256,))}
    dtypes = {"int4": (torch.uint8, torch.float16), "int8": (torch.int8, torch.float32)}
    data, scale = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes[v.table], dtypes[v.table], strict=True))
    return QuantizedWeight(data, scale, v.table, (128256, width))


def _launches(v: Variant) -> Iterator[Launch]:
    """The launches of all calls on meta tensors."""

    def make(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    i32, f32 = torch.int32, torch.float32
    num_heads, layers, num_blocks, block_size = 4 * v.num_kv_heads, 2, 1000, 16
    width = num_heads * v.head_dim if v.head_dim % 16 == 0 else 33 * v.head_dim + 1
    ids, x = make(i32, v.tokens), make(f32, v.tokens, width)
    yield from elementwise.embed_launches(x, ids, _table(v, width))
    yield from elementwise.norm_launches(x.to(v.dtype), x, make(v.dtype, width), 1e-5)
    yield from elementwise.silu_launches(x.to(v.dtype), make(v.dtype, v.tokens, 2 * width))
    yield from elementwise.feed_launches(ids, ids, make(torch.int64, v.tokens))
    scaled = v.cache in checks.SCALED_DTYPES
    of_a_sub_block = (v.head_dim + checks.SCALE_BYTES if scaled else v.head_dim, 16)
    blocks = (layers, num_blocks, v.num_kv_heads)
    keys = make(v.cache, *blocks, 1, *of_a_sub_block)
    values = keys if scaled else make(v.cache, *blocks, block_size, v.head_dim)
    sizes = checks.copies(keys, values, ids, ids)
    table, norm = make(f32, 4096, v.rot // 2), make(v.dtype, v.head_dim) if v.norm else None
    yield from rope.launches(
        make(v.dtype, v.tokens, num_heads, v.head_dim), make(v.dtype, v.tokens, (num_heads + 2 * v.num_kv_heads) * v.head_dim), ids, ids,
        table, table, keys[0], values[0], sizes, v.interleaved, norm, norm, 1e-5,
    )  # fmt: skip
    yield from cache.move_launches(keys, values, ids, ids, sizes)
    yield from cache.copy_launches(keys, values, ids, ids)
