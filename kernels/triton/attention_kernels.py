"""The kernels of ``paged_attention``: flash attention over splits of the keys, each row with the same bits in every call.

A program has the rows of one *query tile*: a few query tokens of one sequence times the query heads of one KV head, 16 rows in all, so
that decode and verification use one MMA shape. It goes over *key tiles* of TILE positions at absolute multiples of TILE with the online
softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), in base 2:

    M' = max(M, max_j s_j),   L' = L 2^(M - M') + sum_j p_j,   A' = A 2^(M - M') + sum_j p_j v_j,   p_j = 2^(s_j - M')

Every split of SPLIT positions begins anew, and the splits of a row are folded in order by the same identity (FlashDecoding, Dao et al.
2023). ``attention_walk`` does that in one program; in ``attention_splits`` every split is a program of its own, which writes (M, L, A),
and ``attention_merge`` folds. The operations on a row are the same either way.

Why a row does not depend on the rows around it. A key it does not see has the weight 0, does not change its maximum, and enters the
products as an exact zero; an MMA computes each element of its result by itself. L is the product of the weights with ones, so its bits
do not depend on how a compiled kernel lays out its sums. Key tiles of which all rows see all go the quick way; the others, at the end of
the context and at the edge of a window, are masked. There the values of a token that holds an infinity or a NaN are taken for zeros, and
the rows that see it get NaN for it: zero times infinity must not reach a row that does not. A row that sees one is NaN throughout.

Trees (tree attention, Miao et al. 2024). The nodes of a query's path count as positions that follow one another. Key tiles with such
positions are walked query by query, with the keys and values of its path gathered in the order of depth: the columns, and so the
bits, are those of the path as a sequence.

Grids: query tiles x (KV heads x tiles of the heads of one) [x splits]; of the merge, tokens x heads. The number of query tiles is bounded
by shapes, T // QUERIES + S; a program finds its sequence by counting, and programs beyond the end, of a sequence or its splits, exit.

Bytes: keys and values of a context once for every query tile, and the results of its splits, 4 (D + 2) for each of its rows, written and
read. Float32 queries with a head_dim above 128 are read again for every key tile, from the caches. Called by ``attention`` (and by
``fast``, in tiles of 64 rows without splits).

Values out of range are never followed: blocks are clamped to the cache, contexts to the block table, rows to the call. What
all kernels compute is in ``attention_tiles``.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

from .attention_tiles import FAR, NONE, count_bits, fold, load_queries, result_of, split_of

SPLIT = tl.constexpr(512)  # positions

_ANY_VALUE = ("tokens", "sequences", "blocks", "max_blocks", "splits", "window")
_ANY_ALIGNMENT = ("block_table", "query_start", "context_len", "tree_start", "ancestors")


def _kernel(function: Any) -> Any:
    """``triton.jit`` for the functions that are launched: what changes from step to step compiles nothing anew."""
    names = set(inspect.signature(function).parameters)
    return triton.jit(
        function,
        do_not_specialize=[name for name in _ANY_VALUE if name in names],
        do_not_specialize_on_alignment=[name for name in _ANY_VALUE + _ANY_ALIGNMENT if name in names],
    )


# ---- who sees what ----


@triton.jit
def _find_sequence(place, query_start, sequences, QUERIES: tl.constexpr, EXTRA: tl.constexpr):
    """The last sequence s with ``query_start[s] // QUERIES + EXTRA s <= place``, by counting: loads that do not wait for each other."""
    before = 0
    for begin in tl.range(0, sequences, 256, num_stages=1):
        s = begin + tl.arange(0, 256)
        place_of = tl.load(query_start + s, mask=s < sequences, other=FAR) // QUERIES + EXTRA * s
        before += tl.sum(((s < sequences) & (place_of <= place)).to(tl.int32), axis=0)
    return tl.maximum(before - 1, 0)


@triton.jit
def _sequence(s, query_start, context_len, tree_start, tokens, max_blocks, BLOCK_SIZE: tl.constexpr):
    """The first query row of a sequence, its number of rows, its context, and where its tree begins (-1: nowhere)."""
    first = tl.minimum(tl.maximum(tl.load(query_start + s), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(query_start + s + 1), 0), tokens)
    context = tl.minimum(tl.load(context_len + s), max_blocks * BLOCK_SIZE)
    tree = -1
    if tree_start is not None:
        tree = tl.load(tree_start + s)
    return first, end - first, context, tree


@triton.jit
def _seen(query, there, first, queries, context, tree, ancestors, window, WINDOWED: tl.constexpr):
    """The positions [low, high) that query rows of a sequence see; none where not ``there``."""
    high = context - queries + query + 1
    if ancestors is not None:
        if tree >= 0:
            path = tl.load(ancestors + first + query, mask=there, other=0)
            high = tree + count_bits(path)
    high = tl.where(there, tl.minimum(high, context), 0)
    if WINDOWED:
        low = tl.maximum(high - window, 0)
    else:
        low = high - high
    return low, high


# ---- the kernels ----


@triton.jit
def _tile(
    place, head_tile, query_start, context_len, tree_start, ancestors, tokens, sequences, max_blocks, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """What the rows of a query tile are, what they see, and which key tiles they need."""
    group: tl.constexpr = HEADS // KV_HEADS
    s = _find_sequence(place, query_start, sequences, QUERIES, 1)
    first, queries, context, tree = _sequence(s, query_start, context_len, tree_start, tokens, max_blocks, BLOCK_SIZE)
    before = (place - tl.load(query_start + s) // QUERIES - s) * QUERIES  # queries of the sequence in earlier tiles
    count = tl.where((before >= 0) & (before < queries), tl.minimum(queries - before, QUERIES), 0)
    row = tl.arange(0, ROWS)
    query = row // TILE_HEADS
    head_in_group = head_tile % HEAD_TILES * TILE_HEADS + row % TILE_HEADS
    there = (query < count) & (head_in_group < group)
    if QUERIES * TILE_HEADS < ROWS:
        there = there & (query < QUERIES)
    kv_head = head_tile // HEAD_TILES
    low, high = _seen(before + query, there, first, queries, context, tree, ancestors, window, WINDOWED)
    # Rows of q and of the result, 64 bits: T x heads x D may pass 2^31.
    index = (first + before + query).to(tl.int64) * HEADS + kv_head * group + head_in_group
    return s, first, before, count, tree, context, query, there, low, high, index, kv_head


@triton.jit
def _key_tiles(there, low, high, tree, TILE: tl.constexpr):
    """The key tiles [begin, end) that some row sees, and [whole_begin, whole_end), of which all rows see all."""
    begin = tl.min(tl.where(there, low, FAR), axis=0) // TILE
    end = (tl.max(high, axis=0) + TILE - 1) // TILE
    whole_begin = (tl.max(low, axis=0) + TILE - 1) // TILE
    committed = tl.where(tree >= 0, tree, FAR)
    whole_end = tl.minimum(tl.min(tl.where(there, high, FAR), axis=0), committed) // TILE
    return begin, end, whole_begin, whole_end


@_kernel
def attention_walk(
    q, key_cache, value_cache, key_scales, value_scales, block_table, query_start, context_len, tree_start, ancestors, out,
    tokens, sequences, blocks, max_blocks, window, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT_TILES: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, CHUNK: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query tile over all of its splits. The last tiles, which see the most, come first."""
    dtype: tl.constexpr = q.dtype.element_ty
    s, first, before, count, tree, context, query, there, low, high, index, kv_head = _tile(
        tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), query_start, context_len, tree_start, ancestors, tokens, sequences,
        max_blocks, window, HEADS, KV_HEADS, TILE_HEADS, HEAD_TILES, QUERIES, ROWS, TILE, BLOCK_SIZE, WINDOWED,
    )  # fmt: skip
    if count > 0:
        begin, end, whole_begin, whole_end = _key_tiles(there, low, high, tree, TILE)
        queries = load_queries(q, index, there, DIM, PADDED, dtype)
        table = block_table + s.to(tl.int64) * max_blocks
        path = None
        if ancestors is not None:
            path = ancestors + first + before
        if SPLIT_TILES == 0:
            most, weight, total = split_of(
                0, queries, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
                query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
                KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, ROWS, SPLIT_TILES, WINDOWED, STAGES, dtype,
            )  # fmt: skip
        else:
            most = tl.full([ROWS], NONE, tl.float32)
            weight = tl.zeros([ROWS], tl.float32)
            total = tl.zeros([ROWS, PADDED], tl.float32)
            for split in tl.range(begin // SPLIT_TILES, (end + SPLIT_TILES - 1) // SPLIT_TILES, num_stages=1):
                split_most, split_weight, split_total = split_of(
                    split, queries, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
                    query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
                    KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, ROWS, SPLIT_TILES, WINDOWED, STAGES, dtype,
                )  # fmt: skip
                most, weight, total = fold(most, weight, total, split_most, split_weight, split_total)
        d = tl.arange(0, PADDED)
        result = result_of(low < high, weight, total, dtype)
        tl.store(out + index[:, None] * DIM + d[None, :], result, mask=there[:, None] & (d[None, :] < DIM))


@_kernel
def attention_splits(
    q, key_cache, value_cache, key_scales, value_scales, block_table, query_start, context_len, tree_start, ancestors,
    split_maximum, split_weight, split_total, tokens, sequences, blocks, max_blocks, splits, window, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT_TILES: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, CHUNK: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query tile over one split: its (M, L, A) for ``attention_merge``."""
    dtype: tl.constexpr = q.dtype.element_ty
    split = tl.program_id(2)
    s, first, before, count, tree, context, query, there, low, high, index, kv_head = _tile(
        tl.program_id(0), tl.program_id(1), query_start, context_len, tree_start, ancestors, tokens, sequences, max_blocks, window,
        HEADS, KV_HEADS, TILE_HEADS, HEAD_TILES, QUERIES, ROWS, TILE, BLOCK_SIZE, WINDOWED,
    )  # fmt: skip
    begin, end, whole_begin, whole_end = _key_tiles(there, low, high, tree, TILE)
    if (count > 0) & (begin < (split + 1) * SPLIT_TILES) & (end > split * SPLIT_TILES):
        queries = load_queries(q, index, there, DIM, PADDED, dtype)
        table = block_table + s.to(tl.int64) * max_blocks
        path = None
        if ancestors is not None:
            path = ancestors + first + before
        most, weight, total = split_of(
            split, queries, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
            query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
            KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, ROWS, SPLIT_TILES, WINDOWED, STAGES, dtype,
        )  # fmt: skip
        place = index * splits + split
        d = tl.arange(0, PADDED)
        tl.store(split_maximum + place, most, mask=there)
        tl.store(split_weight + place, weight, mask=there)
        tl.store(split_total + place[:, None] * DIM + d[None, :], total, mask=there[:, None] & (d[None, :] < DIM))


@_kernel
def attention_merge(
    split_maximum, split_weight, split_total, query_start, context_len, tree_start, ancestors, out,
    tokens, sequences, max_blocks, splits, window,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WINDOWED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One row: its splits in order, AHEAD of them loaded at a time."""
    token = tl.program_id(0)
    s = _find_sequence(token, query_start, sequences, 1, 0)
    first, queries, context, tree = _sequence(s, query_start, context_len, tree_start, tokens, max_blocks, BLOCK_SIZE)
    if (token >= first) & (token < first + queries):
        row = tl.arange(0, 1)
        low, high = _seen(token - first + row, row == 0, first, queries, context, tree, ancestors, window, WINDOWED)
        oldest = tl.max(low, axis=0)
        newest = tl.max(high, axis=0)
        index = token.to(tl.int64) * HEADS + tl.program_id(1)
        d = tl.arange(0, PADDED)
        most = tl.full([1], NONE, tl.float32)
        weight = tl.zeros([1], tl.float32)
        total = tl.zeros([1, PADDED], tl.float32)
        last = (newest + SPLIT - 1) // SPLIT
        for begin in tl.range(oldest // SPLIT, last, AHEAD, num_stages=1):
            for i in tl.static_range(AHEAD):
                there = begin + i < last
                place = index * splits + begin + i + row
                split_m = tl.load(split_maximum + place, mask=there, other=NONE)
                split_l = tl.load(split_weight + place, mask=there, other=0.0)
                split_a = tl.load(split_total + place[:, None] * DIM + d[None, :], mask=there & (d[None, :] < DIM), other=0.0)
                most, weight, total = fold(most, weight, total, split_m, split_l, split_a)
        result = result_of(low < high, weight, total, out.dtype.element_ty)
        tl.store(out + index * DIM + d[None, :], result, mask=d[None, :] < DIM)
