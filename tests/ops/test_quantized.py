"""Weights quantised for GPUs: the documented order element by element, the rounding, what is refused."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import QuantizedWeight, cpu, pack, quantize, quantized, reference

SHAPES = [(1, 1), (3, 31), (2, 32), (5, 33), (4, 64), (7, 65), (70, 130)]
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


def element(w: QuantizedWeight, n: int, k: int) -> float:
    """W[n, k], found by the words of the module's docstring."""
    if w.format != "int4":
        return float(w.data[n, k]) * float(w.scale[n])
    byte = int(w.data[k // 64, n, k % 32])
    return ((byte & 15 if k % 64 < 32 else byte >> 4) - 8) * float(w.scale[k // 64, n, k // 32 % 2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", quantized.FORMATS)
def test_order(format: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    w = quantize(weight, format)
    assert (w.format, w.shape) == (format, shape) and w.data.is_contiguous() and w.scale.is_contiguous()
    dense = w.dense()
    assert dense.shape == shape and dense.dtype == torch.float32
    for n in range(shape[0]):
        for k in {0, shape[1] - 1, shape[1] // 2, shape[1] // 3}:
            assert element(w, n, k) == pytest.approx(float(dense[n, k]), rel=1e-6)
    past = w.data.view(torch.int8)[:, shape[1] :] if format != "int4" else torch.zeros(0)
    assert not past.any()
    assert (dense - weight).norm() < {"int8": 0.01, "int4": 0.12, "fp8": 0.04}[format] * weight.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_those_of_the_cpus_format(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 130).to(dtype)
    weight[3] = 0
    weight[5, 7] = 100
    for format in ("int8", "int4"):
        assert torch.equal(quantize(weight, format).dense(), pack(weight, format).dense())


def test_fp8_takes_the_nearest_number_ties_to_even() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].unique()
    assert len(numbers) == 253  # of 254 two are zeros
    between = (numbers[1:] + numbers[:-1]) / 2
    weight = torch.cat([numbers, between, between * 1.001]).view(1, -1)  # the largest is 448, so the scale is 1
    w = quantize(weight, "fp8")
    assert w.scale.tolist() == [1.0]
    given = weight.clamp(-448, 448).T.double()
    distance = (given - numbers.double()).abs()
    assert torch.equal((w.dense().T.double() - given).abs()[:, 0], distance.amin(dim=1))
    ties = w.data[0, len(numbers) : len(numbers) + len(between)].view(torch.uint8)
    assert not (ties & 1).any()


def test_sizes() -> None:
    weight = torch.randn(256, 1024).bfloat16()
    sizes = {format: quantize(weight, format).nbytes / weight.numel() for format in quantized.FORMATS}
    assert sizes == {"int8": 1 + 4 / 1024, "fp8": 1 + 4 / 1024, "int4": 0.5 + 2 / 32}


def test_embed_and_linear_of_the_oracle() -> None:
    torch.manual_seed(0)
    weight, tokens = torch.randn(9, 70).bfloat16(), torch.tensor([8, 0, 3], dtype=torch.int32)
    for format in quantized.FORMATS:
        w = quantize(weight, format)
        assert torch.equal(reference.embed(tokens, w), w.dense()[tokens.long()])
        x = torch.randn(4, 70).bfloat16()
        dense = w.dense().bfloat16().float() if format == "int4" else w.dense()
        expected = x.float() @ dense.T
        assert torch.equal(reference.linear(x, [w], out=torch.empty(4, 9)), expected)
        assert torch.equal(reference.linear(x, [w]), expected.bfloat16())


def test_bad_weights() -> None:
    with pytest.raises(TypeError, match="weight must be .N, K. of float32, bfloat16 or float16, got torch.float64"):
        quantize(torch.ones(2, 2).double(), "int8")
    with pytest.raises(ValueError, match="format is 'packed'; it must be one of int8, int4, fp8"):
        quantize(torch.ones(2, 2), "packed")
    with pytest.raises(ValueError, match="at least one output and one input"):
        quantize(torch.ones(0, 2), "fp8")
    for format in quantized.FORMATS:
        for bad in (torch.inf, torch.nan):
            with pytest.raises(ValueError, match=f"not finite, which {format} cannot"):
                quantize(torch.tensor([[1.0, bad]]), format)
    with pytest.raises(ValueError, match="int4 takes at most 524032"):
        quantize(torch.tensor([[1.0, 1e6]]), "int4")
    zero = torch.zeros(2, 70)
    assert all(torch.equal(quantize(zero, format).dense(), zero) for format in quantized.FORMATS)


@needs_cpp
def test_the_cpus_kernels_refuse_them() -> None:
    w = quantize(torch.ones(3, 8), "int8")
    for call in (lambda: cpu.linear(torch.ones(2, 8), [w]), lambda: cpu.embed(torch.zeros(1, dtype=torch.int32), w)):
        with pytest.raises(TypeError, match=r"a matrix is quantised for a GPU .int8.; the C\+\+ kernels take tensors or kernels.pack"):
            call()
