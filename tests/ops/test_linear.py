"""``linear`` of the C++ backend over floats, in rows and in panels: against float64, and bit for bit under every way of calling it. Every
instruction set that runs here."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu, pack

needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Stored = Callable[[Tensor], Any]
ROWS = [*range(1, 10), 16, 17, 33, 130]
COLUMNS = [1, 2, 7, 16, 100, 333]
DEPTHS = [1, 3, 8, 15, 16, 17, 100, 768, 1023, 1024, 1025, 2050]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The float64 products are too small to share out among PyTorch's threads; and leave the pool as it was."""
    torch.manual_seed(0)
    torch_threads = torch.get_num_threads()
    threads = None if cpu.unavailable("cpu") else cpu._cpu.num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    if threads is not None:
        cpu._cpu.set_num_threads(threads)


def assert_close(y: Tensor, x: Tensor, w: Tensor, stored: Stored, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Within 1e-5 of the whole, and each output within the rounding of float32 sums: 2e-6 of the sum of its terms' magnitudes.
    Beside panels of bf16, x is rounded to bf16."""
    if stored is pack and w.dtype == torch.bfloat16:
        x = x.bfloat16()
    expected, magnitude = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    for term in (bias, residual):
        if term is not None:
            expected, magnitude = expected + term.double(), magnitude + term.double().abs()
    assert y.dtype == torch.float32 and y.shape == expected.shape
    error = y.double() - expected
    assert (error.abs() <= 2e-6 * magnitude).all()
    assert error.norm() <= 1e-5 * expected.norm()


@pytest.fixture(params=["rows", "panels"])
def stored(request: pytest.FixtureRequest) -> Stored:
    """A matrix as ``linear`` takes it: as it is, or packed."""
    return pack if request.param == "panels" else lambda w: w


def weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, k).to(dtype)


@needs_cpp
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, depth: int, stored: Stored) -> None:
    for columns in COLUMNS:
        w = weight(columns, depth, dtype)
        x = torch.randn(max(ROWS), depth)
        for rows in ROWS:
            assert_close(cpu.linear(x[:rows], [stored(w)]), x[:rows], w, stored)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_biases_and_residual(dtype: torch.dtype, stored: Stored) -> None:
    depth, sizes = 203, (5, 64, 1, 130)
    weights = [weight(n, depth, dtype) for n in sizes]
    biases = [torch.randn(5).to(dtype), None, torch.randn(1), torch.randn(130)]
    joined = torch.cat(weights)
    bias = torch.cat([torch.zeros(n) if b is None else b.float() for n, b in zip(sizes, biases, strict=True)])
    for rows in (1, 3, 8, 75):
        x, residual = torch.randn(rows, depth), torch.randn(rows, sum(sizes))
        kept = residual.clone()
        kept_weights = [stored(w) for w in weights]
        y = cpu.linear(x, kept_weights, biases, residual=residual)
        assert_close(y, x, joined, stored, bias, residual)
        assert torch.equal(residual, kept)
        out = torch.full_like(residual, math.nan)
        assert cpu.linear(x, kept_weights, biases, residual=residual, out=out) is out
        assert torch.equal(out, y)
        assert cpu.linear(x, kept_weights, biases, residual=residual, out=residual) is residual
        assert torch.equal(residual, y)
        # a weight's columns do not depend on its neighbours
        parts = [cpu.linear(x, [stored(w)], [b]) for w, b in zip(weights, biases, strict=True)]
        assert torch.equal(cpu.linear(x, kept_weights, biases), torch.cat(parts, dim=1))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(dtype: torch.dtype, stored: Stored) -> None:
    depth = 77
    for offset in (1, 3):
        w = weight(1, 40 * depth + offset, dtype).flatten()[offset:].view(40, depth)
        x = torch.randn(9, 200)[:, offset : offset + depth]
        residual = torch.randn(9 * 40 + offset)[offset:].view(9, 40)
        assert_close(cpu.linear(x, [stored(w)], residual=residual), x, w, stored, residual=residual)
        assert torch.equal(cpu.linear(x, [stored(w)]), cpu.linear(x.contiguous(), [stored(w.clone())]))
        row = x[:1].expand(5, depth)  # row stride 0
        assert torch.equal(cpu.linear(row, [stored(w)]), cpu.linear(x[:1], [stored(w)]).expand(5, 40))
    thin, w = torch.randn(4, 6)[:, ::2][:, :1], weight(3, 1, dtype)  # one column: its stride means nothing
    assert_close(cpu.linear(thin, [stored(w)]), thin, w, stored)


@needs_cpp
def test_empty(stored: Stored) -> None:
    assert cpu.linear(torch.ones(0, 8), [torch.ones(3, 8)]).shape == (0, 3)
    assert cpu.linear(torch.ones(2, 8), [torch.ones(0, 8)]).shape == (2, 0)
    assert torch.equal(cpu.linear(torch.ones(2, 8), [torch.ones(0, 8), torch.ones(1, 8)]), torch.full((2, 1), 8.0))
    assert torch.equal(cpu.linear(torch.ones(2, 0), [torch.ones(3, 0)], [torch.tensor([1.0, 2, 3])]), torch.tensor([[1.0, 2, 3]] * 2))


@needs_cpp
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_values_stay_in_their_row_and_column(dtype: torch.dtype, bad: float, stored: Stored) -> None:
    depth = 1030
    for rows in (1, 2, 3, 8, 35):
        for at in (0, 517, depth - 1):
            w, x = weight(70, depth, dtype), torch.randn(rows, depth)
            clean = cpu.linear(x, [stored(w)])
            x[rows - 1, at] = bad
            y = cpu.linear(x, [stored(w)])
            assert torch.equal(y[:-1], clean[:-1])
            assert not y[-1].isfinite().any()
            assert y[-1].isnan().all() == math.isnan(bad)
            x[rows - 1, at] = 1.0
            clean = cpu.linear(x, [stored(w)])
            w[67, at] = bad
            y = cpu.linear(x, [stored(w)])
            others = torch.arange(70) != 67
            assert torch.equal(y[:, others], clean[:, others])
            assert not y[:, 67].isfinite().any()


@needs_cpp
def test_special_weights(stored: Stored) -> None:
    """Largest and smallest numbers of the half-width types arrive as they are: subnormals, both zeros, infinities. Only the instruction for
    bf16 products takes subnormals for zeros."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype).float()
        w = bits.view(dtype).reshape(-1, 1)
        y = cpu.linear(torch.ones(1, 1), [stored(w)])[0]
        numbers = ~values.isnan()
        if stored is pack and dtype == torch.bfloat16 and cpu._cpu.isa() == "avx512bf16":
            values[values.abs() < torch.finfo(torch.float32).tiny] = 0
        assert torch.equal(y[numbers], values[numbers])
        assert y[~numbers].isnan().all()


@needs_cpp
@pytest.mark.parametrize("shape", [(768, 100), (2050, 37), (100, 333), (15, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, shape: tuple[int, int], stored: Stored) -> None:
    depth, columns = shape
    w, x = weight(columns, depth, dtype), torch.randn(300, depth)
    residual, bias = torch.randn(300, columns), torch.randn(columns)
    alone = torch.cat([cpu.linear(x[i : i + 1], [stored(w)], [bias], residual=residual[i : i + 1]) for i in range(300)])
    for rows in (2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 32, 73, 300):
        for start in sorted({0, 1, min(7, 300 - rows), 300 - rows}):
            if start + rows <= 300:
                some = slice(start, start + rows)
                assert torch.equal(cpu.linear(x[some], [stored(w)], [bias], residual=residual[some]), alone[some])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_has_the_same_bits_anywhere(dtype: torch.dtype, stored: Stored) -> None:
    """Whatever rows stand before and after a weight row, and wherever blocks of rows end."""
    w = weight(150, 1111, dtype)
    for rows in (1, 2, 3, 20):
        x = torch.randn(rows, 1111)
        whole = cpu.linear(x, [stored(w)])
        for start, end in ((0, 1), (1, 150), (3, 70), (149, 150), (64, 131), (5, 7)):
            assert torch.equal(cpu.linear(x, [stored(w[start:end])]), whole[:, start:end])
        pieces = [stored(piece) for piece in w.split([3, 61, 1, 64, 20, 1])]
        assert torch.equal(cpu.linear(x, pieces), whole)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, stored: Stored) -> None:
    w, x = [stored(weight(n, 1500, dtype)) for n in (300, 65)], torch.randn(160, 1500)
    results: dict[int, list[Tensor]] = {}
    for threads in (1, 2, 4):
        cpu._cpu.set_num_threads(threads)
        results[threads] = [cpu.linear(x[:rows], w) for rows in (1, 2, 5, 32, 160) for _ in range(2)]
    for threads in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[threads], strict=True))


def good() -> dict[str, Any]:
    return {"x": torch.ones(2, 8), "weights": [torch.ones(3, 8), torch.ones(4, 8)], "biases": [torch.ones(3), None]}


@needs_cpp
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": torch.ones(2, 8).double()}, TypeError, "x must be float32"),
        ({"x": torch.ones(8)}, ValueError, "x must be"),
        ({"x": torch.ones(2, 16)[:, ::2]}, ValueError, "x must be"),
        ({"x": torch.ones(2, 9)}, ValueError, "weights"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.ones(2, 8, device="meta")}, ValueError, "meta"),
        ({"weights": []}, ValueError, "weights must hold"),
        ({"weights": [torch.ones(3, 8), torch.ones(4, 8).half()]}, TypeError, "weights"),
        ({"weights": [torch.ones(3, 8).double()] * 2}, TypeError, "weights"),
        ({"weights": [torch.ones(8, 3).T, torch.ones(4, 8)]}, ValueError, "weights"),
        ({"weights": [torch.ones(3, 8), torch.ones(4, 9)]}, ValueError, "weights"),
        ({"weights": [torch.ones(3, 8), torch.ones(4, 8, device="meta")]}, ValueError, "weights"),
        ({"biases": [torch.ones(3)]}, ValueError, "biases"),
        ({"biases": [torch.ones(4), None]}, ValueError, "biases"),
        ({"biases": [torch.ones(3).half(), None]}, TypeError, "biases"),
        ({"biases": [torch.ones(6)[::2], None]}, ValueError, "biases"),
        ({"residual": torch.ones(2, 8)}, ValueError, "residual"),
        ({"residual": torch.ones(2, 7).bfloat16()}, TypeError, "residual"),
        ({"out": torch.ones(7, 2).T}, ValueError, "out"),
        ({"out": torch.ones(2, 7, device="meta")}, ValueError, "out"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], named: str) -> None:
    assert cpu.linear(**good()).shape == (2, 7)
    with pytest.raises(error, match=named):
        cpu.linear(**(good() | change))


@needs_cpp
def test_too_many_weights() -> None:
    assert cpu.linear(torch.ones(1, 8), [torch.ones(1, 8)] * 16).shape == (1, 16)
    with pytest.raises(ValueError, match="at most 16"):
        cpu.linear(torch.ones(1, 8), [torch.ones(1, 8)] * 17)


@needs_cpp
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vnni"])
def test_other_instruction_sets(isa: str) -> None:
    """The arithmetic tests of this file under each instruction set; one that this CPU lacks is refused with the reason."""
    environment = {**os.environ, "ENGINE_CPU_ISA": isa}
    if isa not in cpu._cpu.supported_isas():
        code = "from engine.kernels import cpu; print(cpu.unavailable('cpu'))"
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert f"ENGINE_CPU_ISA is '{isa}'" in result.stdout, result.stdout + result.stderr
        return
    chosen = "(against_float64 and (100 or 1025)) or several or strides or hostile or special or same_bits or threads"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
