"""embed, rms_norm, rope_append and silu_mul: both backends against float64, rows bit for bit independent, bad arguments refused."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from forward_cases import rope_case
from torch import Tensor

from engine import kernels
from engine.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 8, 15, 16, 31, 33, 63, 64, 65, 384, 1000)


def load(backend: str) -> Any:
    if (reason := kernels.backends("cpu")[backend]) is not None:
        pytest.skip(reason)
    if backend == "reference":
        return reference
    import engine.kernels.cpu

    return engine.kernels.cpu


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


@pytest.fixture
def cpu() -> Any:
    return load("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- embed ----


def check_embed(ops: Any) -> None:
    for dtype, width in itertools.product(DTYPES, WIDTHS):
        table = randn(50, width, dtype=dtype)
        for tokens in ([], [0], [49, 0, 7, 7], list(range(50)) * 9):
            ids = torch.tensor(tokens, dtype=torch.int32)
            out = ops.embed(ids, table)
            assert out.dtype == torch.float32 and torch.equal(out, table[ids.long()].float())


def test_embed(ops: Any) -> None:
    check_embed(ops)


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_embed_refuses_ids_outside_the_vocabulary(ops: Any, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens must hold values in \[0, 50\), got {bad} at .*2"):
        ops.embed(torch.tensor([1, 2, bad], dtype=torch.int32), randn(50, 8))


# ---- rms_norm ----


def check_rms_norm(ops: Any) -> None:
    for dtype, width in itertools.product(DTYPES, WIDTHS):
        weight = randn(width, dtype=dtype, seed=1)
        for rows, scale in ((0, 1.0), (1, 1e-4), (3, 1.0), (17, 1e4)):
            x = randn(rows, width, seed=2) * scale
            exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
            torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), exact.float(), rtol=2e-6, atol=1e-7)


def test_rms_norm(ops: Any) -> None:
    check_rms_norm(ops)


def test_rms_norm_of_zeros_and_bad_rows(ops: Any) -> None:
    x = randn(4, 40)
    x[1], x[2], x[3, 5] = 0.0, torch.inf, torch.nan
    out = ops.rms_norm(x, torch.ones(40), 1e-6)
    assert torch.equal(out[0], ops.rms_norm(x[:1], torch.ones(40), 1e-6)[0])
    assert torch.equal(out[1], torch.zeros(40)) and out[2:].isnan().all()


# ---- silu_mul ----


def check_silu_mul(ops: Any) -> None:
    for width in WIDTHS:
        for rows in (0, 1, 3, 17):
            x = randn(rows, 2 * width, seed=3) * 6
            gate, up = x.double().chunk(2, dim=-1)
            exact = gate * torch.sigmoid(gate) * up
            torch.testing.assert_close(ops.silu_mul(x), exact.float(), rtol=2e-6, atol=1e-30)
    # the whole range, where exp(-|g|) neither overflows nor is flushed
    gate = torch.linspace(-85, 85, 100_001)
    exact = gate.double() * torch.sigmoid(gate.double())
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    torch.testing.assert_close(ops.silu_mul(x)[0], exact.float(), rtol=1e-6, atol=0)


def test_silu_mul(ops: Any) -> None:
    check_silu_mul(ops)


def test_silu_mul_of_extremes(ops: Any) -> None:
    gate = torch.tensor([0.0, -0.0, 3e38, torch.inf, -1e4, -3e38, torch.nan, -torch.inf])
    out = ops.silu_mul(torch.cat((gate, torch.ones(8)))[None])[0]
    assert out[:6].tolist() == [0.0, 0.0, pytest.approx(3e38), torch.inf, 0.0, 0.0] and out[6:].isnan().all()


# ---- rope_append ----


def rope_cases() -> Iterator[dict[str, Any]]:
    shapes = [
        (1, 8, 8),
        (2, 16, 6),
        (5, 40, 40),
        (17, 48, 24),
        (33, 64, 64),
        (9, 80, 32),
        (40, 128, 128),
        (3, 256, 64),
        (4, 64, 0),
        (2, 24, 2),
    ]
    heads = itertools.cycle([(1, 1), (4, 4), (4, 1), (8, 2), (6, 3), (14, 2)])
    norms = itertools.cycle([None, torch.float32, torch.bfloat16, torch.float16])
    for (tokens, head_dim, rot), dtype, interleaved in itertools.product(shapes, DTYPES[:2], (False, True)):
        block_size = 32 if tokens % 2 else 16
        yield rope_case(
            tokens, next(heads), head_dim, rot, block_size=block_size, dtype=dtype, norm=next(norms), interleaved=interleaved
        )  # fmt: skip
    yield rope_case(0, (2, 1), 16, 16)
    yield rope_case(300, (8, 2), 64, 64)  # enough to share out over threads


def rope_exact(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as complex rotations in float64, token by token."""
    head_dim, num_kv_heads = case["value_cache"].shape[3], case["value_cache"].shape[1]
    heads = case["qkv"].double().unflatten(1, (-1, head_dim))
    q, k, v = heads.split((case["num_heads"], num_kv_heads, num_kv_heads), dim=1)
    if case["q_norm"] is not None:
        q, k = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + case["norm_eps"]) * w.double()
            for x, w in ((q, case["q_norm"]), (k, case["k_norm"]))
        )
    half = case["cos"].shape[1]
    turn = torch.complex(case["cos"].double(), case["sin"].double())[case["positions"].long()][:, None]
    first = torch.arange(half) * 2 if case["interleaved"] else torch.arange(half)
    second = first + 1 if case["interleaved"] else first + half
    results = []
    for x in (q, k):
        turned = torch.complex(x[..., first], x[..., second]) * turn
        y = x.clone()
        y[..., first], y[..., second] = turned.real, turned.imag
        results.append(y)
    return results[0], results[1], v


def check_rope_append(ops: Any) -> None:
    for case in rope_cases():
        key_cache, value_cache = case["key_cache"], case["value_cache"]
        q, k, v = rope_exact(case)
        out = ops.rope_append(**case)
        torch.testing.assert_close(out, q.float(), rtol=1e-5, atol=5e-6)
        rtol = 1e-5 if key_cache.dtype == torch.float32 else 2**-8
        block_size = value_cache.shape[2]
        written = torch.zeros(value_cache.shape[0] * block_size, dtype=torch.bool)
        for t, slot in enumerate(case["slots"].tolist()):
            if slot < 0:
                continue
            written[slot] = True
            block, offset = divmod(slot, block_size)
            torch.testing.assert_close(key_cache[block, :, offset // 16, :, offset % 16].float(), k[t].float(), rtol=rtol, atol=5e-6)
            assert torch.equal(value_cache[block, :, offset], v[t].float().to(value_cache.dtype))
        untouched = ~written.view(-1, block_size)
        assert value_cache.transpose(1, 2)[untouched].isnan().all()
        assert key_cache.permute(0, 2, 4, 1, 3).flatten(1, 2)[untouched].isnan().all()


def test_rope_append(ops: Any) -> None:
    check_rope_append(ops)


def test_bf16_keys_round_to_nearest_even(ops: Any) -> None:
    """A rotation by nothing leaves the values, so that what is stored is torch's own rounding of them, ties included."""
    case = rope_case(2, (1, 1), 8, 8, dtype=torch.bfloat16)
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, -0.0, torch.inf, torch.nan])
    case |= {"qkv": values.repeat(2, 3), "slots": torch.tensor([5, 9], dtype=torch.int32)}
    case["cos"], case["sin"] = torch.ones(60, 4), torch.zeros(60, 4)
    finite = values.isfinite()
    case["qkv"][:, 8:16][:, ~finite] = 0.0  # inf * 0 of the rotation is NaN
    ops.rope_append(**case)
    expected = values.bfloat16()
    assert torch.equal(case["key_cache"][0, 0, 0, finite, 5], expected[finite])
    stored = case["value_cache"][0, 0, 9]
    assert torch.equal(stored[:7], expected[:7]) and stored[7].isnan()


# ---- rows do not know of each other ----


def test_rows_are_independent(cpu: Any) -> None:
    """One row alone, and any row of a large call that is shared out over threads, have the same bits."""
    before = cpu._cpu.num_threads()
    try:
        for threads in (1, 2, 4):
            cpu._cpu.set_num_threads(threads)
            x = randn(300, 2 * 321, seed=5)
            weight = randn(642, dtype=torch.bfloat16)
            norm, silu = cpu.rms_norm(x, weight, 1e-6), cpu.silu_mul(x)
            case = rope_case(300, (8, 2), 64, 32, norm=torch.float32)
            key_cache, value_cache = case["key_cache"].clone(), case["value_cache"].clone()
            whole = cpu.rope_append(**case)
            for row in (0, 1, 17, 150, 299):
                assert torch.equal(cpu.rms_norm(x[row : row + 1], weight, 1e-6)[0], norm[row])
                assert torch.equal(cpu.silu_mul(x[row : row + 1])[0], silu[row])
            for first in range(0, 300, 7):
                part = slice(first, first + 7)
                alone = {name: case[name][part] for name in ("qkv", "positions", "slots")}
                out = cpu.rope_append(**{**case, **alone, "key_cache": key_cache, "value_cache": value_cache})
                assert torch.equal(out, whole[part])
            assert torch.equal(key_cache.view(torch.int32), case["key_cache"].view(torch.int32))
            assert torch.equal(value_cache.view(torch.int32), case["value_cache"].view(torch.int32))
    finally:
        cpu._cpu.set_num_threads(before)


def check_all() -> None:
    """Run in a process of its own by the next test."""
    import engine.kernels.cpu as cpu

    torch.set_num_threads(1)
    assert cpu._cpu.isa() == os.environ["ENGINE_CPU_ISA"]
    for check in (check_embed, check_rms_norm, check_silu_mul, check_rope_append):
        check(cpu)


@pytest.mark.parametrize("isa", ["portable", "avx512"])
def test_other_instruction_sets(cpu: Any, isa: str) -> None:
    if isa not in cpu._cpu.supported_isas():
        pytest.skip(f"this CPU does not run {isa}")
    result = subprocess.run([sys.executable, __file__], env={**os.environ, "ENGINE_CPU_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- bad arguments ----


def _rope(**changes: Any) -> Callable[[Any], Any]:
    def call(ops: Any) -> Any:
        case = rope_case(4, (2, 1), 16, 16)
        return ops.rope_append(**{**case, **{name: f(case[name]) if callable(f) else f for name, f in changes.items()}})

    return call


def _ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "embed ids": (lambda ops: ops.embed(torch.tensor([1]), randn(5, 8)), TypeError, "tokens must be int32, got torch.int64"),
    "embed shape": (lambda ops: ops.embed(_ids(1)[None], randn(5, 8)), ValueError, r"tokens must have shape \[T\], got \(1, 1\)"),
    "embed table": (lambda ops: ops.embed(_ids(1), randn(5, 8).double()), TypeError, "table must be .*, got torch.float64"),
    "embed strides": (lambda ops: ops.embed(_ids(1), randn(8, 5).T), ValueError, "table must be contiguous"),
    "norm dtype": (lambda ops: ops.rms_norm(randn(2, 8).bfloat16(), randn(8), 1e-6), TypeError, "x must be float32, got torch.bfl"),
    "norm shape": (lambda ops: ops.rms_norm(randn(8), randn(8), 1e-6), ValueError, r"x must have shape \[M, H\], got \(8,\)"),
    "norm weight": (lambda ops: ops.rms_norm(randn(2, 8), randn(9), 1e-6), ValueError, r"weight .* \(8,\), got \(9,\)"),
    "norm strides": (lambda ops: ops.rms_norm(randn(8, 2).T, randn(8), 1e-6), ValueError, "x must be contiguous"),
    "silu odd": (lambda ops: ops.silu_mul(randn(2, 7)), ValueError, r"x must have shape \[M, 2F\], got \(2, 7\)"),
    "silu strides": (lambda ops: ops.silu_mul(randn(2, 16)[:, ::2]), ValueError, "x must be contiguous"),
    "silu none": (lambda ops: ops.silu_mul(None), TypeError, "x must be a tensor, got NoneType"),
    "rope width": (_rope(qkv=lambda t: t[:, :-1].contiguous()), ValueError, r"qkv must have shape .* \(4, 64\), got \(4, 63\)"),
    "rope heads": (_rope(num_heads=0), ValueError, "num_heads must be a positive multiple of num_kv_heads = 1, got 0"),
    "rope positions dtype": (_rope(positions=lambda t: t.long()), TypeError, "positions must be int32"),
    "rope positions length": (_rope(positions=lambda t: t[:3]), ValueError, r"positions must have shape .* \(4,\), got \(3,\)"),
    "rope position high": (_rope(positions=_ids(1, 60, 2, 3)), ValueError, r"positions must hold values in \[0, 60\), got 60"),
    "rope position low": (_rope(positions=_ids(1, 2, -1, 3)), ValueError, r"positions must hold values in \[0, 60\), got -1"),
    "rope slot high": (_rope(slots=_ids(1, 2, 48, 3)), ValueError, r"slots must hold values in \[-1, 48\), got 48"),
    "rope slot low": (_rope(slots=_ids(1, 2, -2, 3)), ValueError, r"slots must hold values in \[-1, 48\), got -2"),
    "rope slots length": (_rope(slots=lambda t: t[:1]), ValueError, "slots must have shape"),
    "rope cos dtype": (_rope(cos=lambda t: t.double()), TypeError, "cos must be float32"),
    "rope too wide": (_rope(cos=lambda t: t.repeat(1, 2)), ValueError, r"cos .* rot <= head_dim = 16, got \(60, 16\)"),
    "rope sin": (_rope(sin=lambda t: t[:, :4].contiguous()), ValueError, r"sin .* \(60, 8\), got \(60, 4\)"),
    "rope one norm": (_rope(q_norm=torch.ones(16)), ValueError, "q_norm and k_norm must both be given"),
    "rope norm shape": (_rope(q_norm=torch.ones(8), k_norm=torch.ones(16)), ValueError, r"q_norm .* \(16,\), got \(8,\)"),
    "rope norm dtypes": (_rope(q_norm=torch.ones(16), k_norm=torch.ones(16).half()), TypeError, "k_norm must have the dtype of q_norm"),
    "rope cache dtype": (
        _rope(key_cache=lambda t: t.half()),
        TypeError,
        "key_cache must be .* or float8_e4m3fn, got torch.float16",
    ),
    "rope cache strides": (_rope(key_cache=lambda t: t.mT.contiguous().mT), ValueError, "key_cache must be contiguous"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(ops: Any, case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(ops)


def test_a_refused_rope_append_writes_nothing(ops: Any) -> None:
    case = rope_case(4, (2, 1), 16, 16) | {"slots": _ids(0, 1, 2, 48)}
    with pytest.raises(ValueError, match="slots"):
        ops.rope_append(**case)
    assert case["key_cache"].isnan().all() and case["value_cache"].isnan().all()


if __name__ == "__main__":
    check_all()
