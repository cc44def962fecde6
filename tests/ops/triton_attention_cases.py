"""As a program, under TRITON_INTERPRET=1: ``paged_attention`` in Triton's interpreter against the definition in float64, and every row's
bits however it is called; prints one JSON object, group of cases -> what was run and what went wrong. In a process of its own: see
``triton_cases``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton_cases
import triton_interpreter
from attention_cases import NAN, Batch, make_batch, only, put
from attention_tree_cases import assert_equals_paths, tree
from torch import Tensor

from engine.kernels.triton import attention, launch

F32, BF16, F16, INT8, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
LARGEST = 2**31 - 1


class Way:
    """A backend that computes in one of the ways that shapes choose between, and checks that it writes the rows of sequences alone."""

    def __init__(self, split: bool, wide: bool = False) -> None:
        self.how = {"split": split, "wide": wide}

    def paged_attention(self, q: Tensor, *step: Tensor, scale: float, window: int, tree_start: Any = None, ancestors: Any = None) -> Tensor:
        out = torch.full_like(q, 99.0)
        attention.checks.paged_attention(q, *step, window, tree_start, ancestors)
        launch.run(attention.launches(out, q, *step, scale, window, tree_start, ancestors, **self.how), q.device)
        return out


SPLITS, WALK, WIDE = Way(True), Way(False), Way(False, wide=True)


class Found:
    """What a group has run and what went wrong."""

    def __init__(self) -> None:
        self.rows, self.wrong = 0, list[str]()

    def close(self, name: str, batch: Batch, out: Tensor) -> None:
        """Near the definition: 1e-5 for float32; else what rounding weights and result to q's dtype may do to values of this size."""
        self.rows += len(out)
        exact = batch.dense()
        short = 0.0 if out.dtype == F32 else torch.finfo(out.dtype).eps
        error = (out.double() - exact).abs().max().item()
        if not error <= 1e-5 + short * max(v.float().abs().max().item() for v in batch.values):
            self.wrong.append(f"{name}: error {error:.2e}")

    def same(self, name: str, got: Tensor, expected: Tensor) -> None:
        self.rows += len(got)
        if not torch.equal(got, expected):
            self.wrong.append(f"{name}: {(got != expected).flatten(1).any(1).nonzero().flatten().tolist()} differ")

    def true(self, name: str, good: Any) -> None:
        if not bool(good):
            self.wrong.append(name)

    def report(self) -> dict[str, Any]:
        return {"rows": self.rows, "wrong": self.wrong}


def batch_of(q: torch.dtype, *args: Any, **kwargs: Any) -> Batch:
    batch = make_batch(*args, **kwargs)
    batch.q = batch.q.to(q)
    return batch


def oracle() -> dict[str, Any]:
    """Dtypes, head dimensions, groups and edges of tiles, blocks and splits; both ways, and wide tiles."""
    found = Found()
    cases: list[tuple[str, Way, Batch]] = [
        ("fp32, D = 8", SPLITS, batch_of(F32, [1, 15, 16, 17, 63], [1, 2, 1, 3, 1], (4, 2), 8)),
        ("fp32 over bf16, window", WALK, batch_of(F32, [64, 65, 511], [7, 8, 1], (3, 1), 24, dtype=BF16, window=16)),
        ("bf16, D = 128", SPLITS, batch_of(BF16, [513, 40], [2, 1], (2, 1), 128, dtype=BF16)),
        ("bf16 over fp32, window over a split", SPLITS, batch_of(BF16, [700], [1], (1, 1), 16, window=600)),
        ("bf16 over int8", SPLITS, batch_of(BF16, [512, 77], [1, 5], (5, 1), 40, dtype=INT8, block_size=32)),
        ("fp16 over int8, window", WALK, batch_of(F16, [130], [20], (2, 2), 16, dtype=INT8, window=30)),
        ("fp32 over int8", SPLITS, batch_of(F32, [65], [3], (2, 1), 72, dtype=INT8)),
        ("fp32 over fp8", SPLITS, batch_of(F32, [80, 3], [2, 1], (4, 2), 24, dtype=FP8)),
        ("fp16 over fp8", WALK, batch_of(F16, [70], [8], (1, 1), 32, dtype=FP8)),
        ("fp16 over bf16, D = 256", WALK, batch_of(F16, [70], [2], (2, 1), 256, dtype=BF16)),
        ("fp32, D = 256", SPLITS, batch_of(F32, [40, 17], [2, 1], (2, 1), 256)),
        ("fp32 over int8, D = 136, window", WALK, batch_of(F32, [70], [9], (2, 1), 136, dtype=INT8, window=20)),
        ("group 24", SPLITS, batch_of(BF16, [90, 5], [2, 1], (48, 2), 16, dtype=BF16)),
        ("group 5, blocks of 48", WALK, batch_of(F32, [200], [9], (5, 1), 16, block_size=48)),
        ("wide", WIDE, batch_of(BF16, [600, 30], [70, 30], (4, 1), 16, dtype=BF16)),
        ("wide, window, group 80", WIDE, batch_of(F16, [100], [3], (80, 1), 8, dtype=INT8, window=40)),
    ]  # fmt: skip
    for name, way, batch in cases:
        found.close(name, batch, batch.run(way))
    return found.report()


def bits() -> dict[str, Any]:
    """Verification, single steps, chunks of a prompt, alone or in a batch, in either way: the same bits."""
    found = Found()
    for q, cache, window, heads, context, head_dim in (
        (F32, F32, 0, (2, 1), 200, 24),
        (BF16, BF16, 100, (3, 1), 515, 24),
        (BF16, INT8, 3, (4, 2), 70, 24),
        (F32, F32, 30, (2, 1), 70, 136),
    ):
        name = f"{q} over {cache}, window {window}, D = {head_dim}"
        batch = batch_of(q, [33, context, 20], [1, 8, 20], heads, head_dim, dtype=cache, window=window)
        whole = batch.run(SPLITS)
        found.same(f"{name}, walk", batch.run(WALK), whole)
        rows = whole[batch.rows(1)]
        for i in (4, 7):
            found.same(f"{name}, step {i}", only(batch, 1, i, i + 1).run(WALK if i == 4 else SPLITS), rows[i : i + 1])
        found.same(f"{name}, chunk", only(batch, 1, 2, 7).run(WALK), rows[2:7])
        found.same(f"{name}, alone", only(batch, 2).run(SPLITS), whole[batch.rows(2)])
        order = torch.randperm(len(batch.key_cache))  # block i moves to order[i]
        keys, values = torch.empty_like(batch.key_cache), torch.empty_like(batch.value_cache)
        keys[order], values[order] = batch.key_cache, batch.value_cache
        table = torch.where(batch.block_table >= 0, order[batch.block_table.clamp(min=0).long()].int(), batch.block_table)
        moved = replace(batch, key_cache=keys, value_cache=values, block_table=table)
        found.same(f"{name}, other blocks", moved.run(SPLITS), whole)
    return found.report()


def trees() -> dict[str, Any]:
    """Each row has the bits of its path as a sequence; across tiles and splits, with windows, beside causal sequences."""
    found = Found()
    cases = [
        batch_of(F32, [500 + 20, 9], [9, 1], (2, 1), 16, trees=[tree("deep", 20, 1), None]),
        batch_of(BF16, [60 + 9, 70], [9, 2], (3, 1), 16, dtype=BF16, window=5, trees=[tree("wide", 9, 2), None]),
        batch_of(F32, [1 + 12], [5], (2, 2), 8, dtype=INT8, block_size=32, trees=[tree("forest", 12, 3)]),
        batch_of(F32, [3 + 64], [2], (1, 1), 8, trees=[tree("chain", 64)]),
        batch_of(F32, [14 + 6], [3], (2, 1), 136, trees=[tree("wide", 6, 4)]),
    ]
    for i, batch in enumerate(cases):
        out = batch.run(SPLITS)
        found.close(f"tree {i}", batch, out)
        found.same(f"tree {i}, walk", batch.run(WALK), out)
        try:
            assert_equals_paths(WALK, batch, out)
        except AssertionError as error:
            found.wrong.append(f"tree {i}: {error}")
    wide = replace(cases[0], q=cases[0].q.to(F16))
    found.close("wide", wide, wide.run(WIDE))
    plain = batch_of(F32, [40], [2], (2, 1), 8, trees=[None])
    found.same("no tree", plain.run(WALK), replace(plain, tree_start=None, ancestors=None).run(WALK))
    return found.report()


def hostile() -> dict[str, Any]:
    """NaN and infinities harm the rows that see them, and no other, in any way of calling."""
    found = Found()
    for cache, way in ((F32, WALK), (BF16, SPLITS), (INT8, SPLITS)):
        batch = batch_of(F32, [70, 20], [8, 1], (2, 1), 16, dtype=cache)
        clean = batch.run(way)
        for value in (NAN, torch.inf):
            for side in ("key_cache", "value_cache"):
                dirty = replace(batch, **{side: getattr(batch, side).clone()})
                put(getattr(dirty, side), side == "key_cache", *batch.slots(0, torch.tensor([66])), value)  # seen by the last 4 rows of 8
                out, name = dirty.run(way), f"{cache}, {value} in {side}"
                found.same(name, torch.cat((out[:4], out[8:])), torch.cat((clean[:4], clean[8:])))
                seen, before = out[4:8], clean[4:8]
                found.true(f"{name}: rows that see it", seen.isnan().all() if value != value else not torch.equal(seen, before))
                alone = only(dirty, 0, 5, 6).run(way)
                found.true(f"{name}: alone", torch.equal(alone[0].nan_to_num(7.0), out[5].nan_to_num(7.0)))
    dirty = replace(batch, q=batch.q.clone())
    dirty.q[3] = NAN
    out = dirty.run(SPLITS)
    found.same("a bad query", torch.cat((out[:3], out[4:])), torch.cat((clean[:3], clean[4:])))
    found.true("a bad query's row", out[3].isnan().all())
    batch = batch_of(F32, [24], [24], (2, 1), 8, trees=[tree("wide", 24, 5)])
    clean = batch.run(WALK)
    for node in (1, 9):
        below, out = batch.path(0)[:, node], batch.fill(0, torch.tensor([node]), NAN).run(WALK)
        found.same(f"a bad node {node}", out[~below], clean[~below])
        found.true(f"below a bad node {node}", not out[below].isfinite().any())
    batch = batch_of(F32, [530], [1], (1, 1), 8)
    batch.q[0] = 1.0
    for token in range(512):
        batch.key_cache[batch.block_table[0, token // 16], :, 0, :, token % 16] = -torch.inf
        batch.keys[0][token] = -torch.inf
    found.close("a split of scores of -inf", batch, batch.run(SPLITS))
    return found.report()


def padding() -> dict[str, Any]:
    """Padded tokens and sequences do nothing, and values out of range are not followed: beside them others keep their bits."""
    found = Found()
    batch = batch_of(F32, [70, 33], [2, 1], (2, 1), 16)
    clean = batch.run(SPLITS)
    padded = replace(
        batch,
        q=torch.cat((batch.q, torch.full((4, 2, 16), NAN))),
        block_table=torch.cat((batch.block_table, batch.block_table.new_full((3, batch.block_table.shape[1]), LARGEST))),
        query_start=torch.cat((batch.query_start, batch.query_start[-1:].expand(3))).contiguous(),
        context_len=torch.cat((batch.context_len, torch.zeros(3, dtype=torch.int32))),
    )
    for name, way in (("splits", SPLITS), ("walk", WALK)):
        out = padded.run(way)
        found.same(f"padding, {name}", out[:3], clean)
        found.true(f"padded rows are not written, {name}", (out[3:] == 99.0).all())
    # The second sequence is out of range: its rows may hold anything.
    for name, change in {
        "block": {"block_table": batch.block_table.index_fill(0, torch.tensor([1]), LARGEST)},
        "block below": {"block_table": batch.block_table.index_fill(0, torch.tensor([1]), -LARGEST)},
        "context": {"context_len": torch.tensor([70, LARGEST], dtype=torch.int32)},
        "context below": {"context_len": torch.tensor([70, -LARGEST], dtype=torch.int32)},
        "query start": {"query_start": torch.tensor([0, 2, LARGEST], dtype=torch.int32)},
        "query start below": {"query_start": torch.tensor([0, 2, -LARGEST], dtype=torch.int32)},
        "tree": {"tree_start": torch.tensor([-1, LARGEST], dtype=torch.int32), "ancestors": torch.tensor([0, 0, -1])},
        "tree below": {"tree_start": torch.tensor([-1, 30], dtype=torch.int32), "ancestors": torch.tensor([0, 0, -(2**63)])},
    }.items():
        for way in (SPLITS, WALK):
            found.same(name, replace(batch, **change).run(way)[:2], clean[:2])
    empty = replace(batch, q=batch.q[:0], query_start=torch.zeros(3, dtype=torch.int32))
    found.true("no tokens", empty.run(SPLITS).shape == (0, 2, 16))
    none = replace(empty, block_table=batch.block_table[:0], query_start=empty.query_start[:1], context_len=batch.context_len[:0])
    found.true("no sequences", none.run(WALK).shape == (0, 2, 16))
    nothing = replace(batch, context_len=torch.zeros(2, dtype=torch.int32))
    found.same("nothing to see", nothing.run(WALK), torch.zeros(3, 2, 16))
    found.same("nothing to see, in splits", nothing.run(SPLITS), torch.zeros(3, 2, 16))
    return found.report()


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "oracle": oracle, "bits": bits, "trees": trees, "hostile": hostile, "padding": padding,
}  # fmt: skip


if __name__ == "__main__":
    triton_cases.patch_once()
    triton_interpreter.exact_conversions()
    triton_interpreter.exact_products()
    triton_interpreter.bounds_of_loops()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
