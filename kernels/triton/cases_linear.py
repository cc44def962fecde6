"""How calls of ``linear``, and of ``embed`` over quantised tables, specialise their kernels, for ``compile``: dtypes, formats of weights,
how K is cut, what is added."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quantized import BLOCK, QuantizedWeight
from .elementwise import embed_launches
from .launch import Launch
from .linear_launch import launches


class Variant(NamedTuple):
    """A call of ``linear`` on ``rows`` rows of x."""

    name: str
    dtype: torch.dtype
    rows: int
    depth: int
    columns: tuple[int, ...]
    format: str = "float"
    bias: bool = False
    residual: bool = False


_BF16 = torch.bfloat16
VARIANTS = (
    Variant("linear: bf16, all of K", _BF16, 64, 4096, (14336, 14336)),
    Variant("linear: bf16, split", _BF16, 1, 4096, (4096, 1024, 1024), bias=True),
    Variant("linear: bf16, walked", _BF16, 2048, 14336, (4096,), residual=True),
    Variant("linear: bf16, narrow", _BF16, 1, 1024, (1024,), residual=True),
    Variant("linear: fp16, odd sizes", torch.float16, 7, 4099, (5001,), bias=True),
    Variant("linear: int8, split", _BF16, 1, 4096, (4096,), "int8", residual=True),
    Variant("linear: int8, walked", _BF16, 2048, 4096, (4096,), "int8", residual=True),
    Variant("linear: fp8, split", _BF16, 1, 4096, (4096,), "fp8", residual=True),
    Variant("linear: fp8, walked", _BF16, 2048, 4096, (4096,), "fp8", residual=True),
    Variant("linear: int4, split", _BF16, 1, 4096, (4096,), "int4", residual=True),
    Variant("linear: int4, walked", _BF16, 2048, 4096, (4096,), "int4", residual=True),
    Variant("linear: fp32, split", torch.float32, 1, 4096, (4096,), residual=True),
    Variant("linear: fp32, walked", torch.float32, 2048, 4096, (4096,), residual=True),
    Variant("linear: fp32 x int4", torch.float32, 1, 4096, (4096,), "int4"),
)


def cases() -> Iterator[tuple[str, Iterator[Launch]]]:
    """See ``compile.CASES``."""
    for variant in VARIANTS:
        yield variant.name, _launches(variant)


def _launches(v: Variant) -> Iterator[Launch]:
    """The launches of a call on meta tensors."""

    def make(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = -(-v.depth // BLOCK)

    def weight(n: int) -> Any:
        if v.format == "float":
            return make(v.dtype, n, v.depth)
        if v.format == "int4":
            data, scale = make(torch.uint8, blocks, n, BLOCK // 2), make(torch.float16, blocks, n, 2)
        else:
            data = make(torch.int8 if v.format == "int8" else torch.float8_e4m3fn, n, blocks * BLOCK)
            scale = make(torch.float32, n)
        return QuantizedWeight(data, scale, v.format, (n, v.depth))

    width = sum(v.columns)
    residual = make(torch.float32, v.rows, width) if v.residual else None
    out = make(v.dtype if residual is None else torch.float32, v.rows, width)
    biases = [make(v.dtype, n) for n in v.columns] if v.bias else None
    if v.format != "float" and v.rows == 1:
        table = weight(128256)
        yield from embed_launches(make(torch.float32, v.rows, v.depth), make(torch.int32, v.rows), table)
    yield from launches(make(v.dtype, v.rows, v.depth), [weight(n) for n in v.columns], biases, residual, out)
