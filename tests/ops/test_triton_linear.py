"""``linear`` on a GPU: Triton's kernels in the interpreter against the oracle, their compiled products, and on a GPU if there is one
(``test_triton_compile`` compiles); and cuBLAS's, of the backend ``fast``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from interpreted import Interpreted
from torch import Tensor

from engine.kernels import QuantizedWeight, fast, pack, quantize, quantized, reference, select
from engine.kernels import triton as backend

pytest.importorskip("triton")

GROUPS = ("shapes", "mixed_dtypes", "empty", "batches", "strides_and_neighbours", "bounds", "hostile", "every_code", "embeddings")
INTERPRETED = Interpreted("ops/triton_linear_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_computes_the_oracles_products(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


# ---- how the work is cut ----


@pytest.mark.parametrize("format", ["float", *quantized.FORMATS])
@pytest.mark.parametrize("depth", [0, 1, 31, 64, 255, 256, 300, 1000, 4096, 14336])
@pytest.mark.parametrize("width", [0, 1, 1024, 6144, 28672, 262144])
def test_segments_cover_all_of_k(width: int, depth: int, format: str) -> None:
    from engine.kernels.triton import linear_launch

    for dtype in (torch.float32, torch.bfloat16):
        cut = linear_launch.tiling(width, depth, format, dtype)
        assert cut.segment_depth % cut.block_k == 0
        assert (cut.segments - 1) * cut.segment_depth <= max(0, depth - 1) and cut.segments * cut.segment_depth >= depth


def test_few_outputs_are_shared_among_many_programs() -> None:
    """Of the matrices of a Llama 3 8B, decoding one token."""
    from engine.kernels.triton import linear_launch

    for width, depth in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
        cut = linear_launch.tiling(width, depth, "float", torch.bfloat16)
        assert width // cut.block_n * cut.segments >= 128


@pytest.mark.parametrize("architecture", [80, 90])
def test_one_row_and_many_are_multiplied_by_one_instruction(architecture: int) -> None:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget

    from engine.kernels.triton import cases_linear
    from engine.kernels.triton import compile as module

    found = []
    for name in ("linear: bf16, split", "linear: bf16, walked"):
        (launches,) = (launches for variant, launches in cases_linear.cases() if variant == name)
        kernel, _, arguments = next(iter(launches))
        options = {option: arguments[option] for option in module.OPTIONS if option in arguments}
        ptx = compile_kernel(module._source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
        found.append(set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\.\S+", ptx)))
        assert "cp.async.cg" in ptx  # 16 bytes at a time, ahead of their use
    assert found[0] == found[1] and len(found[0]) == 1


# ---- arguments ----


def test_what_cannot_run_is_refused() -> None:
    x, w = torch.ones(2, 8), torch.ones(3, 8)
    with pytest.raises(ValueError, match="x is on cpu; these kernels run on cuda"):
        backend.linear(x, [w])
    with pytest.raises(TypeError, match=r"weights\[1\] must be of one kind with weights\[0\], quantised int8, got quantised int4"):
        reference.linear(x, [quantize(w, "int8"), quantize(w, "int4")])
    with pytest.raises(ValueError, match=r"weights\[0\] is on cpu while the first argument is on meta"):
        backend.linear(x.to("meta"), [pack(w)])


def test_fast_is_for_gpus() -> None:
    assert fast.unavailable("cpu") == "these ops run on cuda, not on cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_products_are_put_together_right(dtype: torch.dtype) -> None:
    """Which columns and what is added: torch computes these on a CPU too where the result has the dtype of x."""
    torch.manual_seed(0)
    x, weights = torch.randn(5, 40).to(dtype), [torch.randn(n, 40, requires_grad=True).to(dtype) for n in (7, 3, 4)]
    biases = [torch.randn(7).to(dtype), None, torch.randn(4)]
    error = 1e-5 if dtype == torch.float32 else 0.1
    for given in (None, biases):
        y, expected = fast.linear(x, weights, given), reference.linear(x, weights, given)
        assert y.dtype == dtype and (y.float() - expected.float()).abs().max() < error
        if dtype == torch.float32:
            residual = torch.randn(5, 14)
            expected = reference.linear(x, weights, given, residual=residual)
            assert (fast.linear(x, weights, given, residual=residual) - expected).abs().max() < error
            assert fast.linear(x, weights, given, residual=residual, out=residual) is residual
            assert (residual - expected).abs().max() < error
    for m, n, k in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        y = fast.linear(torch.ones(m, k), [torch.ones(n, k)], [torch.full((n,), 5.0)])
        assert torch.equal(y, torch.full((m, n), 5.0) + k * (m * n > 0))


# ---- on a GPU ----


def _error(y: Tensor, x: Tensor, weights: list[Any]) -> float:
    """The largest error of an output, of the sum of its terms' sizes."""
    dense = [w if isinstance(w, Tensor) else w.dense().to(x.dtype) if w.format == "int4" else w.dense() for w in weights]
    joined = torch.cat(dense).double()
    return float(((y.double() - x.double() @ joined.T).abs() / (x.double().abs() @ joined.abs().T)).max())


def _weights(counts: tuple[int, ...], k: int, dtype: torch.dtype, format: str) -> list[Any]:
    weights = [torch.randn(n, k, device="cuda").to(dtype) for n in counts]
    return weights if format == "float" else [quantize(w, format) for w in weights]


class TestOnGpu:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

    @pytest.mark.parametrize("format", ["float", *quantized.FORMATS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [((4096, 1024, 1024), 4096), ((4096,), 14336), ((28672,), 1024), ((5001, 7), 4099), ((33,), 50)])
    def test_rows_have_one_result_in_every_batch(self, shape: tuple[tuple[int, ...], int], dtype: torch.dtype, format: str) -> None:
        """Few rows, whose segments have programs of their own, many rows, and rows that are not aligned; and the result is right."""
        torch.manual_seed(0)
        counts, k = shape
        weights, count = _weights(counts, k, dtype, format), 1000
        x = torch.randn(count, k, device="cuda").to(dtype)
        whole = backend.linear(x, weights, out=torch.empty(count, sum(counts), device="cuda"))
        assert _error(whole, x, weights) < 2e-6
        for a, b in ((0, 1), (1, 8), (63, 127), (300, 365), (500, 700), (999, 1000)):
            some = backend.linear(x[a:b], weights, out=torch.empty(b - a, sum(counts), device="cuda"))
            assert torch.equal(some, whole[a:b]), (a, b)
        apart = torch.empty(7, k + 3, dtype=dtype, device="cuda")[:, 1 : k + 1].copy_(x[:7])
        assert torch.equal(backend.linear(apart, weights, out=torch.empty(7, sum(counts), device="cuda")), whole[:7])

    @pytest.mark.parametrize("format", ["float", *quantized.FORMATS])
    def test_quantised_products_are_the_oracles(self, format: str) -> None:
        torch.manual_seed(0)
        weights = _weights((70, 33), 1000, torch.bfloat16, format)
        x, residual = torch.randn(9, 1000, device="cuda").bfloat16(), torch.randn(9, 103, device="cuda")
        y = backend.linear(x, weights, residual=residual)
        expected = reference.linear(x, weights, residual=residual)
        assert (y - expected).norm() < 1e-5 * expected.norm()

    def test_hostile_values_stay_in_their_row(self) -> None:
        x, weights = torch.randn(70, 600, device="cuda").bfloat16(), _weights((300,), 600, torch.bfloat16, "float")
        clean = backend.linear(x, weights)
        x[69, 599] = float("nan")
        y = backend.linear(x, weights)
        assert torch.equal(y[:69], clean[:69]) and y[69].isnan().all()

    @pytest.mark.parametrize("op", [backend, fast])
    @pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
    def test_a_captured_graph_replays_other_rows_without_a_sync(self, op: Any, out_dtype: torch.dtype) -> None:
        weights = _weights((4096, 1024, 1024), 4096, torch.bfloat16, "float")
        biases = [torch.randn(n, device="cuda").bfloat16() for n in (4096, 1024, 1024)]
        x = torch.randn(3, 4096, device="cuda").bfloat16()
        out = torch.empty(3, 6144, dtype=out_dtype, device="cuda")
        op.linear(x, weights, biases, out=out)  # compiles, and cuBLAS makes its workspace
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            op.linear(x, weights, biases, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            op.linear(x, weights, biases, out=out)
        for seed in range(2):
            x.copy_(torch.randn(3, 4096, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            expected = reference.linear(x, weights, biases, out=torch.empty(3, 6144, device="cuda"))
            assert (out.float() - expected).norm() < (1e-2 if out_dtype == torch.bfloat16 else 1e-5) * expected.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_fast_products(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        weights, count = _weights((4096, 1000, 7), 512, dtype, "float"), 5103
        biases = [None, torch.randn(1000, device="cuda").to(dtype), torch.randn(7, device="cuda")]
        for m in (1, 5, 64, 300):
            x, residual = torch.randn(m, 512, device="cuda").to(dtype), torch.randn(m, count, device="cuda")
            expected = reference.linear(x, weights, biases, residual=residual)
            for y in (fast.linear(x, weights, biases, residual=residual), fast.linear(x, weights, biases, residual=residual, out=residual)):
                assert y.dtype == torch.float32 and (y - expected).norm() < 1e-5 * expected.norm()
            expected = reference.linear(x, weights, biases, out=torch.empty(m, count, device="cuda"))
            y = fast.linear(x, weights, biases, out=torch.empty(m, count, device="cuda"))
            assert (y - expected).norm() < 1e-5 * expected.norm()
            y = fast.linear(x, weights, biases)
            assert y.dtype == dtype and (y.float() - expected).norm() < 1e-2 * expected.norm()

    def test_fast_products_write_their_columns_without_a_copy(self) -> None:
        weights = _weights((4096, 1024, 1024), 4096, torch.bfloat16, "float")
        x, out = torch.randn(8, 4096, device="cuda").bfloat16(), torch.empty(8, 6144, dtype=torch.bfloat16, device="cuda")
        residual = torch.randn(8, 6144, device="cuda")
        for given in ({"out": out}, {"residual": residual, "out": residual}):
            fast.linear(x, weights, **given)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            fast.linear(x, weights, **given)
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_who_serves(self) -> None:
        assert select("cuda").chosen["linear"] == "fast"
        assert select("cuda", deterministic=True).chosen["linear"] == "triton"
        x, (w,) = torch.randn(3, 64, device="cuda").bfloat16(), _weights((9,), 64, torch.bfloat16, "int8")
        assert isinstance(w, QuantizedWeight) and torch.equal(fast.linear(x, [w]), backend.linear(x, [w]))
