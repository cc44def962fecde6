"""Packing: the documented order element by element, the way back, the rounding of int8 and int4; embed over packed tables."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import kernels
from engine.kernels import PackedWeight, cpu, pack, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (31, 2), (32, 3), (33, 4), (64, 31), (5, 32), (70, 33), (100, 130)]
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def element(packed: PackedWeight, n: int, k: int) -> float:
    """W[n, k], found by the words of the module's docstring."""
    data, p, i = packed.data, n // 32, n % 32
    if packed.format == "bfloat16":
        return float(data[p, k // 2, i, k % 2])
    if packed.format == "int8":
        assert packed.scale is not None
        return (int(data[p, k // 4, i, k % 4]) - 128) * float(packed.scale[n])
    if packed.format == "int4":
        group = data[p, k // 32]
        nibbles, scales = group[:512].view(2, 4, 16, 4), group[512:].view(torch.float16)
        byte = int(nibbles[i // 16, k % 16 // 4, i % 16, k % 4])
        return ((byte & 15 if k % 32 < 16 else byte >> 4) - 8) * float(scales[i])
    return float(data[p, k, i])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", kernels.packed.FORMATS)
def test_order(format: str, shape: tuple[int, int]) -> None:
    n, k = shape
    weight = torch.randn(n, k).to(getattr(torch, format) if format in ("float32", "bfloat16", "float16") else torch.float32)
    packed = pack(weight, format)
    assert (packed.format, packed.shape) == (format, shape) and packed.data.is_contiguous()
    dense = packed.dense()
    assert dense.shape == shape
    if format not in ("int8", "int4"):
        assert torch.equal(dense, weight)
    for i, j in {(0, 0), (n - 1, k - 1), (n // 2, k // 3), (n // 3, k // 2), (0, k - 1), (n - 1, 0)}:
        assert element(packed, i, j) == pytest.approx(float(dense[i, j]), rel=1e-6), (i, j)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_zero(dtype: torch.dtype) -> None:
    for format in (None, "int8", "int4"):
        packed = pack(torch.randn(33, 37).to(dtype), format)
        whole = PackedWeight(packed.data, packed.scale, packed.format, (64, 40 if format != "int4" else 64))
        if format is None:
            whole = PackedWeight(packed.data, None, packed.format, (64, 38 if dtype is torch.bfloat16 else 37))
        dense = whole.dense()
        assert not dense[33:].any() and not dense[:, 37:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rounds_to_nearest(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 77).to(dtype) * torch.logspace(-6, 3, 50)[:, None].to(dtype)
    weight[7] = 0
    packed = pack(weight, "int8")
    assert packed.scale is not None
    scale = weight.float().abs().amax(1) / 127
    assert torch.equal(packed.scale[:50], scale)
    assert ((packed.dense() - weight.float()).abs() <= 0.5001 * scale[:, None]).all()
    assert torch.equal(packed.dense()[7], torch.zeros(77))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_rounds_to_nearest(dtype: torch.dtype) -> None:
    weight = (torch.randn(40, 96) * torch.logspace(-2, 2, 40)[:, None]).to(dtype)
    weight[3, 32:64] = 0
    dense = pack(weight, "int4").dense()
    groups, found = weight.float().view(40, 3, 32), dense.view(40, 3, 32)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    # Half a step; a whole one for values of the other sign near +8 steps, where the range ends at 7.
    step = extreme.abs() / 8
    bound = torch.where(groups * extreme < 0, 1.0, 0.5) * step * 1.001 + step * 8 * 2**-11
    assert ((found - groups).abs() <= bound).all()
    assert torch.equal(found[3, 1], torch.zeros(32))
    near = pack(torch.eye(32) * -8.0, "int4").dense()
    assert torch.equal(near, torch.eye(32) * -8.0)


def test_bytes() -> None:
    weight = torch.randn(64, 128)
    sizes = {f: pack(weight.to(getattr(torch, f, torch.float32)) if f[0] != "i" else weight, f).nbytes for f in kernels.packed.FORMATS}
    assert sizes == {"float32": 32768, "float16": 16384, "bfloat16": 16384, "int8": 8192 + 256, "int4": 4096 + 512}


@pytest.mark.parametrize(
    ("weight", "format", "error", "named"),
    [
        (torch.ones(3, 4).double(), None, TypeError, "weight must be .* got torch.float64"),
        (torch.ones(3), None, TypeError, "weight must be"),
        (torch.ones(3, 4), "int3", ValueError, "format is 'int3'"),
        (torch.ones(3, 4), "bfloat16", ValueError, "format is 'bfloat16'"),
        (torch.full((3, 4), math.inf), "int8", ValueError, "not finite, which int8 cannot"),
        (torch.full((3, 4), math.nan), "int4", ValueError, "not finite, which int4 cannot"),
        (torch.zeros(0, 5), None, ValueError, "at least one output"),
        (torch.full((3, 4), 6e5), "int4", ValueError, "weight holds 600000, and int4 takes at most 524032"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, format: str | None, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        pack(weight, format)


@pytest.mark.parametrize("format", kernels.packed.FORMATS)
@pytest.mark.parametrize("ops", [reference, pytest.param(cpu, marks=needs_cpp)])
def test_embed(ops: Any, format: str) -> None:
    for n, k in SHAPES:
        weight = torch.randn(n, k).to(getattr(torch, format) if format[0] != "i" else torch.float32)
        table = pack(weight, format)
        tokens = torch.tensor([0, n - 1, n // 2, n - 1], dtype=torch.int32)
        assert torch.equal(ops.embed(tokens, table), table.dense()[tokens.long()].float())
        with pytest.raises(ValueError, match="tokens"):
            ops.embed(torch.tensor([n], dtype=torch.int32), table)


@needs_cpp
def test_kinds_do_not_mix() -> None:
    weight = torch.ones(3, 8)
    for other in (weight, pack(weight, "int8"), pack(weight.half())):
        with pytest.raises(TypeError, match="must be of one kind with weights"):
            cpu.linear(torch.ones(1, 8), [pack(weight), other])
    with pytest.raises(TypeError, match="got a single one"):
        cpu.linear(torch.ones(1, 8), pack(weight))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="K = 9"):
        cpu.linear(torch.ones(1, 9), [pack(weight)])
    # beside packed weights a bias may be of any float type
    for dtype in DTYPES:
        assert torch.equal(cpu.linear(torch.ones(1, 8), [pack(weight)], [torch.ones(3).to(dtype)]), torch.full((1, 3), 9.0))


BITS = """
import hashlib, torch
from engine.kernels import cpu, pack
torch.manual_seed(0)
for format in ("float32", "bfloat16", "float16", "int8", "int4"):
    digest = hashlib.sha256()
    for n, k in ((1, 1), (33, 100), (100, 1030)):
        weight = torch.randn(n, k)
        packed = pack(weight if format[0] == "i" else weight.to(getattr(torch, format)), format)
        for rows in (1, 5, 12, 29):
            digest.update(cpu.linear(torch.randn(rows, k), [packed]).numpy().tobytes())
    print(format, digest.hexdigest())
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit() -> None:
    """Panels of floats wherever there is a fused multiply-add; integers everywhere."""
    found: dict[str, dict[str, str]] = {}
    for isa in cpu._cpu.supported_isas():
        run = subprocess.run(
            [sys.executable, "-c", BITS], env={**os.environ, "ENGINE_CPU_ISA": isa}, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        found[isa] = dict(line.split() for line in run.stdout.splitlines())
    empty = hashlib.sha256().hexdigest()
    for format in kernels.packed.FORMATS:
        isas = [isa for isa in found if isa != "portable" or format in ("int8", "int4")]
        digests = {found[isa][format] for isa in isas}
        assert len(digests) <= 1 and empty not in digests, format
