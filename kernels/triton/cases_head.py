"""How calls of ``sample_head`` specialise its kernels, for ``compile``: dtypes, formats of weights, how K is cut, where noise begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import HeadDraw
from ..quantized import BLOCK, QuantizedWeight
from . import head
from .launch import Launch


class Variant(NamedTuple):
    """A call of ``sample_head`` on two rows."""

    name: str
    dtype: torch.dtype
    depth: int
    vocab: int
    format: str = "float"
    first_token: int = 0


_BF16 = torch.bfloat16
VARIANTS = (
    Variant("head: bf16", _BF16, 4096, 128256),
    Variant("head: bf16, walked", _BF16, 2048, 5008, first_token=16),
    Variant("head: fp16, odd sizes", torch.float16, 1001, 50257, first_token=50257),
    Variant("head: fp32", torch.float32, 1024, 151936),
    Variant("head: int8", _BF16, 4096, 128256, "int8"),
    Variant("head: int4", _BF16, 4096, 128256, "int4"),
    Variant("head: fp8", _BF16, 4096, 128256, "fp8"),
)


def cases() -> Iterator[tuple[str, Iterator[Launch]]]:
    """See ``compile.CASES``."""
    for variant in VARIANTS:
        yield variant.name, _launches(variant)


def _launches(v: Variant) -> Iterator[Launch]:
    """The launches of a call on meta tensors."""

    def make(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, f32, i32, i64 = 2, torch.float32, torch.int32, torch.int64
    floats, both = make(f32, rows), make(f32, 2, rows)
    result = HeadDraw(make(i64, rows), make(i32, rows), floats, both, both, both)
    weight: Any = make(v.dtype, v.vocab, v.depth)
    blocks = -(-v.depth // BLOCK)
    if v.format == "int4":
        weight = QuantizedWeight(
            make(torch.uint8, blocks, v.vocab, BLOCK // 2), make(torch.float16, blocks, v.vocab, 2), "int4", weight.shape
        )
    elif v.format != "float":
        data = make(torch.int8 if v.format == "int8" else torch.float8_e4m3fn, v.vocab, blocks * BLOCK)
        weight = QuantizedWeight(data, make(f32, v.vocab), v.format, weight.shape)
    yield from head.launches(
        result, make(v.dtype, rows, v.depth), weight, floats, make(i64, rows), make(i32, rows), make(i32, rows), v.first_token
    )
