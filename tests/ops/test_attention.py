"""paged_attention: both backends against dense float64, and the C++ one bit for bit under every way of calling it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from attention_cases import DTYPE_IDS, DTYPES, NAN, Batch, assert_close, int8_tokens, make_batch, only, put
from torch import Tensor

from engine import kernels
from engine.kernels import checks, reference

HEAD_DIMS: tuple[int, ...] = (8, 16, 32, 40, 48, 64, 80, 96, 128, 256)
HEADS = ((1, 1), (4, 4), (4, 1), (8, 2), (6, 3), (14, 2), (5, 1), (8, 1), (6, 1), (3, 1))
CONTEXTS: tuple[int, ...] = (1, 15, 16, 17, 31, 33, 511, 512, 513, 1100)
QUERIES: tuple[int, ...] = (1, 2, 7, 8, 1, 2, 64, 1, 8, 7)
WINDOWS = (0, 1, 16, 100)


@pytest.fixture
def cpu() -> Any:
    if (reason := kernels.backends("cpu")["cpu"]) is not None:
        pytest.skip(reason)
    import engine.kernels.cpu

    return engine.kernels.cpu


def oracle_cases() -> Iterator[Batch]:
    """Every head dimension with every head count; windows, block sizes and cache types take turns."""
    turns = itertools.cycle(itertools.product(WINDOWS, (16, 32), DTYPES))
    for head_dim, heads in itertools.product(HEAD_DIMS, HEADS):
        short = head_dim * heads[0] > 1024  # keep the float64 side quick
        for pick in (slice(6), slice(6, None)):
            queries = [min(q, 8) if short else q for q in QUERIES[pick]]
            window, block_size, dtype = next(turns)
            yield make_batch(
                CONTEXTS[pick], [min(q, c) for q, c in zip(queries, CONTEXTS[pick], strict=True)], heads, head_dim,
                block_size=block_size, dtype=dtype, window=window, seed=head_dim,
            )  # fmt: skip
        next(turns)  # an odd step, so that the turns differ from one head count to the next


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_matches_dense_float64(backend: str, request: pytest.FixtureRequest) -> None:
    module = reference if backend == "reference" else request.getfixturevalue("cpu")
    for batch in oracle_cases():
        assert_close(batch, batch.run(module))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_matches_reference(cpu: Any, window: int, dtype: torch.dtype) -> None:
    batch = make_batch(CONTEXTS, [min(q, c) for q, c in zip(QUERIES, CONTEXTS, strict=True)], (8, 2), 64, dtype=dtype, window=window)
    torch.testing.assert_close(batch.run(cpu), batch.run(reference), atol=1e-5, rtol=0)


# ---- the same bits however it is called ----


@pytest.mark.parametrize("window", [0, 1, 16, 100, 600])
@pytest.mark.parametrize("heads", [(4, 4), (14, 2)])
@pytest.mark.parametrize("context", [9, 40, 515, 1031, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_verification_equals_single_steps(cpu: Any, dtype: torch.dtype, context: int, heads: tuple[int, int], window: int) -> None:
    batch = make_batch([context], [8], heads, 64, window=window, block_size=32, dtype=dtype)
    whole = batch.run(cpu)
    for i in range(8):
        assert torch.equal(only(batch, 0, i, i + 1).run(cpu)[0], whole[i]), i


@pytest.mark.parametrize("window", [0, 16, 100])
@pytest.mark.parametrize(
    ("context", "heads", "head_dim", "dtype"),
    [(150, (6, 3), 48, torch.int8), (600, (2, 1), 80, torch.bfloat16), (530, (1, 1), 8, torch.float32), (530, (5, 1), 72, torch.int8)],
)
def test_prefill_chunks_equal_whole(cpu: Any, context: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, window: int) -> None:
    batch = make_batch([context], [context], heads, head_dim, window=window, dtype=dtype)
    whole = batch.run(cpu)
    for chunk, starts in ((1, range(0, context, 13)), (7, range(0, context, 7)), (64, range(0, context, 64))):
        for first in starts:
            part = only(batch, 0, first, min(first + chunk, context))
            assert torch.equal(part.run(cpu), whole[first : first + chunk]), (chunk, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_alone_equals_in_a_batch(cpu: Any, dtype: torch.dtype) -> None:
    batch = make_batch(CONTEXTS, [min(q, c) for q, c in zip(QUERIES, CONTEXTS, strict=True)], (6, 3), 96, dtype=dtype)
    together = batch.run(cpu)
    for s in range(len(CONTEXTS)):
        assert torch.equal(only(batch, s).run(cpu), together[batch.rows(s)]), s


def test_block_order_does_not_matter(cpu: Any) -> None:
    batch = make_batch([700, 100], [3, 100], (8, 2), 64)
    order = torch.randperm(len(batch.key_cache))  # block i moves to order[i]
    key_cache, value_cache = torch.empty_like(batch.key_cache), torch.empty_like(batch.value_cache)
    key_cache[order], value_cache[order] = batch.key_cache, batch.value_cache
    used = batch.block_table >= 0
    table = torch.where(used, order[batch.block_table.clamp(min=0).long()].int(), batch.block_table)
    moved = replace(batch, key_cache=key_cache, value_cache=value_cache, block_table=table)
    assert torch.equal(moved.run(cpu), batch.run(cpu))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_head_does_not_know_its_group(cpu: Any, dtype: torch.dtype, group: int) -> None:
    """Tiles of every height: each query head has the bits that it gets as the only one of its KV head."""
    batch = make_batch([600, 64], [3, 64], (2 * group, 2), 72, dtype=dtype)
    whole = batch.run(cpu)
    for head in range(group):
        alone = replace(batch, q=batch.q[:, head::group].contiguous())
        assert torch.equal(alone.run(cpu), whole[:, head::group]), head


@pytest.mark.parametrize("queries", [1, 8, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_threads_do_not_matter(cpu: Any, dtype: torch.dtype, queries: int) -> None:
    """A long context at batch 1 is cut into more items the more threads there are."""
    batch = make_batch([6000], [queries], (4, 2), 64, dtype=dtype)
    before = cpu._cpu.num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            cpu._cpu.set_num_threads(threads)
            results.append(batch.run(cpu))
    finally:
        cpu._cpu.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert_close(batch, results[0])


def run_oracle_cases() -> None:
    """Run in a process of its own by the next test."""
    import engine.kernels.cpu as cpu

    torch.set_num_threads(1)
    assert cpu._cpu.isa() == os.environ["ENGINE_CPU_ISA"]
    for batch in itertools.islice(oracle_cases(), 0, None, 3):
        assert_close(batch, batch.run(cpu))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(cpu: Any, isa: str) -> None:
    if isa not in cpu._cpu.supported_isas():
        pytest.skip(f"this CPU does not run {isa}")
    result = subprocess.run([sys.executable, __file__], env={**os.environ, "ENGINE_CPU_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- hostile values ----


@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_a_bad_query_row_harms_only_itself(cpu: Any, value: float) -> None:
    batch = make_batch([700, 520, 33], [8, 64, 1], (4, 2), 64)
    clean = batch.run(cpu)
    dirty = replace(batch, q=batch.q.clone())
    dirty.q[3] = value
    out = dirty.run(cpu)
    assert torch.equal(out[:3], clean[:3]) and torch.equal(out[4:], clean[4:])
    assert out[3].isnan().all()


@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_bad_keys_and_values_harm_only_rows_that_see_them(cpu: Any, dtype: torch.dtype, value: float) -> None:
    batch = make_batch([700, 520, 33], [8, 64, 1], (4, 2), 64, dtype=dtype)
    clean = batch.run(cpu)
    for cache in ("key_cache", "value_cache"):
        dirty = replace(batch, **{cache: getattr(batch, cache).clone()})
        token = torch.tensor([520 - 30])  # seen by the last 30 of the 64 rows of sequence 1
        put(getattr(dirty, cache), cache == "key_cache", *batch.slots(1, token), value)
        out = dirty.run(cpu)
        first = 8 + 64 - 30
        assert torch.equal(out[:first], clean[:first]) and torch.equal(out[-1:], clean[-1:])
        assert not torch.equal(out[first : 8 + 64], clean[first : 8 + 64])
        if value != value:
            assert out[first : 8 + 64].isnan().all()


def test_split_of_minus_infinity_scores_weighs_nothing(cpu: Any) -> None:
    """Scores of -inf over a whole split of 512 tokens must not turn the row into NaN."""
    batch = make_batch([700], [1], (1, 1), 8)
    batch.q[0] = 1.0
    for token in range(512):
        batch.key_cache[batch.block_table[0, token // 16], :, 0, :, token % 16] = -torch.inf
        batch.keys[0][token] = -torch.inf
    assert_close(batch, batch.run(cpu))


def test_an_int8_token_of_zeros(cpu: Any) -> None:
    """Scale 0: a score of 0 and a value of 0."""
    batch = make_batch([40], [4], (4, 2), 16, dtype=torch.int8)
    block, offset = batch.slots(0, torch.tensor([7]))
    for cache, is_key, dense in ((batch.key_cache, True, batch.keys), (batch.value_cache, False, batch.values)):
        int8_tokens(cache, is_key)[1][block, offset // 16, offset % 16] = 0.0
        dense[0][7] = 0.0
    assert_close(batch, batch.run(cpu))


def test_large_scores_do_not_overflow(cpu: Any) -> None:
    batch = make_batch([1100, 40], [4, 40], (4, 2), 64)
    batch.q *= 1e4
    batch.scale = 1.0
    assert_close(batch, batch.run(cpu))


# ---- nothing to do, and bad arguments ----


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batches(backend: str, request: pytest.FixtureRequest) -> None:
    module = reference if backend == "reference" else request.getfixturevalue("cpu")
    batch = make_batch([20, 40], [1, 2], (2, 1), 16)
    none = replace(
        batch, q=batch.q[:0], block_table=batch.block_table[:0], query_start=torch.zeros(1, dtype=torch.int32),
        context_len=batch.context_len[:0],
    )  # fmt: skip
    assert none.run(module).shape == (0, 2, 16)
    idle = replace(batch, q=batch.q[1:].contiguous(), query_start=torch.tensor([0, 0, 2], dtype=torch.int32))
    torch.testing.assert_close(idle.run(module), batch.run(module)[1:], atol=0, rtol=0)


def _entry(name: str, index: tuple[int, ...], value: int) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        tensor = getattr(batch, name).clone()
        tensor[index] = value
        return replace(batch, **{name: tensor})

    return change


BAD: dict[str, tuple[Callable[[Batch], Batch], type[Exception], str]] = {
    "q dtype": (lambda b: replace(b, q=b.q.double()), TypeError, "q must be float32 or bfloat16 or float16, got torch.float64"),
    "q shape": (lambda b: replace(b, q=b.q[0]), ValueError, r"q must have shape .*\(4, 16\)"),
    "q head_dim": (lambda b: replace(b, q=b.q[..., :8].contiguous()), ValueError, r"q must .* head_dim = 16.*\(3, 4, 8\)"),
    "q strides": (lambda b: replace(b, q=b.q.transpose(0, 1).contiguous().transpose(0, 1)), ValueError, "q must be contiguous"),
    "heads": (lambda b: replace(b, q=b.q[:, :3].contiguous()), ValueError, "num_heads must be .* multiple of num_kv_heads = 2, got 3"),
    "key dtype": (lambda b: replace(b, key_cache=b.key_cache.half()), TypeError, "key_cache must be float32 or bfloat16"),
    "value dtype": (lambda b: replace(b, value_cache=b.value_cache.bfloat16()), TypeError, "value_cache must be float32, got torch.bf"),
    "lanes": (lambda b: replace(b, key_cache=b.key_cache.flatten(3).unflatten(3, (32, 8))), ValueError, "key_cache must have shape"),
    "value shape": (lambda b: replace(b, value_cache=b.value_cache[:-1]), ValueError, "value_cache must have shape"),
    "value strides": (lambda b: replace(b, value_cache=b.value_cache.mT.contiguous().mT), ValueError, "value_cache must be contiguous"),
    "table dtype": (lambda b: replace(b, block_table=b.block_table.long()), TypeError, "block_table must be int32"),
    "int8 value shape": (
        lambda b: replace(b, key_cache=torch.zeros(20, 2, 1, 20, 16, dtype=torch.int8), value_cache=b.value_cache.to(torch.int8)),
        ValueError,
        r"value_cache must have shape .*head_dim \+ 4, 16\] = \(20, 2, 1, 20, 16\)",
    ),
    "table rows": (lambda b: replace(b, block_table=b.block_table[:1]), ValueError, r"block_table .* S = 2, got \(1, "),
    "start length": (lambda b: replace(b, query_start=b.query_start[:2]), ValueError, r"query_start .* \(3,\), got \(2,\)"),
    "start end": (_entry("query_start", (2,), 4), ValueError, "query_start must run from 0 to the 3 rows of q, got 0 to 4"),
    "start begin": (_entry("query_start", (0,), 1), ValueError, "query_start must run from 0"),
    "start order": (_entry("query_start", (1,), 5), ValueError, "query_start must not decrease, got 5 then 3 at sequence 1"),
    "context short": (_entry("context_len", (1,), 1), ValueError, r"context_len\[1\] must be in \[2 queries, .* got 1"),
    "context long": (_entry("context_len", (0,), 1000), ValueError, r"context_len\[0\] must be in .* got 1000"),
    "block low": (_entry("block_table", (1, 2), -1), ValueError, r"block_table.* got -1"),
    "block high": (_entry("block_table", (0, 1), 99), ValueError, r"block_table.* got 99"),
    "window": (lambda b: replace(b, window=-1), ValueError, "window must be >= 0 .*, got -1"),
    "not a tensor": (lambda b: replace(b, context_len=cast(Tensor, [20, 40])), TypeError, "context_len must be a tensor, got list"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_arguments(backend: str, case: str, request: pytest.FixtureRequest) -> None:
    module = reference if backend == "reference" else request.getfixturevalue("cpu")
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        change(make_batch([20, 40], [1, 2], (4, 2), 16)).run(module)


@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_head_dims_that_are_not_served(head_dim: int) -> None:
    batch = make_batch([3], [1], (1, 1), head_dim)
    with pytest.raises(ValueError, match=f"head_dim must be a multiple of 8 in 8..256, got {head_dim}"):
        checks.cache(batch.key_cache, batch.value_cache)


if __name__ == "__main__":
    run_oracle_cases()
