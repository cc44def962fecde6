"""One small call of every GPU kernel, each against the oracle: what ``make gpu-sanitize`` runs under compute-sanitizer, which makes kernels
many times slower. The tests of the ops have the hard cases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_cases import make_batch
from block_cases import cases as block_cases
from forward_cases import rope_case, with_caches
from sample_cases import lists
from torch import Tensor
from verify_cases import call, chain

from engine.kernels import merge_draws, quantize, reference, select
from engine.kernels.quantized import FORMATS
from engine.kernels.registry import BACKENDS, backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU_BACKENDS = [name for name in BACKENDS if name not in ("cpu", "reference")]


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {name: on_gpu(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(on_gpu, value)) if hasattr(value, "_fields") else tuple(map(on_gpu, value))
    return value


def op(backend: str, name: str) -> Callable[..., Any]:
    """The op of a backend, or a skip where it cannot run."""
    if reason := backends("cuda")[backend]:
        pytest.skip(reason)
    ops = select("cuda", backend)
    assert ops.chosen[name] == backend
    return getattr(ops, name)


def having(name: str) -> list[str]:
    """The backends of a GPU that have an op."""
    return [backend for backend in GPU_BACKENDS if hasattr(importlib.import_module(f"engine.kernels.{backend}"), name)]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def near(got: Tensor, expected: Tensor, error: float = 0.02) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert (got.cpu().float() - expected.float()).norm() <= error * expected.float().norm()


def same(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a.cpu(), b)


@pytest.mark.parametrize("backend", having("linear"))
@pytest.mark.parametrize("format", ["float", *FORMATS])
def test_linear(backend: str, format: str) -> None:
    linear = op(backend, "linear")
    for rows in (1, 3, 70):
        x, dense, residual = randn(rows, 600), [randn(33, 600), randn(20, 600)], randn(rows, 53, dtype=torch.float32)
        weights: list[Any] = dense if format == "float" else [quantize(w, format) for w in dense]
        there = [w.cuda() if format == "float" else quantize(w.cuda(), format) for w in dense]
        near(linear(x.cuda(), there, residual=residual.cuda()), reference.linear(x, weights, residual=residual))


@pytest.mark.parametrize("backend", having("paged_attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_paged_attention(backend: str, dtype: torch.dtype) -> None:
    """One program for all splits and one for each; few queries and many."""
    attend = op(backend, "paged_attention")
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    for contexts, queries in (((1, 17, 33), (1, 8, 2)), ((600, 3), (1, 1)), ((90,), (90,))):
        batch = make_batch(contexts, queries, (4, 2), 32, dtype=dtype)
        batch.q = batch.q.bfloat16()
        step = (batch.q, batch.key_cache, batch.value_cache, batch.block_table, batch.query_start, batch.context_len)
        near(attend(*on_gpu(step), scale=batch.scale), reference.paged_attention(*step, scale=batch.scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_what_writes_the_cache(dtype: torch.dtype) -> None:
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    case = with_caches(rope_case(20, (4, 2), 32, 16, norm=torch.bfloat16), dtype)
    case["qkv"] = case["qkv"].bfloat16()
    there = on_gpu(case)
    near(op("triton", "rope_append")(**there), reference.rope_append(**case))
    caches = [there[name][None] for name in ("key_cache", "value_cache")]
    expected = [cache.cpu() for cache in caches]
    for name, source, target in (("move_tokens", ids(0, 5, 17), ids(5, 2, 0)), ("copy_blocks", ids(0), ids(1))):
        op("triton", name)(*caches, source.cuda(), target.cuda())
        getattr(reference, name)(*expected, source, target)
    for got, want in zip(caches, expected, strict=True):
        assert torch.equal(got.cpu().view(torch.int8), want.view(torch.int8))


def test_rows() -> None:
    x, weight, gates = randn(3, 100, dtype=torch.float32), randn(100), randn(3, 200)
    near(op("triton", "rms_norm")(x.cuda(), weight.cuda(), 1e-5, torch.bfloat16), reference.rms_norm(x, weight, 1e-5, torch.bfloat16))
    near(op("triton", "silu_mul")(gates.cuda()), reference.silu_mul(gates))
    table = randn(50, 100)
    assert torch.equal(op("triton", "embed")(ids(3, 49).cuda(), table.cuda()).cpu(), reference.embed(ids(3, 49), table))
    tokens = ids(1, 2, 3).cuda()
    op("triton", "feed_tokens")(tokens, ids(-1, 1, 0).cuda(), torch.tensor([7, 8]).cuda())
    assert tokens.tolist() == [1, 8, 7]


def law(rows: int) -> dict[str, Tensor]:
    """Every filter in some row."""
    each = torch.arange(rows)
    return {
        "temperature": torch.tensor([0.0, 1.0, 0.7])[each % 3], "top_k": (each % 4 * 20).int(), "top_p": torch.tensor([1.0, 0.8])[each % 2],
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.02])[each % 4], "seed": each, "position": each.int() + 5, "stream": each.int(),
    }  # fmt: skip


@pytest.mark.parametrize("backend", having("sample"))
@pytest.mark.parametrize("with_lists", [False, True])
def test_sample(backend: str, with_lists: bool) -> None:
    sample = op(backend, "sample")
    rows, vocab = 8, 5003
    given: dict[str, Any] = law(rows)
    if with_lists:
        given |= lists(rows, vocab, torch.Generator().manual_seed(0))
    logits = randn(rows, vocab, dtype=torch.float32) * 3
    got, expected = sample(logits.cuda(), **on_gpu(given), logprobs=3), reference.sample(logits, **given, logprobs=3)
    assert torch.equal(got.tokens.cpu(), expected.tokens) and torch.equal(got.status.cpu(), expected.status)


def test_sample_head() -> None:
    x, head, given = randn(5, 300), randn(2003, 300) / 10, law(5)
    given = {name: given[name] for name in ("temperature", "seed", "position", "stream")}
    logits = op("triton", "linear")(x.cuda(), [head.cuda()], out=torch.empty(5, 2003, device="cuda")).cpu()
    off = {"top_k": torch.zeros(5, dtype=torch.int32), "top_p": torch.ones(5), "min_p": torch.zeros(5)}
    got = merge_draws([op("triton", "sample_head")(x.cuda(), head.cuda(), **on_gpu(given))])
    assert torch.equal(got.tokens.cpu(), reference.sample(logits, **given, **off).tokens)


@pytest.mark.parametrize("backend", having("beam_select"))
def test_beam_select(backend: str) -> None:
    select_ = op(backend, "beam_select")
    logits, n = randn(5, 3001, dtype=torch.float32) * 3, 5
    step = (torch.linspace(-3, 0, n), ids(0, 2, 5), 6, torch.ones(n), ids(0, 50, 0, 0, 9), ids(*range(n)))
    got, expected = select_(logits.cuda(), *on_gpu(step)), reference.beam_select(logits, *step)
    assert torch.equal(got.tokens.cpu(), expected.tokens) and torch.equal(got.parents.cpu(), expected.parents)


def test_verification() -> None:
    given = call([chain([5, 6, 7], [5, 9]), chain([1], []), chain([2, 3, 4, 5], [2, 3, 4])])
    got, expected = op("triton", "verify_drafts")(**on_gpu(given)), reference.verify_drafts(**given)
    same(got, expected)
    _, given = next(block_cases())
    same(op("triton", "verify_block")(**on_gpu(given)), reference.verify_block(**given))


def test_masses() -> None:
    given = law(6)
    del given["seed"], given["stream"]
    logits = randn(6, 3001, dtype=torch.float32) * 3
    same(op("triton", "masses")(logits.cuda(), **on_gpu(given)), reference.masses(logits, **given))
