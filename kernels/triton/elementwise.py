"""The small ops of a step on a GPU in Triton: ``embed``, ``rms_norm``, ``silu_mul`` and ``feed_tokens`` (contracts in ``api``).

Each reads its input once and writes its result once: ``embed`` the bytes of T rows of the table and 4 T H, ``rms_norm`` 4 M H and M H
results, ``silu_mul`` 2 M F and M F results; at one row their time is that of a launch and of one trip to memory, so a program asks for all
that it needs before it computes anything. A row is computed by one program (``silu_mul`` and ``embed``: element by element), in an order
that its width alone decides. The forward (``Transformer._op_by_op``) calls them, and ``feed_tokens`` stands before it.

Grids depend on shapes alone. Values out of range, which are not read before the launch, do not raise and are not followed: a token outside
the vocabulary has a row of NaN, so that the request it belongs to fails by its status, and a ``source`` outside ``drawn`` feeds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..packed import PackedWeight
from ..quantized import QuantizedWeight
from .launch import Launch, check_device, launch, power_of_two, run
from .linear_kernels import quantized_rows
from .linear_launch import elements, row_stride, scales
from .sample_row import kernel

MAX_WIDTH = 32768  # of `rms_norm`, whose program holds a row in registers
_BLOCK = 1024  # elements of a program of `embed` and `silu_mul`
_FEED_BLOCK = 256


@kernel
def embed_rows(ids, table, out, vocab, width, BLOCK: tl.constexpr):
    """Grid: tokens, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    known = (token >= 0) & (token < vocab)
    x = tl.load(table + token * width + column, mask=known & (column < width), other=0.0).to(tl.float32)
    tl.store(out + row * width + column, tl.where(known, x, float("nan")), mask=column < width)


@kernel
def norm_rows(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    w = tl.load(weight + column, mask=there, other=0.0)
    values = tl.load(x + row * WIDTH + column, mask=there, other=0.0)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) * (1.0 / WIDTH) + eps)
    tl.store(out + row * WIDTH + column, (values * factor * w.to(tl.float32)).to(out.dtype.element_ty), mask=there)


@kernel
def silu_rows(x, out, width, BLOCK: tl.constexpr):
    """Grid: rows, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(x + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=there)


@kernel
def feed_rows(ids, source, drawn, rows, num_drawn, BLOCK: tl.constexpr):
    """Grid: blocks of the tokens."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(source + row, mask=row < rows, other=-1)
    fed = (place >= 0) & (place < num_drawn)
    tl.store(ids + row, tl.load(drawn + place, mask=fed, other=0).to(tl.int32), mask=fed)


def embed(tokens: Tensor, table: Tensor | PackedWeight | QuantizedWeight) -> Tensor:
    """See ``api.embed``."""
    checks.embed(tokens, table)
    check_device(tokens.device, "tokens")
    if isinstance(table, PackedWeight):
        raise TypeError("table is packed in the order of the C++ kernels; on a GPU it must be a tensor or of kernels.quantize(...)")
    out = torch.empty((len(tokens), table.shape[1]), dtype=torch.float32, device=tokens.device)
    run(embed_launches(out, tokens, table), tokens.device)
    return out


def embed_launches(out: Tensor, tokens: Tensor, table: Tensor | QuantizedWeight) -> Sequence[Launch]:
    vocab, width = table.shape
    given = {"ids": tokens, "table": elements(table), "out": out, "vocab": vocab, "width": width, "BLOCK": _BLOCK}
    grid = (len(tokens), triton.cdiv(width, _BLOCK))
    if isinstance(table, Tensor):
        return [launch(embed_rows, grid, given)]
    quantised = {"scale": scales(table), "stride": row_stride(table), "FORMAT": table.format}
    return [launch(quantized_rows, grid, given, quantised)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``api.rms_norm``; rows of up to 32,768."""
    checks.rms_norm(x, weight, dtype)
    if x.shape[1] > MAX_WIDTH:
        raise ValueError(f"x must have rows of at most {MAX_WIDTH} elements on a GPU, got {tuple(x.shape)}")
    check_device(x.device, "x")
    out = torch.empty_like(x, dtype=dtype)
    run(norm_launches(out, x, weight, eps), x.device)
    return out


def norm_launches(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Sequence[Launch]:
    rows, width = x.shape
    block = power_of_two(max(width, 1))
    given = {"x": x, "weight": weight, "out": out, "eps": eps, "WIDTH": width, "BLOCK": block}
    warps = min(max(block // 256, 1), 32)  # eight elements a thread, two loads of 16 bytes, as long as a program may have more threads
    return [launch(norm_rows, (rows if width else 0,), given, {"num_warps": warps})]


def silu_mul(x: Tensor) -> Tensor:
    """See ``api.silu_mul``."""
    checks.silu_mul(x)
    check_device(x.device, "x")
    out = x.new_empty((len(x), x.shape[1] // 2))
    run(silu_launches(out, x), x.device)
    return out


def silu_launches(out: Tensor, x: Tensor) -> Sequence[Launch]:
    rows, width = out.shape
    return [launch(silu_rows, (rows, triton.cdiv(width, _BLOCK)), {"x": x, "out": out, "width": width, "BLOCK": _BLOCK})]


def feed_tokens(tokens: Tensor, source: Tensor, drawn: Tensor) -> None:
    """See ``api.feed_tokens``."""
    checks.feed_tokens(tokens, source, drawn)
    check_device(tokens.device, "tokens")
    run(feed_launches(tokens, source, drawn), tokens.device)


def feed_launches(tokens: Tensor, source: Tensor, drawn: Tensor) -> Sequence[Launch]:
    rows = len(tokens)
    given = {"ids": tokens, "source": source, "drawn": drawn, "rows": rows, "num_drawn": len(drawn), "BLOCK": _FEED_BLOCK}
    return [launch(feed_rows, (triton.cdiv(rows, _FEED_BLOCK),), given)]
