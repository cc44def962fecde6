"""Batches for ``paged_attention``, causal and with trees of drafts, with the dense keys and values they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.kernels import checks

GARBAGE = -123456  # where nothing may be read
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # of caches
DTYPE_IDS = ("fp32", "bf16", "int8")


def empty_caches(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values that all are NaN."""
    if dtype in (torch.int8, torch.float8_e4m3fn):  # -1 four times is a NaN of float32, and by itself one of float8
        shape = (num_blocks, num_kv_heads, block_size // 16, head_dim + 4, 16)
        key_cache, value_cache = (torch.full(shape, -1, dtype=torch.int8).view(dtype) for _ in range(2))
        return key_cache, value_cache
    key_cache = torch.full((num_blocks, num_kv_heads, block_size // 16, head_dim, 16), NAN, dtype=dtype)
    return key_cache, torch.full((num_blocks, num_kv_heads, block_size, head_dim), NAN, dtype=dtype)


def int8_tokens(cache: Tensor, is_key: bool) -> tuple[Tensor, Tensor]:
    """Views of a cache with scales: bytes ``[num_blocks, sub-block, token in it, num_kv_heads, head_dim]``, and scales without the last."""
    cache = cache.view(torch.int8)
    rows, head_dim = cache.view(torch.int8).flatten(-2), cache.shape[3] - 4
    integers = rows[..., : 16 * head_dim]
    integers = integers.unflatten(-1, (head_dim, 16)).mT if is_key else integers.unflatten(-1, (16, head_dim))
    return integers.permute(0, 2, 3, 1, 4), rows[..., 16 * head_dim :].view(torch.float32).permute(0, 2, 3, 1)


def put(cache: Tensor, is_key: bool, block: Tensor, offset: Tensor, x: Tensor | float) -> None:
    """Write ``x [tokens, num_kv_heads, head_dim]`` or one value into slots. Of a cache with scales, values of ``in_scaled``."""
    if cache.dtype in checks.SCALED_DTYPES:
        integers, scales = int8_tokens(cache, is_key)
        if isinstance(x, float):
            scales[block, offset // 16, offset % 16] = x
        else:
            scale = x.abs().amax(-1) / checks.cache_limit(cache.dtype)
            scales[block, offset // 16, offset % 16] = scale
            numbers = x / scale[..., None]
            numbers = numbers.round() if cache.dtype == torch.int8 else numbers
            integers[block, offset // 16, offset % 16] = numbers.to(cache.dtype).view(torch.int8)
    elif is_key:
        cache[block, :, offset // 16, :, offset % 16] = x
    else:
        cache[block, :, offset] = x


def in_scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Near ``x``, but what a cache with scales holds: its numbers, of which the largest is the limit, times scales so short that products
    are exact."""
    limit = checks.cache_limit(dtype)
    scales = (x.abs().amax(-1) / limit).bfloat16().float()[..., None]
    numbers = (x / scales).clamp(-limit, limit)
    numbers = numbers.round() if dtype == torch.int8 else numbers.to(dtype).float()
    return numbers.scatter(-1, x.abs().argmax(-1, keepdim=True), limit) * scales


@dataclass
class Batch:
    """Arguments of paged_attention, and the dense keys and values they stand for."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    query_start: Tensor
    context_len: Tensor
    scale: float
    window: int
    keys: list[Tensor]  # per sequence [context, num_kv_heads, head_dim], rounded as the cache rounds; float32 for int8
    values: list[Tensor]
    tree_start: Tensor | None = None
    ancestors: Tensor | None = None

    def run(self, backend: Any) -> Tensor:
        return backend.paged_attention(
            self.q, self.key_cache, self.value_cache, self.block_table, self.query_start, self.context_len,
            scale=self.scale, window=self.window, tree_start=self.tree_start, ancestors=self.ancestors,
        )  # fmt: skip

    def rows(self, sequence: int) -> slice:
        return slice(int(self.query_start[sequence]), int(self.query_start[sequence + 1]))

    def tree(self, sequence: int) -> int:
        return -1 if self.tree_start is None else int(self.tree_start[sequence])

    def path(self, sequence: int) -> Tensor:
        """Which tokens each query row has before it, itself included: bool ``[queries, context]``."""
        rows, context, tree = self.rows(sequence), int(self.context_len[sequence]), self.tree(sequence)
        queries, token = rows.stop - rows.start, torch.arange(context)
        if tree < 0:
            return token <= torch.arange(context - queries, context)[:, None]
        assert self.ancestors is not None
        above = self.ancestors[rows, None] >> (token - tree).clamp(0) & 1
        return (token < tree) | above.bool()

    def seen(self, sequence: int) -> Tensor:
        """Those of them in the window."""
        path = self.path(sequence)
        back = path.flip(1).cumsum(1).flip(1)  # 1 for the row's own token
        return path & (back <= self.window) if self.window else path

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The definition: masked softmax over the whole context."""
        parts = []
        for s, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            q = self.q[self.rows(s)].to(dtype)
            q = q.unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)  # [num_kv_heads, group, queries, head_dim]
            keys, values = (t.to(dtype).transpose(0, 1)[:, None] for t in (keys, values))  # [num_kv_heads, 1, context, head_dim]
            scores = (q @ keys.mT * self.scale).masked_fill(~self.seen(s), -torch.inf)
            parts.append((scores.softmax(-1) @ values).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(parts)

    @property
    def block_size(self) -> int:
        return self.key_cache.shape[2] * 16

    def slots(self, sequence: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks and the offsets in them of some tokens."""
        return self.block_table[sequence, tokens // self.block_size].long(), tokens % self.block_size

    def fill(self, sequence: int, tokens: Tensor, value: float) -> Batch:
        """The same with other contents in the slots of some tokens."""
        changed = replace(self, key_cache=self.key_cache.clone(), value_cache=self.value_cache.clone())
        block, offset = self.slots(sequence, tokens)
        put(changed.key_cache, True, block, offset, value)
        put(changed.value_cache, False, block, offset, value)
        return changed


def page(
    q: Tensor,
    queries: Sequence[int],
    keys: list[Tensor],
    values: list[Tensor],
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    window: int = 0,
    trees: Sequence[Sequence[int] | None] | None = None,
    seed: int = 0,
) -> Batch:
    """Dense keys and values over blocks of a cache of ``dtype``, in random order; unused slots hold NaN, unused table entries garbage.
    ``trees``: the nodes' ancestors (``masks``), or None for a causal sequence."""
    contexts = [len(k) for k in keys]
    num_kv_heads, head_dim = keys[0].shape[1], keys[0].shape[2]
    used = [-(-c // block_size) for c in contexts]
    blocks = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(seed))
    batch = Batch(
        q,
        *empty_caches(len(blocks), num_kv_heads, block_size, head_dim, dtype),
        torch.full((len(contexts), max(used) + 2), GARBAGE, dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        head_dim**-0.5, window, keys, values,
    )  # fmt: skip
    if trees is not None:
        start = [-1 if tree is None else c - len(tree) for tree, c in zip(trees, contexts, strict=True)]
        rows = [[GARBAGE] * n if tree is None else tree[len(tree) - n :] for tree, n in zip(trees, queries, strict=True)]
        batch.tree_start = torch.tensor(start, dtype=torch.int32)
        batch.ancestors = torch.tensor([(m + 2**63) % 2**64 - 2**63 for m in itertools.chain(*rows)], dtype=torch.int64)
    for s, mine in enumerate(blocks.split([*used, 3])[:-1]):
        batch.block_table[s, : used[s]] = mine
        block, offset = batch.slots(s, torch.arange(contexts[s]))
        put(batch.key_cache, True, block, offset, keys[s])
        put(batch.value_cache, False, block, offset, values[s])
        if queries[s]:  # blocks that slid out of every window may have been freed
            oldest = int(batch.seen(s).any(0).int().argmax())
            batch.block_table[s, : (oldest if batch.tree(s) < 0 else min(oldest, batch.tree(s))) // block_size] = GARBAGE
    return batch


def make_batch(
    contexts: Sequence[int],
    queries: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    trees: Sequence[Sequence[int] | None] | None = None,
    seed: int = 0,
) -> Batch:
    """A random batch."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    round_ = (lambda x: in_scaled(x, dtype)) if dtype in checks.SCALED_DTYPES else (lambda x: x.to(dtype))
    keys, values = (
        [round_(torch.randn(context, num_kv_heads, head_dim, generator=generator)) for context in contexts] for _ in range(2)
    )  # fmt: skip
    q = torch.randn(sum(queries), num_heads, head_dim, generator=generator)
    return page(q, queries, keys, values, dtype=dtype, block_size=block_size, window=window, trees=trees, seed=seed)


def only(batch: Batch, sequence: int, first: int = 0, last: int | None = None) -> Batch:
    """The query rows [first, last) of one sequence as a call of their own, when later tokens are not in the cache yet."""
    rows = batch.rows(sequence)
    whole, queries = int(batch.context_len[sequence]), rows.stop - rows.start
    last = queries if last is None else last
    context = whole - queries + last
    part = batch.fill(sequence, torch.arange(context, whole), NAN)
    rows = slice(rows.start + first, rows.start + last)
    table = batch.block_table[sequence : sequence + 1].clone()
    table[0, -(-context // batch.block_size) :] = GARBAGE
    start, length = torch.tensor([0, last - first], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    if batch.tree_start is not None and batch.ancestors is not None:
        part = replace(part, tree_start=batch.tree_start[sequence : sequence + 1], ancestors=batch.ancestors[rows])
    return replace(part, q=batch.q[rows].contiguous(), block_table=table, query_start=start, context_len=length)


def assert_close(batch: Batch, out: Tensor) -> None:
    exact = batch.dense()
    error = (out - exact).abs().max().item()
    if not error <= 1e-5:
        allowed = 2 * (batch.dense(torch.float32) - exact).abs().max().item()
        assert error <= allowed, f"error {error:.2e}, twice that of PyTorch in float32 {allowed:.2e}"
