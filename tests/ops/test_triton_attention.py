"""``paged_attention`` in Triton: in the interpreter against the definition, and on a GPU if there is one (``test_triton_compile``
compiles)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from attention_cases import Batch, make_batch, only
from attention_tree_cases import assert_equals_paths, tree
from interpreted import Interpreted
from torch import Tensor

from engine.kernels import fast, registry
from engine.kernels import triton as backend

pytest.importorskip("triton")

GROUPS = ("oracle", "bits", "trees", "hostile", "padding")
INTERPRETED = Interpreted("ops/triton_attention_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_finds_what_the_contract_says(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


def test_other_devices_are_refused() -> None:
    batch = make_batch([20], [1], (4, 2), 16)
    with pytest.raises(ValueError, match="q is on cpu; these kernels run on cuda"):
        batch.run(backend)
    with pytest.raises(ValueError, match="head_dim = 16, got"):
        replace(batch, q=batch.q[:, :, :8].contiguous()).run(backend)


def test_shapes_alone_choose_the_kernels() -> None:
    """Few queries over long contexts are split, prompts are walked, and either has as many programs as its shapes may need."""
    from engine.kernels.triton import attention

    def chosen(tokens: int, sequences: int, max_blocks: int, wide: bool = False) -> list[tuple[str, tuple[int, ...]]]:
        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device="meta")

        q = torch.empty(tokens, 32, 128, dtype=torch.bfloat16, device="meta")
        keys = torch.empty(9, 8, 1, 128, 16, dtype=torch.bfloat16, device="meta")
        values = torch.empty(9, 8, 16, 128, dtype=torch.bfloat16, device="meta")
        step = (q, keys, values, ints(sequences, max_blocks), ints(sequences + 1), ints(sequences))
        return [(k.__name__, grid) for k, grid, _ in attention.launches(q, *step, 0.1, 0, None, None, wide=wide)]

    assert chosen(64, 64, 256) == [("attention_splits", (80, 8, 8)), ("attention_merge", (64, 32))]
    assert chosen(1, 1, 8192) == [("attention_splits", (1, 8, 256)), ("attention_merge", (1, 32))]
    assert chosen(64, 64, 32) == [("attention_walk", (80, 8))]  # one split
    assert chosen(2048, 4, 256) == [("attention_walk", (516, 8))]
    assert chosen(256, 256, 8192) == [("attention_walk", (320, 8))]  # the results of all splits would take too much memory
    assert chosen(2048, 4, 256, wide=True) == [("attention_walk", (132, 8))]
    assert chosen(0, 3, 256)[0][1][0] == 0
    assert chosen(0, 0, 0) == [("attention_walk", (0, 8))]


def test_deterministic_choice_leaves_wide_tiles_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    registry.select.cache_clear()
    try:
        assert registry.select("cuda").chosen["paged_attention"] == "fast"
        assert registry.select("cuda", deterministic=True).chosen["paged_attention"] == "triton"
    finally:
        registry.select.cache_clear()


# ---- on a GPU ----


def _to_gpu(batch: Batch, dtype: torch.dtype | None = None) -> Batch:
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in moved.items()}
    moved["q"] = moved["q"] if dtype is None else moved["q"].to(dtype)
    return Batch(**moved)


class _OnGpu:
    """Batches whose definition stays on the CPU."""

    def __init__(self, module: Any = backend, dtype: torch.dtype | None = None) -> None:
        self.module, self.dtype = module, dtype

    def paged_attention(self, q: Tensor, *step: Tensor, **options: Any) -> Tensor:
        given = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
        out: Tensor = self.module.paged_attention(q.to(self.dtype or q.dtype).cuda(), *(t.cuda() for t in step), **given)
        return out.cpu()


def _caches() -> list[torch.dtype]:
    float8 = [torch.float8_e4m3fn] if torch.cuda.get_device_capability() >= (8, 9) else []
    return [torch.float32, torch.bfloat16, torch.int8, *float8]


HEADS = ((8, 2), (6, 6), (48, 2))
CONTEXTS = (1, 15, 16, 17, 511, 512, 513, 2100, 3000)
QUERIES = (1, 8, 16, 17, 1, 8, 2, 1, 300)


class TestOnGpu:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

    @pytest.mark.parametrize("module", [backend, fast], ids=["triton", "fast"])
    @pytest.mark.parametrize("window", [0, 100])
    def test_near_float64(self, module: Any, window: int) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for cache in _caches():
                for head_dim, heads in ((8, (4, 4)), (64, (14, 2)), (80, (48, 2)), (128, (8, 2)), (256, (4, 2))):
                    queries = [min(q, c) for q, c in zip(QUERIES, CONTEXTS, strict=True)]
                    batch = make_batch(CONTEXTS, queries, heads, head_dim, dtype=cache, window=window)
                    batch.q = batch.q.to(dtype)
                    exact, out = batch.dense(), batch.run(_OnGpu(module)).double()
                    # 1e-5 for float32; else 2e-3 beside what it takes to round results of this size
                    allowed = 1e-5 if dtype == torch.float32 else 2e-3 + 2 * torch.finfo(dtype).eps * exact.abs().max().item()
                    assert (out - exact).abs().max().item() <= allowed, (dtype, cache, head_dim)

    def test_decode_verification_and_prefill_have_the_same_bits(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for cache in _caches():
                for heads, window in ((HEADS[0], 0), (HEADS[1], 100), (HEADS[2], 600)):
                    batch = make_batch([1100], [200], heads, 128, dtype=cache, window=window)
                    way, name = _OnGpu(dtype=dtype), (dtype, cache, heads)
                    whole = batch.run(way)
                    for first, last in ((0, 1), (123, 124), (199, 200), (50, 58), (192, 200), (100, 164)):
                        assert torch.equal(only(batch, 0, first, last).run(way), whole[first:last]), (*name, first)

    def test_alone_equals_in_a_batch_of_64(self) -> None:
        generator = torch.Generator().manual_seed(0)
        contexts = torch.randint(1, 1500, (64,), generator=generator).tolist()
        queries = [min(c, int(q)) for c, q in zip(contexts, torch.randint(1, 20, (64,), generator=generator), strict=True)]
        batch = make_batch(contexts, queries, (8, 2), 128, dtype=torch.bfloat16)
        way = _OnGpu(dtype=torch.bfloat16)
        together = batch.run(way)
        for s in range(64):
            assert torch.equal(only(batch, s).run(way), together[batch.rows(s)]), s
        order = torch.randperm(len(batch.key_cache), generator=generator)  # block i moves to order[i]
        keys, values = torch.empty_like(batch.key_cache), torch.empty_like(batch.value_cache)
        keys[order], values[order] = batch.key_cache, batch.value_cache
        table = torch.where(batch.block_table >= 0, order[batch.block_table.clamp(min=0).long()].int(), batch.block_table)
        assert torch.equal(replace(batch, key_cache=keys, value_cache=values, block_table=table).run(way), together)

    @pytest.mark.parametrize("window", [0, 3, 600])
    def test_rows_of_trees_have_the_bits_of_their_paths(self, window: int) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for i, start in enumerate((0, 1, 17, 480, 511, 1000)):
                for cache in _caches():
                    nodes = tree(("wide", "deep", "forest")[i % 3], 33, i)
                    batch = make_batch([start + 33, 700], [33, 2], (8, 2), 128, dtype=cache, window=window, trees=[nodes, None])
                    batch.q = batch.q.to(dtype)
                    assert_equals_paths(_OnGpu(), batch, batch.run(_OnGpu()))

    def test_both_ways_and_every_call_have_the_same_bits(self) -> None:
        from engine.kernels.triton import attention, launch

        batch = _to_gpu(make_batch([3000, 700, 9], [8, 1, 9], (8, 2), 128, dtype=torch.bfloat16, window=1000), torch.bfloat16)
        step = (batch.q, batch.key_cache, batch.value_cache, batch.block_table, batch.query_start, batch.context_len)
        first = batch.run(backend)
        for split in (True, False) * 10:
            out = torch.empty_like(batch.q)
            launch.run(attention.launches(out, *step, batch.scale, batch.window, None, None, split=split), out.device)
            assert torch.equal(out, first), split

    def test_nan_harms_only_rows_that_see_it(self) -> None:
        for cache in _caches():
            batch = make_batch([700, 520], [8, 16], (4, 2), 64, dtype=cache)
            way = _OnGpu(dtype=torch.bfloat16)
            clean = batch.run(way)
            out = batch.fill(1, torch.tensor([510]), float("nan")).run(way)
            assert torch.equal(out[:14], clean[:14]) and out[14:].isnan().all(), cache

    def test_a_captured_graph_replays_other_contexts_without_a_sync(self) -> None:
        first = make_batch([1000, 30, 513, 9], [2, 2, 2, 2], (8, 2), 64, dtype=torch.bfloat16, seed=1)
        second = make_batch([9, 600, 1000, 17], [2, 2, 2, 2], (8, 2), 64, dtype=torch.bfloat16, seed=2)
        names = ("q", "key_cache", "value_cache", "block_table", "query_start", "context_len")
        blocks = max(len(b.key_cache) for b in (first, second))
        width = max(b.block_table.shape[1] for b in (first, second))

        def fitted(batch: Batch) -> Batch:
            pad = blocks - len(batch.key_cache)
            return replace(
                batch,
                q=batch.q.bfloat16(),
                key_cache=torch.cat((batch.key_cache, batch.key_cache[:1].expand(pad, -1, -1, -1, -1))),
                value_cache=torch.cat((batch.value_cache, batch.value_cache[:1].expand(pad, -1, -1, -1))),
                block_table=torch.nn.functional.pad(batch.block_table, (0, width - batch.block_table.shape[1])),
            )

        given = _to_gpu(fitted(first))
        expected = [_to_gpu(fitted(b)).run(backend) for b in (first, second)]  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            given.run(backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = given.run(backend)
        for batch, want in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
            for name in names:
                getattr(given, name).copy_(getattr(fitted(batch), name))
            graph.replay()
            assert torch.equal(out, want)

    def test_values_out_of_range_are_not_followed(self) -> None:
        batch = make_batch([70, 33], [2, 1], (4, 2), 64, dtype=torch.bfloat16)
        way, far = _OnGpu(dtype=torch.bfloat16), 2**31 - 1
        clean = batch.run(way)
        for change in (
            {"block_table": batch.block_table.index_fill(0, torch.tensor([1]), far)},
            {"context_len": torch.tensor([70, far], dtype=torch.int32)},
            {"context_len": torch.tensor([70, -far], dtype=torch.int32)},
            {"query_start": torch.tensor([0, 2, far], dtype=torch.int32)},
            {"tree_start": torch.tensor([-1, far], dtype=torch.int32), "ancestors": torch.tensor([0, 0, -1])},
        ):
            assert torch.equal(replace(batch, **change).run(way)[:2], clean[:2]), change
        torch.cuda.synchronize()
