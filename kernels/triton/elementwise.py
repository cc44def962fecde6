"""The small ops of a step on a GPU in Triton: ``embed``, ``rms_norm``, ``silu_mul`` and ``feed_tokens`` (contracts in ``api``; the kernels
in ``elementwise_rows``).

Grids depend on shapes alone. Values out of range, which are not read before the launch, do not raise and are not followed: a token outside
the vocabulary has a row of NaN, so that the request it belongs to fails by its status, and a ``source`` outside ``drawn`` feeds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import checks
from ..packed import PackedWeight
from ..quantized import QuantizedWeight
from .elementwise_rows import embed_rows, feed_rows, norm_rows, silu_rows
from .launch import Launch, check_device, launch, power_of_two, run
from .linear_kernels import quantized_rows
from .linear_launch import elements, row_stride, scales

MAX_WIDTH = 32768  # of `rms_norm`, whose program holds a row in registers
_BLOCK = 1024  # elements of a program of `embed` and `silu_mul`
_FEED_BLOCK = 256


def embed(tokens: Tensor, table: Tensor | PackedWeight | QuantizedWeight) -> Tensor:
    """See ``api.embed``."""
    if isinstance(table, PackedWeight):
        raise TypeError("table is packed in the order of the C++ kernels; on a GPU it must be a tensor or of kernels.quantize(...)")
    checks.embed(tokens, table)
    check_device(tokens.device, "tokens")
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
