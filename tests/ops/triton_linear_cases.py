"""As a program, under TRITON_INTERPRET=1: ``linear`` in Triton's interpreter against the oracle; prints one JSON object, group of cases ->
what was run and what went wrong. In a process of its own: see ``triton_cases``."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton_cases
import triton_interpreter
from torch import Tensor

from engine.kernels import QuantizedWeight, quantize, quantized, reference
from engine.kernels import triton as backend
from engine.kernels.triton import elementwise, linear_launch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = ("float", *quantized.FORMATS)
ERROR = {
    F32: 2e-6,
    BF16: 2.0**-7,
    F16: 2.0**-10,
}  # of a result, of the sum of its terms' sizes; what rounds to 16 bits loses their last one
SPARE = 1000


def matrix(n: int, k: int, dtype: torch.dtype, format: str) -> Any:
    w = torch.randn(n, k).to(dtype)
    return w if format == "float" else quantize(w, format)


def compare(name: str, y: Tensor, x: Tensor, weights: list[Any], biases: list[Any] | None, residual: Tensor | None = None) -> list[str]:
    """Against the oracle, and within the error of float32 sums and one rounding."""
    expected = reference.linear(x, weights, biases, residual=residual, out=x.new_empty(y.shape, dtype=F32)).double()
    dense = torch.cat([w.double() if isinstance(w, Tensor) else w.dense().double() for w in weights])
    size = x.double().abs() @ dense.abs().T + 10
    wrong = ((y.double() - expected).abs() > ERROR[y.dtype] * size).sum()
    return [f"{name}: {wrong} of {y.numel()} outputs are off"] if wrong or y.shape != expected.shape else []


def shapes() -> dict[str, Any]:
    """Odd sizes of everything, every dtype and format; biases of all kinds, residual, what is written to."""
    wrong, rows = [], 0
    for dtype in (F32, BF16, F16):
        for format in FORMATS:
            for m, counts, k in ((1, (1,), 1), (7, (70, 5, 33), 130), (65, (66,), 64), (3, (20, 0, 64, 2), 257)):
                if format != "float":
                    counts = tuple(n for n in counts if n)
                name = f"{dtype} {format} {m} x {counts} x {k}"
                x, weights = torch.randn(m, k).to(dtype), [matrix(n, k, dtype, format) for n in counts]
                biases = [None if i == 1 else torch.randn(n).to(dtype if i % 2 else F32) for i, n in enumerate(counts)]
                residual = torch.randn(m, sum(counts))
                y = backend.linear(x, weights)
                wrong += compare(name, y, x, weights, None) + ([] if y.dtype == dtype else [f"{name}: gives {y.dtype}"])
                y = backend.linear(x, weights, biases, residual=residual)
                wrong += compare(f"{name} with residual", y, x, weights, biases, residual)
                if format == "float":
                    if backend.linear(x, weights, biases, residual=residual, out=residual) is not residual:
                        wrong.append(f"{name}: out is not what comes back")
                    if not torch.equal(y, residual):
                        wrong.append(f"{name}: written over the residual it is another")
                    y = backend.linear(x, weights, biases, out=torch.full_like(residual, math.nan))
                    wrong += compare(f"{name} with biases", y, x, weights, biases)
                rows += m
    return {"rows": rows, "wrong": wrong}


def mixed_dtypes() -> dict[str, Any]:
    """x and weights of different dtypes are multiplied in float32."""
    wrong = []
    for dtype, stored in ((F32, BF16), (BF16, F32), (F16, BF16)):
        x, weights = torch.randn(5, 77).to(dtype), [matrix(9, 77, stored, "float")]
        wrong += compare(f"{dtype} x {stored}", backend.linear(x, weights, out=torch.empty(5, 9)), x, weights, None)
    return {"rows": 15, "wrong": wrong}


def empty() -> dict[str, Any]:
    wrong = []
    for m, n, k in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        y = backend.linear(torch.ones(m, k), [torch.ones(n, k)], [torch.full((n,), 5.0)])
        if not torch.equal(y, torch.full((m, n), 5.0)):
            wrong.append(f"{m} x {n} x {k}: {y.tolist()}")
    return {"rows": 4, "wrong": wrong}


def batches() -> dict[str, Any]:
    """A row has the same bits in every batch, and whoever computes the segments of K; matrices have the same side by side and joined."""
    wrong, rows = [], 0
    usual, shortest = linear_launch.is_split, linear_launch.SHORTEST_SEGMENT
    for dtype, format, k, least in (
        (BF16, "float", 800, shortest),
        (BF16, "float", 300, 64),  # shorter segments, so that there are several of few steps
        (F32, "float", 200, 64),
        (F16, "int4", 300, 64),
        (BF16, "int8", 300, 64),
        (BF16, "fp8", 300, 64),
    ):
        linear_launch.SHORTEST_SEGMENT = least
        count = 200 if least == 64 else 8
        weights = [matrix(n, k, dtype, format) for n in (40, 20)]
        if (cut := linear_launch.tiling(60, k, format, dtype)).segments < 3 or k % cut.segment_depth == 0:
            wrong.append(f"{format}: {k} is cut into {cut.segments} segments of {cut.segment_depth}")
        x, residual, biases = torch.randn(count, k).to(dtype), torch.randn(count, 60), [torch.randn(40), torch.randn(20)]
        whole = backend.linear(x, weights, biases, residual=residual)
        for walked, a, b in ((False, 0, 1), (False, 1, 8), (False, 10, 74), (True, 0, 1), (True, 100, 165)):
            if a < count:
                linear_launch.is_split = (lambda programs: False) if walked else usual
                if not torch.equal(backend.linear(x[a:b], weights, biases, residual=residual[a:b]), whole[a:b]):
                    wrong.append(f"{dtype} {format}: rows {a} to {b} differ{', walked' if walked else ''}")
                rows += min(b, count) - a
        linear_launch.is_split = usual
        if format == "float":
            joined = backend.linear(x[:5], [torch.cat(weights)], [torch.cat(biases)], residual=residual[:5])
            if not torch.equal(joined, whole[:5]):
                wrong.append(f"{dtype}: joined matrices differ")
    linear_launch.SHORTEST_SEGMENT = shortest
    return {"rows": rows, "wrong": wrong}


def around(t: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """A copy of a matrix whose memory is surrounded by others' values, between the rows of x too; and all of that memory."""
    memory = torch.full((t.numel() + 2 * SPARE,), value).to(t.dtype)
    view = memory[SPARE:-SPARE].view(t.shape)
    view.copy_(t)
    return view, memory


def strides_and_neighbours() -> dict[str, Any]:
    """What lies around x, weights, biases, residual and out is not read into the result nor written to; rows of x may be far apart."""
    wrong = []
    for dtype in (F32, BF16):
        for m, n, k in ((3, 70, 100), (66, 5, 33)):
            x, w, bias, residual = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n), torch.randn(m, n)
            expected = backend.linear(x, [w], [bias], residual=residual)
            wide = torch.full((m + 2, 3 * k), math.nan).to(dtype)
            wide[1:-1, k + 1 : 2 * k + 1] = x
            apart = wide[1:-1, k + 1 : 2 * k + 1]
            out, memory = around(torch.zeros(m, n), 7.0)
            inputs = [around(t, math.nan)[0] for t in (w, bias, residual)]
            backend.linear(apart, [inputs[0]], [inputs[1]], residual=inputs[2], out=out)
            if not torch.equal(out, expected):
                wrong.append(f"{dtype} {m} x {n} x {k}: neighbours change the result")
            if not ((memory[:SPARE] == 7).all() and (memory[-SPARE:] == 7).all()):
                wrong.append(f"{dtype} {m} x {n} x {k}: neighbours of out are written to")
            same = backend.linear(x[:1].expand(m, k), [w], [bias], out=torch.empty(m, n))
            if not torch.equal(same, backend.linear(x[:1], [w], [bias], out=torch.empty(1, n)).expand(m, n)):
                wrong.append(f"{dtype} {m} x {n} x {k}: rows that are one differ")
    return {"rows": 69 * 4, "wrong": wrong}


def bounds() -> dict[str, Any]:
    """Nothing is read or written outside of the tensors of a call, also where x, quantised weights and matrices end within a tile."""
    wrong, rows = [], 0
    usual = linear_launch.is_split
    for dtype, format in ((F32, "float"), (BF16, "float"), (BF16, "int8"), (F16, "int4")):
        for m, counts, k in ((1, (5,), 33), (65, (3, 70, 1), 130), (3, (64,), 600)):
            x, weights = torch.randn(m, k).to(dtype), [matrix(n, k, dtype, format) for n in counts]
            biases, residual = [torch.randn(n) for n in counts], torch.randn(m, sum(counts))
            for walked in (False, True)[: 1 if k < 512 else 2]:
                linear_launch.is_split = (lambda programs: False) if walked else usual
                out = torch.full_like(residual, math.nan)
                found = triton_interpreter.accesses_outside(linear_launch.launches(x, weights, biases, residual, out))
                wrong += [f"{dtype} {format} {m} x {counts} x {k}: {each}" for each in found]
                wrong += compare(f"{dtype} {format} {m} x {counts} x {k}", out, x, weights, biases, residual)
                rows += m
    linear_launch.is_split = usual
    return {"rows": rows, "wrong": wrong}


def hostile() -> dict[str, Any]:
    """Values that are no numbers stay in their row and column."""
    wrong = []
    for dtype, format in ((F32, "float"), (BF16, "float"), (BF16, "int4")):
        x, w = torch.randn(66, 130).to(dtype), matrix(70, 130, dtype, format)
        clean = backend.linear(x, [w])
        for bad, at in ((math.nan, 0), (math.inf, 129)):
            spoilt = x.clone()
            spoilt[65, at] = bad
            y = backend.linear(spoilt, [w])
            if not torch.equal(y[:65], clean[:65]) or (y[65].isfinite().any() and format == "float"):
                wrong.append(f"{dtype} {format}: {bad} at {at} of a row")
            if isinstance(w, Tensor):
                other = w.clone()
                other[67, at] = bad
                y, columns = backend.linear(x, [other]), torch.arange(70) != 67
                if not torch.equal(y[:, columns], clean[:, columns]) or y[:, 67].isfinite().any():
                    wrong.append(f"{dtype}: {bad} at {at} of a column")
    return {"rows": 66 * 5 * 2, "wrong": wrong}


def every_code() -> dict[str, Any]:
    """Rows of a unit matrix give the weights themselves: every number that a format has arrives as it is."""
    wrong = []
    for dtype in (F32, BF16, F16):
        unit = torch.eye(64).to(dtype)
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(4, 64)
        fp8 = codes.view(torch.float8_e4m3fn)
        fp8 = torch.where(fp8.float().isnan(), torch.zeros(()).to(fp8.dtype), fp8.float().to(fp8.dtype))
        scale = torch.tensor([1.0, 0.5, 3.7, 1e-3])
        cases = [QuantizedWeight(fp8, scale, "fp8", (4, 64)), QuantizedWeight(codes.view(torch.int8), scale, "int8", (4, 64))]
        scales = torch.randn(1, 8, 2).half()
        cases.append(QuantizedWeight(torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 8, 32), scales, "int4", (8, 64)))
        for w in cases:
            y = backend.linear(unit, [w], out=torch.empty(64, w.shape[0]))
            dense = w.dense().to(dtype).float() if w.format == "int4" else w.dense()
            if not torch.equal(y.T, dense):
                wrong.append(f"{dtype} {w.format}: {(dense != y.T).sum()} of the codes are others")
    return {"rows": 64 * 9, "wrong": wrong}


def embeddings() -> dict[str, Any]:
    """Rows of a quantised table are the oracle's to the bit; a token outside of it is not followed and has NaN."""
    wrong = []
    tokens = torch.tensor([0, 8, 3, -1, 9, 2**31 - 1, -(2**31), 3], dtype=torch.int32)
    known = torch.tensor([0, 1, 2, 7])
    for format in quantized.FORMATS:
        for width in (33, 1100):
            table = matrix(9, width, BF16, format)
            y = torch.empty(len(tokens), width)
            wrong += triton_interpreter.accesses_outside(elementwise.embed_launches(y, tokens, table))
            if not torch.equal(y[known], reference.embed(tokens[known], table)) or not y[3:7].isnan().all():
                wrong.append(f"{format}, {width}: other rows")
    return {"rows": len(tokens) * 6, "wrong": wrong}


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "shapes": shapes,
    "mixed_dtypes": mixed_dtypes,
    "empty": empty,
    "batches": batches,
    "strides_and_neighbours": strides_and_neighbours,
    "bounds": bounds,
    "hostile": hostile,
    "every_code": every_code,
    "embeddings": embeddings,
}


if __name__ == "__main__":
    triton_cases.patch_once()
    triton_interpreter.exact_conversions()
    triton_interpreter.exact_products()
    triton_interpreter.bounds_of_loops()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
