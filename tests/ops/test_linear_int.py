"""``linear`` with int8 and int4 weights: bit for bit what the oracle says, under every way of calling it and on every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import PackedWeight, cpu, pack, reference
from engine.kernels.packed import ACTIVATION_GROUP, INT4_GROUP
from engine.kernels.reference_linear import TINY, quantise_rows

needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))
FORMATS = ["int8", "int4"]
ROWS = [*range(1, 34), 130]
COLUMNS = [1, 31, 32, 33, 100]
DEPTHS = [1, 2, 3, 4, 31, 32, 33, 127, 128, 129, 768, 1000, 2050]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The oracle's products are too small to share out among PyTorch's threads; and leave the pool as it was."""
    torch.manual_seed(0)
    torch_threads = torch.get_num_threads()
    threads = None if cpu.unavailable("cpu") else cpu._cpu.num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    if threads is not None:
        cpu._cpu.set_num_threads(threads)


def weight(n: int, k: int, format: str) -> PackedWeight:
    return pack(torch.randn(n, k), format)


def assert_same(a: Tensor, b: Tensor) -> None:
    """The same numbers, or NaN in the same places."""
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num())


@needs_cpp
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_oracle(format: str, depth: int) -> None:
    x = torch.randn(max(ROWS), depth) * torch.rand(max(ROWS), 1).exp2()
    for columns in COLUMNS:
        w = weight(columns, depth, format)
        expected = reference.linear(x, [w])
        for rows in ROWS:
            assert torch.equal(cpu.linear(x[:rows], [w]), expected[:rows]), (columns, rows)


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_several_weights_biases_and_residual(format: str) -> None:
    depth, sizes = 203, (5, 64, 1, 130)
    weights = [weight(n, depth, format) for n in sizes]
    biases = [torch.randn(5).bfloat16(), None, torch.randn(1), torch.randn(130).half()]
    for rows in (1, 3, 8, 100):
        x, residual = torch.randn(rows, 300)[:, 7 : 7 + depth], torch.randn(rows, sum(sizes))
        kept = residual.clone()
        expected = reference.linear(x, weights, biases, residual=residual)
        y = cpu.linear(x, weights, biases, residual=residual)
        assert torch.equal(y, expected)
        assert torch.equal(residual, kept)
        out = torch.full_like(residual, math.nan)
        assert cpu.linear(x, weights, biases, residual=residual, out=out) is out
        assert torch.equal(out, expected)
        assert cpu.linear(x, weights, biases, residual=residual, out=residual) is residual
        assert torch.equal(residual, expected)
        assert torch.equal(cpu.linear(x, weights, biases), reference.linear(x, weights, biases))
        row = x[:1].expand(rows, depth)  # row stride 0
        assert torch.equal(cpu.linear(row, weights), cpu.linear(x[:1], weights).expand(rows, sum(sizes)))


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_empty(format: str) -> None:
    w = weight(40, 70, format)
    assert cpu.linear(torch.ones(0, 70), [w]).shape == (0, 40)
    nothing = PackedWeight(w.data[:0], None if w.scale is None else w.scale[:0], format, (0, 70))
    assert cpu.linear(torch.ones(2, 70), [nothing]).shape == (2, 0)
    assert torch.equal(cpu.linear(torch.ones(2, 70), [nothing, w, nothing]), cpu.linear(torch.ones(2, 70), [w]))


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_every_batch(format: str) -> None:
    """More rows than one item takes, and more than are quantised at once."""
    w, x = weight(70, 300, format), torch.randn(900, 300)
    alone = torch.cat([cpu.linear(x[i : i + 1], [w]) for i in range(900)])
    for rows in (2, 13, 95, 96, 97, 193, 768, 769, 900):
        for start in sorted({0, 1, min(7, 900 - rows), 900 - rows}):
            if start + rows <= 900:
                assert torch.equal(cpu.linear(x[start : start + rows], [w]), alone[start : start + rows])


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_the_number_of_threads_changes_no_bit(format: str) -> None:
    w, x = [weight(n, 1500, format) for n in (300, 65)], torch.randn(230, 1500)
    results: dict[int, list[Tensor]] = {}
    for threads in (1, 2, 4):
        cpu._cpu.set_num_threads(threads)
        results[threads] = [cpu.linear(x[:rows], w) for rows in (1, 2, 5, 32, 230) for _ in range(2)]
    for threads in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[threads], strict=True))


@needs_cpp
@pytest.mark.parametrize("depth", [31, 128, 129, 1000])
@pytest.mark.parametrize("format", FORMATS)
def test_largest_sums(format: str, depth: int) -> None:
    """Every pair of signs of the largest integers, over whole groups: where sums of fewer bits than 32 would be full."""
    ones = torch.ones(depth)
    alternating = ones.clone()
    alternating[1::2] = -1
    pairs = ones.clone()
    pairs[2::4] = pairs[3::4] = -1
    signs = torch.stack([ones, -ones, alternating, -alternating, pairs, -pairs, torch.zeros(depth)])
    # int4: the sign of a group's first value decides which of -8 and 7 is the long side
    w = pack(torch.cat([signs, signs.flip(1), 0.875 * signs]), format)
    y = cpu.linear(signs, [w])
    assert torch.equal(y, reference.linear(signs, [w]))
    assert (y[0, 0] - depth).abs() < 1e-3 * depth
    assert (y[6] == 0).all() and (y[:, 6] == 0).all()


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_any_integers(format: str) -> None:
    """All stored values in random places, not only those that random weights have."""
    n, k = 64, 288
    w = weight(n, k, format)
    if format == "int8":
        w.data.random_(1, 256)
    else:
        w.data[..., :512].random_(0, 256)
    x = torch.randint(-127, 128, (40, k)).float()
    x[:, ::32] = 127
    assert torch.equal(cpu.linear(x, [w]), reference.linear(x, [w]))


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_x_rounds_to_the_nearest_even(format: str) -> None:
    """Where the scale of x is 1, x meets a unit matrix as x rounded."""
    x = torch.arange(-64, 64) / 2  # every other value is a tie
    x[0] = 127
    y = cpu.linear(x[None], [pack(torch.eye(128), format)])[0]
    assert (y - x.round()).abs().max() < 2e-5
    assert torch.equal(y.round(), x.round())


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_tiny_and_huge_groups(format: str) -> None:
    k = 3 * ACTIVATION_GROUP + 5
    w, x = weight(50, k, format), torch.randn(9, k)
    tiny, limit = torch.tensor(TINY), x.sign() * TINY
    x[0] = limit[0]
    x[1] = limit[1] * 0.999
    x[2, 128:256] = torch.nextafter(tiny, torch.tensor(0.0))
    x[3, 128:256] = 0
    x[4] *= 1e30
    x[5, 130] = torch.finfo(torch.float32).max
    x[6] = 1e-45
    x[7, 384:] = tiny
    x[8] = -0.0
    y = cpu.linear(x, [w])
    assert_same(y, reference.linear(x, [w]))
    assert (y[[1, 6, 8]] == 0).all()
    assert (y[0] != 0).all()
    assert y[:5].isfinite().all()
    without = x[3:4].clone()
    without[0, :128] = without[0, 256:] = 0
    assert (cpu.linear(without, [w]) == 0).all()


@needs_cpp
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("format", FORMATS)
def test_hostile_values_stay_in_their_row(format: str, bad: float) -> None:
    k = 270
    w = weight(70, k, format)
    for rows in (1, 2, 8, 35):
        for at in (0, 127, 128, k - 1):
            x = torch.randn(rows, k)
            clean = cpu.linear(x, [w])
            x[rows // 2, at] = bad
            y = cpu.linear(x, [w])
            assert y[rows // 2].isnan().all()
            others = torch.arange(rows) != rows // 2
            assert torch.equal(y[others], clean[others])


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_weights_of_zeros(format: str) -> None:
    dense = torch.randn(40, 200)
    dense[3] = 0
    dense[:, 32:64] = 0
    w, x = pack(dense, format), torch.randn(5, 200)
    x[:, 0] = 7  # the group's largest value, before and after
    y = cpu.linear(x, [w])
    assert torch.equal(y, reference.linear(x, [w]))
    assert (y[:, 3] == 0).all()
    x[:, 32:64] = torch.randn(5, 32)
    assert torch.equal(cpu.linear(x, [w]), y)


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_embed(format: str) -> None:
    for n, k in ((1, 1), (33, 3), (70, 64), (100, 130)):
        table = weight(n, k, format)
        tokens = torch.randint(0, n, (20,), dtype=torch.int32)
        tokens[0], tokens[1] = 0, n - 1
        assert torch.equal(cpu.embed(tokens, table), table.dense()[tokens.long()])


@needs_cpp
@pytest.mark.parametrize("format", FORMATS)
def test_error_of_rounding(format: str) -> None:
    """Against float64: a weight is off by at most half a step (int4: by one at the short end, which is 7), a product by half a step of
    each x times its weight, and by the rounding of float32 sums."""
    n, k = 90, 1000
    dense, x = torch.randn(n, k), torch.randn(17, k)
    w = pack(dense, format)
    rounded = w.dense().double()
    if format == "int8":
        step = (dense.abs().amax(1, keepdim=True) / 127).expand(n, k)
    else:
        padded = torch.nn.functional.pad(dense, (0, -k % INT4_GROUP)).view(n, -1, INT4_GROUP)
        step = (padded.abs().amax(2, keepdim=True) / 8).expand(padded.shape).reshape(n, -1)[:, :k]
    step = step.double() * 1.001  # the scale itself is rounded, to float16 in int4
    short_end = (dense.abs() > 7.4 * step) if format == "int4" else torch.zeros(n, k, dtype=torch.bool)
    assert ((rounded - dense).abs() <= torch.where(short_end, step, step / 2)).all()
    _, scale = quantise_rows(x)
    x_step = scale.double().repeat_interleave(ACTIVATION_GROUP, 1)[:, :k] * 1.00001
    bound = x_step / 2 @ rounded.abs().T + 1e-6 * (x.double().abs() @ rounded.abs().T)
    error = (cpu.linear(x, [w]).double() - x.double() @ rounded.T).abs()
    assert (error <= bound).all()
    assert error.max() > 0.001 * bound.max()  # else the bound says nothing
    exact = x.double() @ dense.double().T
    assert (cpu.linear(x, [w]).double() - exact).norm() <= (0.02 if format == "int8" else 0.15) * exact.norm()


@needs_cpp
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vnni"])
def test_other_instruction_sets(isa: str) -> None:
    """This file under each instruction set; one that this CPU lacks is refused with the reason."""
    environment = {**os.environ, "ENGINE_CPU_ISA": isa}
    if isa not in cpu._cpu.supported_isas():
        code = "from engine.kernels import cpu; print(cpu.unavailable('cpu'))"
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert f"ENGINE_CPU_ISA is '{isa}'" in result.stdout, result.stdout + result.stderr
        return
    chosen = "not other_instruction_sets"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
