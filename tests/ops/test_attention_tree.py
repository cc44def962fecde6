"""paged_attention over trees of drafts: the oracle against dense float64, and every row's bits against its path as a plain sequence."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import DTYPE_IDS, DTYPES, NAN, Batch, assert_close, make_batch, only
from attention_tree_cases import assert_equals_paths, masks, tree
from torch import Tensor

from engine.kernels import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}
# Where the trees begin: at edges of sub-blocks and splits, and such that paths, or nodes, or both lie across those.
STARTS = (0, 1, 15, 16, 17, 448, 449, 480, 500, 511, 512, 513, 1000, 1024)
SIZES = (1, 2, 3, 8, 17, 33, 63, 64)
SHAPES = ("chain", "star", "wide", "deep", "forest")
WINDOWS = (0, 1, 3, 16, 40, 600)
HEADS = ((1, 1), (4, 4), (4, 1), (6, 3), (14, 2), (16, 1))
HEAD_DIMS = (8, 40, 64, 80, 256)
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return BACKENDS[request.param]


def cases(starts: Sequence[int] = STARTS) -> Iterator[Batch]:
    """Every start with every size; the rest takes turns. Half of the trees come with all their nodes as queries, half with the last."""
    turns = zip(
        itertools.cycle(SHAPES), itertools.cycle(WINDOWS), itertools.cycle(HEADS + HEADS[:1]), itertools.cycle(HEAD_DIMS + HEAD_DIMS[2:]),
        itertools.cycle(DTYPES + DTYPES[:1]), itertools.cycle((16, 16, 32)), itertools.count(), strict=False,
    )  # fmt: skip
    for (start, size), (shape, window, heads, head_dim, dtype, block_size, seed) in zip(
        itertools.product(starts, SIZES), turns, strict=False
    ):
        queries = size if seed % 2 else max(1, size // 3)
        yield make_batch(
            [start + size], [queries], heads, head_dim, block_size=block_size, dtype=dtype, window=window,
            trees=[tree(shape, size, seed)], seed=seed,
        )  # fmt: skip


def mixed(dtype: torch.dtype = torch.float32, window: int = 0) -> Batch:
    """Decode, prefill, verification of a chain and an idle sequence, and trees between them."""
    contexts = (700, 505 + 64, 40, 513, 90, 530, 20, 31)
    queries = (1, 64, 40, 8, 0, 3, 8, 5)
    trees = (None, tree("wide", 64, 1), None, None, tree("wide", 8), tree("deep", 20, 2), tree("star", 20), tree("chain", 5))
    return make_batch(contexts, queries, (6, 3), 48, dtype=dtype, window=window, trees=trees)


# ---- against the definition, and to the bit ----


def test_matches_dense_float64(backend: Any) -> None:
    for batch in itertools.chain(cases(), (mixed(window=window) for window in WINDOWS)):
        assert_close(batch, batch.run(backend))


@pytest.mark.parametrize("start", STARTS)
def test_a_row_has_the_bits_of_its_path(backend: Any, start: int) -> None:
    for batch in cases((start,)):
        assert_equals_paths(backend, batch, batch.run(backend))


@needs_cpp
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_around_the_end_of_a_split(shape: str, window: int) -> None:
    """The path within the split and the nodes past it, and every other way for 64 of them to lie."""
    for start in range(448, 514, 3):
        batch = make_batch([start + 64], [64], (3, 1), 24, window=window, trees=[tree(shape, 64, start)], seed=start)
        assert_equals_paths(cpu, batch, batch.run(cpu))


@needs_cpp
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_mixed_with_causal_sequences(dtype: torch.dtype, window: int) -> None:
    batch = mixed(dtype, window)
    together = batch.run(cpu)
    assert_equals_paths(cpu, batch, together)
    for s in range(len(batch.keys)):
        assert torch.equal(only(batch, s).run(cpu), together[batch.rows(s)]), s


@needs_cpp
def test_no_trees_at_all() -> None:
    batch = make_batch([700, 40], [8, 40], (4, 2), 64, trees=[None, None])
    assert torch.equal(batch.run(cpu), replace(batch, tree_start=None, ancestors=None).run(cpu))


@needs_cpp
@pytest.mark.parametrize("window", [0, 2, 100])
def test_level_by_level(window: int) -> None:
    """A tree grows from the root: each level is computed before the next is in the cache."""
    nodes = tree("wide", 40, 3)
    batch = make_batch([500 + 40], [40], (4, 2), 64, window=window, trees=[nodes])
    whole = batch.run(cpu)
    depth = [mask.bit_count() for mask in nodes]
    ends = [i for i in range(1, 41) if i == 40 or depth[i] != depth[i - 1]]
    assert len(ends) > 3
    for first, end in itertools.pairwise([0, *ends]):
        assert torch.equal(only(batch, 0, first, end).run(cpu), whole[first:end]), first


@needs_cpp
@pytest.mark.parametrize("queries", [5, 64])
def test_threads_do_not_matter(queries: int) -> None:
    """A long context at batch 1 is cut into more items the more threads there are."""
    batch = make_batch([6100 + 64], [queries], (6, 2), 64, trees=[tree("deep", 64, 4)])  # a split ends at 6144
    before = cpu._cpu.num_threads()
    try:
        for threads in (1, 2, 4):
            cpu._cpu.set_num_threads(threads)
            assert_equals_paths(cpu, batch, batch.run(cpu))
    finally:
        cpu._cpu.set_num_threads(before)


def run_cases() -> None:
    """Run in a process of its own by the next test."""
    torch.set_num_threads(1)
    assert cpu._cpu.isa() == os.environ["ENGINE_CPU_ISA"]
    for batch in itertools.chain(itertools.islice(cases(), 0, None, 3), (mixed(), mixed(torch.bfloat16, 3), mixed(torch.int8, 40))):
        out = batch.run(cpu)
        assert_equals_paths(cpu, batch, out)
        assert_close(batch, out)


@needs_cpp
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    if isa not in cpu._cpu.supported_isas():
        pytest.skip(f"this CPU does not run {isa}")
    result = subprocess.run([sys.executable, __file__], env={**os.environ, "ENGINE_CPU_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- hostile values ----


@pytest.mark.parametrize("value", [NAN, torch.inf])
@pytest.mark.parametrize("start", [13, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])
def test_a_bad_node_harms_only_what_is_below_it(backend: Any, dtype: torch.dtype, start: int, value: float) -> None:
    batch = make_batch([start + 24], [24], (4, 2), 16, trees=[tree("wide", 24, 5)], dtype=dtype)
    clean = batch.run(backend)
    for node in range(24):
        below = batch.path(0)[:, start + node]
        out = batch.fill(0, torch.tensor([start + node]), value).run(backend)
        assert torch.equal(out[~below], clean[~below]), node
        assert not out[below].isfinite().any(), node


@pytest.mark.parametrize("window", [1, 2, 5])
def test_nodes_out_of_the_window_are_not_read(backend: Any, window: int) -> None:
    batch = make_batch([60 + 12], [12], (4, 2), 16, window=window, trees=[tree("chain", 12)])
    clean = batch.run(backend)
    for node in range(12):
        seen = batch.seen(0)[:, 60 + node]
        out = batch.fill(0, torch.tensor([60 + node]), NAN).run(backend)
        assert torch.equal(out[~seen], clean[~seen]) and out[seen].isnan().all(), node


def test_a_bad_query_row_harms_only_itself(backend: Any) -> None:
    batch = mixed()
    clean = batch.run(backend)
    dirty = replace(batch, q=batch.q.clone())
    dirty.q[3] = NAN
    out = dirty.run(backend)
    assert torch.equal(out[:3], clean[:3]) and torch.equal(out[4:], clean[4:]) and out[3].isnan().all()


# ---- bad arguments ----


def _entry(name: str, index: int, value: int) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        tensor = getattr(batch, name).clone()
        tensor[index] = value
        return replace(batch, **{name: tensor})

    return change


def _changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, **{name: change(getattr(batch, name))})


# Of a causal sequence with 2 queries and a tree of 5 nodes after 35 tokens, whose last 3 nodes are rows 2, 3 and 4.
BAD: dict[str, tuple[Callable[[Batch], Batch], type[Exception], str]] = {
    "no ancestors": (_changed("ancestors", lambda _: None), ValueError, "both be given or both be None, got Tensor and NoneType"),
    "no start": (_changed("tree_start", lambda _: None), ValueError, "both be given or both be None, got NoneType and Tensor"),
    "not a tensor": (_changed("ancestors", list), TypeError, "ancestors must be a tensor, got list"),
    "start dtype": (_changed("tree_start", Tensor.long), TypeError, "tree_start must be int32, got torch.int64"),
    "ancestors dtype": (_changed("ancestors", Tensor.int), TypeError, "ancestors must be int64, got torch.int32"),
    "start shape": (_changed("tree_start", lambda t: t[:1]), ValueError, r"tree_start must have shape \[S\] = \(2,\), got \(1,\)"),
    "ancestors shape": (_changed("ancestors", lambda t: t[1:]), ValueError, r"ancestors must have shape \[T\] = \(5,\), got \(4,\)"),
    "ancestors dims": (_changed("ancestors", lambda t: t[None]), ValueError, r"ancestors must have shape \[T\], got \(1, 5\)"),
    "ancestors strides": (_changed("ancestors", lambda t: t.repeat_interleave(2)[::2]), ValueError, "ancestors must be contiguous"),
    "start low": (_entry("tree_start", 1, -2), ValueError, r"tree_start\[1\] must be -1 or in \[0, 37\] .*, got -2"),
    "start in the queries": (_entry("tree_start", 1, 38), ValueError, r"tree_start\[1\] must be -1 or in \[0, 37\] .*, got 38"),
    "own bit": (_entry("ancestors", 3, 0b101), ValueError, r"ancestors\[3\] must have its own bit 3 as its highest, got 0x5"),
    "no bit": (_entry("ancestors", 4, 0), ValueError, r"ancestors\[4\] must have its own bit 4 as its highest, got 0x0$"),
    "later bit": (_entry("ancestors", 2, 0b1111), ValueError, r"ancestors\[2\] must have its own bit 2 as its highest, got 0xf"),
    "sign bit": (_entry("ancestors", 2, -1), ValueError, r"ancestors\[2\] must have its own bit 2 as its highest, got 0xffffffffffffffff"),
    "depth": (_entry("ancestors", 4, 0b10000), ValueError, r"ancestors\[4\] must be at least as deep as .*, got 1 nodes after 3"),
    "start order": (_entry("query_start", 1, 50), ValueError, "query_start must not decrease, got 50 then 5 at sequence 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(backend: Any, case: str) -> None:
    change, error, message = BAD[case]
    batch = make_batch([20, 40], [2, 3], (4, 2), 16, trees=[None, masks([-1, 0, 1, 1, 2])])
    batch.run(backend)
    with pytest.raises(error, match=message):
        change(batch).run(backend)


@pytest.mark.parametrize(("nodes", "queries"), [(65, 8), (100, 100)])
def test_trees_that_are_too_large(backend: Any, nodes: int, queries: int) -> None:
    batch = make_batch([200], [queries], (4, 2), 16, trees=[[1] * nodes])
    message = rf"tree_start\[0\] must be -1 or in \[136, {200 - queries}\] \(a tree has at most 64 tokens.*, got {200 - nodes}"
    with pytest.raises(ValueError, match=message):
        batch.run(backend)


def test_blocks_of_a_tree_must_exist(backend: Any) -> None:
    """Also those whose nodes no row has in its window."""
    batch = make_batch([20 + 64], [2], (4, 2), 16, window=1, trees=[tree("chain", 64)])
    batch.run(backend)
    batch.block_table[0, 2] = -7
    with pytest.raises(ValueError, match="block_table.* got -7"):
        batch.run(backend)


if __name__ == "__main__":
    run_cases()
