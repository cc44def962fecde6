"""``linear`` on a GPU in Triton: how K is cut, who computes it, and the launches (contract in ``api``; kernels in ``linear_kernels``).

The grid depends on shapes alone, nothing waits for the host, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import checks
from ..packed import PackedWeight
from ..quantized import QuantizedWeight
from .launch import Launch, check_device, launch, run
from .linear_kernels import linear_finish, linear_tiles

BLOCK_M = 64  # never another: see `linear_kernels`
PROGRAMS = 256  # two for each multiprocessor of the GPUs of today: fewer leave some of its bandwidth unused
SHORTEST_SEGMENT = 256  # of K: less is not worth the reading and writing of its sums
MATRICES = 3  # of one launch
_FINISH_ROWS = 4
_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Weight = Tensor | QuantizedWeight


class Tiling(NamedTuple):
    """How the products of matrices with ``width`` outputs in all are cut."""

    block_n: int
    block_k: int
    stages: int  # tiles on their way to the multiprocessor at a time
    warps: int
    segment_depth: int
    segments: int


def tiling(width: int, depth: int, format: str, dtype: torch.dtype) -> Tiling:
    """Of nothing but the matrices and the dtype they are multiplied in, so that all rows are computed alike."""
    wide = dtype == torch.float32  # by multiply-add units, from registers
    odd = format == "float" and depth % 8 != 0  # rows of weights that are not read 16 bytes at a time, so past shared memory
    block_n = 64 if wide or odd or width < 4096 else 128
    block_k = 32 if format == "float" and (wide or odd) else 64
    stages, warps = (2, 8) if wide else (4, 4)
    possible = max(1, depth // SHORTEST_SEGMENT)
    wanted = min(possible, max(1, PROGRAMS // max(1, -(-width // block_n))))
    segment_depth = max(1, -(-depth // (wanted * block_k))) * block_k
    return Tiling(block_n, block_k, stages, warps, segment_depth, max(1, -(-depth // segment_depth)))


def linear(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``api.linear``. A matrix in the CPU's panels is refused."""
    width = checks.linear(x, weights, biases, residual, out)
    check_device(x.device, "x")
    matrices = [w for w in weights if not isinstance(w, PackedWeight)]
    if len(matrices) < len(weights):
        raise TypeError("weights are packed in the order of the C++ kernels; on a GPU they must be tensors or of kernels.quantize(...)")
    if out is None:
        out = x.new_empty((x.shape[0], width), dtype=x.dtype if residual is None else torch.float32)
    run(list(launches(x, matrices, biases, residual, out)), x.device)
    return out


def launches(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None] | None, residual: Tensor | None, out: Tensor
) -> Iterator[Launch]:
    """The kernels of a call with their grids and arguments."""
    width = out.shape[1]
    start = 0
    for group, bias in _groups(weights, biases):
        yield from _launches(
            x, group, bias, residual, out, start, tiling(width, x.shape[1], format_of(weights[0]), dtype_of(x, weights[0]))
        )
        start += sum(w.shape[0] for w in group)


def is_split(programs: int) -> bool:
    """Whether segments get programs of their own where there would else be so many."""
    return programs < PROGRAMS


def product_arguments(x: Tensor, weight: Weight, cut: Tiling) -> dict[str, Any]:
    """What ``product`` takes beside the tile, the matrix and its scales, and how it is launched."""
    return {
        "x": x,
        "x_stride": x.stride(0),
        "depth": x.shape[1],
        "stride": row_stride(weight),
        "segment_depth": cut.segment_depth,
        "SEGMENTS": cut.segments,
        "FORMAT": format_of(weight),
        "EVEN": x.shape[1] % cut.block_k == 0,
        "DTYPE": _DTYPE[dtype_of(x, weight)],
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
        "num_stages": cut.stages,
        "num_warps": cut.warps,
    }


def dtype_of(x: Tensor, weight: Weight) -> torch.dtype:
    """What is multiplied: x and weights of one dtype as they are, others in float32; quantised weights in that of x."""
    return x.dtype if isinstance(weight, QuantizedWeight) or weight.dtype == x.dtype else torch.float32


def format_of(weight: Weight) -> str:
    """Of a matrix, as the kernels call it."""
    return weight.format if isinstance(weight, QuantizedWeight) else "float"


def _groups(weights: Sequence[Weight], biases: Sequence[Tensor | None] | None) -> Iterator[tuple[list[Weight], list[Tensor | None]]]:
    """The matrices of each launch: neighbours whose biases are of one kind."""
    given: list[Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    kinds = [None if bias is None else bias.dtype for bias in given]
    begin = 0
    for i in range(1, len(weights) + 1):
        if i == len(weights) or i - begin == MATRICES or kinds[i] != kinds[begin]:
            yield list(weights[begin:i]), given[begin:i]
            begin = i


def _launches(
    x: Tensor, weights: list[Weight], biases: list[Tensor | None], residual: Tensor | None, out: Tensor, start: int, cut: Tiling
) -> Iterator[Launch]:
    rows, counts = x.shape[0], [w.shape[0] for w in weights]
    tiles = sum(-(-n // cut.block_n) for n in counts)
    row_tiles = -(-rows // BLOCK_M)
    split = cut.segments > 1 and is_split(row_tiles * tiles)
    ends = {
        **_numbered("scale", [scales(w) for w in weights], None),
        **_numbered("bias", biases, None),
        **_numbered("columns", counts, 0),
        "residual": residual,
        "out": out,
        "out_stride": out.shape[1],
        "out_start": start,
        "partial": x.new_empty((cut.segments, rows, sum(counts)), dtype=torch.float32) if split else None,
        "rows": rows,
        "MATRICES": len(weights),
        "SEGMENTS": cut.segments,
        "FORMAT": format_of(weights[0]),
        "BLOCK_N": cut.block_n,
    }
    matrices = _numbered("w", [elements(w) for w in weights], None)
    grid = (row_tiles, tiles, cut.segments if split else 1)
    yield launch(linear_tiles, grid, ends, matrices, {"SPLIT": split}, product_arguments(x, weights[0], cut))
    if split:
        yield launch(linear_finish, (-(-rows // _FINISH_ROWS), tiles), ends, {"ROWS": _FINISH_ROWS})


def _numbered(name: str, values: Sequence[Any], absent: Any) -> dict[str, Any]:
    return {f"{name}{i}": values[i] if i < len(values) else absent for i in range(MATRICES)}


def elements(weight: Weight) -> Tensor:
    """The matrix as the kernels read it."""
    return weight.data.view(torch.int8) if format_of(weight) == "fp8" else weight.data


def scales(weight: Weight) -> Tensor | None:
    """Its scales as the kernels read them: two of int4 as one number."""
    if not isinstance(weight, QuantizedWeight):
        return None
    return weight.scale.view(torch.int32)[..., 0] if weight.format == "int4" else weight.scale


def row_stride(weight: Weight) -> int:
    """Elements from one output to the next; of no meaning for int4."""
    return weight.data.stride(0) if isinstance(weight, QuantizedWeight) else weight.shape[1]
