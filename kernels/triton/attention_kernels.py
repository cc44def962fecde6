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
do not depend on how a compiled kernel lays out its sums. Key tiles that all rows see whole go the quick way. The others, at the end of
the context and at the edge of a window, do so too, masked, unless that could show: where the values hold an infinity or a NaN, times the
zero weight of a row that does not see it, the tile is walked query by query.

Trees (tree attention, Miao et al. 2024). The nodes of a query's path count as positions that follow one another. Key tiles with such
positions are walked query by query too, with the keys and values of its path gathered in the order of depth: the columns, and so the
bits, are those of the path as a sequence.

Grids: query tiles x (KV heads x tiles of the heads of one) [x splits]; of the merge, tokens x heads. The number of query tiles is bounded
by shapes, T // QUERIES + S; a program finds its sequence by bisection, and programs beyond the end, of a sequence or its splits, exit.

Bytes: keys and values of a context once for every query tile, and the results of its splits, 4 (D + 2) for each of its rows, written and
read. Called by ``attention``.

Values out of range are never followed: blocks are clamped to the cache, contexts to the block table, rows to the call.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl
from triton import knobs

SPLIT = tl.constexpr(512)  # positions
_LANES = tl.constexpr(16)  # tokens of a sub-block
_ONES = tl.constexpr(16)  # columns of L: the least that an MMA has
_FAR = tl.constexpr(2**31 - 1)
_NONE = tl.constexpr(float("-inf"))
_PRECISION = tl.constexpr("tf32x3")

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


# ---- numbers ----


_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _is_not_finite(x):
    """Whether x, float32 or bfloat16, is infinite or NaN, by its bits."""
    if x.dtype == tl.bfloat16:
        bad = (x.to(tl.int16, bitcast=True) & 0x7F80) == 0x7F80
    else:
        bad = (x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    return bad


@triton.jit
def _stored(x):
    """Keys or values as loaded. Bytes are asked for in a form that keeps the compiler from laying them out as operands of products before
    they are widened: in shared memory that would be a transposition byte by byte, which asynchronous copies cannot do."""
    if x.dtype.primitive_bitwidth == 8 and not _INTERPRETED:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=4)
    else:
        y = x
    return y


@triton.jit
def _count_bits(x):
    """How many bits of int64 are set."""
    x = (x & 0x5555555555555555) + ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x & 0x0F0F0F0F0F0F0F0F) + ((x >> 4) & 0x0F0F0F0F0F0F0F0F)
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 0x7F).to(tl.int32)


# ---- who sees what ----


@triton.jit
def _find_sequence(place, query_start, sequences, QUERIES: tl.constexpr, EXTRA: tl.constexpr):
    """The last sequence s with ``query_start[s] // QUERIES + EXTRA s <= place``; the first if there is none."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(query_start + middle) // QUERIES + EXTRA * middle
        low = tl.where(begins <= place, middle, low)
        high = tl.where(begins <= place, high, middle)
    return low


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
            high = tree + _count_bits(path)
    high = tl.where(there, tl.minimum(high, context), 0)
    if WINDOWED:
        low = tl.maximum(high - window, 0)
    else:
        low = high - high
    return low, high


@triton.jit
def _path_nodes(path, depth):
    """Which nodes of a path, bits of int64, have the depths ``depth``, from 0: by bisection of the bits."""
    node = depth * 0
    for i in tl.static_range(6):
        half = 32 >> i
        below = _count_bits((path >> node.to(tl.int64)) << (64 - half))  # of the next `half` bits
        beyond = depth >= below
        node = tl.where(beyond, node + half, node)
        depth = tl.where(beyond, depth - below, depth)
    return node


# ---- the arithmetic ----


@triton.jit
def _step(q, k, v, factor, value_scale, seen, most, weight, total, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """(M, L, A) with a key tile more: ``k [D, TILE]`` and ``v [TILE, D]`` as stored, ``factor`` of the scores."""
    score = tl.dot(q, _stored(k).to(DTYPE), input_precision=_PRECISION) * factor
    if MASKED:
        score = tl.where(seen, score, _NONE)
    top = tl.maximum(most, tl.max(score, axis=1))
    base = tl.where(top == _NONE, 0.0, top)  # without keys that count: weights 0, not NaN
    old = tl.exp2(most - base)[:, None]
    p = tl.exp2(score - base[:, None])
    ones = tl.full([p.shape[1], _ONES], 1.0, tl.float32).to(DTYPE)
    weight = tl.dot(p.to(DTYPE), ones, weight * old, input_precision=_PRECISION)
    if value_scale is not None:
        p = p * value_scale[None, :]
        if MASKED:
            p = tl.where(seen, p, 0.0)  # a scale may be NaN
    elif MASKED:
        bad = tl.max(_is_not_finite(v).to(tl.int32), axis=1)
        hit = tl.max(tl.where(seen, bad[None, :], 0), axis=1)
        total = tl.where(hit[:, None] != 0, float("nan"), total)
        v = tl.where(bad[:, None] != 0, 0.0, v)
    total = tl.dot(p.to(DTYPE), _stored(v).to(DTYPE), total * old, input_precision=_PRECISION)
    return top, weight, total


@triton.jit
def _fold(most, weight, total, split_most, split_weight, split_total):
    """(M, L, A) with a split more. Beginning with (-inf, 0, 0) it is the split; with such a split nothing changes."""
    top = tl.maximum(most, split_most)
    base = tl.where(top == _NONE, 0.0, top)
    old = tl.exp2(most - base)
    new = tl.exp2(split_most - base)
    return top, weight * old + split_weight * new, total * old[:, None] + split_total * new[:, None]


@triton.jit
def _result(there, weight, total, DTYPE: tl.constexpr):
    """A / L; NaN throughout where A is not finite; 0 where not ``there``."""
    share = tl.div_rn(tl.full(weight.shape, 1.0, tl.float32), weight)
    bad = tl.max(_is_not_finite(total).to(tl.int32), axis=1)
    ratio = tl.where(bad[:, None] != 0, float("nan"), total * share[:, None])
    return tl.where(there[:, None], ratio, 0.0).to(DTYPE)


# ---- keys and values ----


@triton.jit
def _chunks(table, sub_block, needed, blocks, kv_head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where sub-blocks of a sequence lie, counted in sub-blocks of the cache. ``needed``: None for all."""
    per_block: tl.constexpr = BLOCK_SIZE // _LANES
    block = tl.load(table + sub_block // per_block, mask=needed)
    block = tl.minimum(tl.maximum(block, 0), blocks - 1).to(tl.int64)
    return (block * KV_HEADS + kv_head) * per_block + sub_block % per_block


@triton.jit
def _load_keys(key_cache, chunk, lane, needed, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """``[D, TILE]``."""
    d = tl.arange(0, PADDED)
    there = None
    if needed is not None:
        there = needed[None, :] & (d[:, None] < DIM)
    elif PADDED != DIM:
        there = (d[:, None] < DIM) & (lane[None, :] >= 0)
    pointers = key_cache + (chunk * CHUNK + lane)[None, :] + d[:, None] * _LANES
    if there is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=there, other=0.0)
    return x


@triton.jit
def _gather_keys(key_cache, chunk, lane, needed, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """``[D, TILE]`` of tokens that lie anywhere: loaded as ``[TILE, D]``, for which a thread needs the addresses of few tokens."""
    d = tl.arange(0, PADDED)
    pointers = key_cache + (chunk * CHUNK + lane)[:, None] + d[None, :] * _LANES
    return tl.trans(tl.load(pointers, mask=needed[:, None] & (d[None, :] < DIM), other=0.0))


@triton.jit
def _load_values(value_cache, chunk, lane, needed, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """``[TILE, D]``."""
    d = tl.arange(0, PADDED)
    there = None
    if needed is not None:
        there = needed[:, None] & (d[None, :] < DIM)
    elif PADDED != DIM:
        there = (lane[:, None] >= 0) & (d[None, :] < DIM)
    pointers = value_cache + (chunk * CHUNK + lane * DIM)[:, None] + d[None, :]
    if there is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=there, other=0.0)
    return x


@triton.jit
def _load_scales(scales, chunk, lane, needed, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """``[TILE]``: those of a sub-block lie behind its elements, in units of four bytes."""
    pointers = scales + chunk * (CHUNK // 4) + (DIM * _LANES // 4) + lane
    if needed is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=needed, other=0.0)
    return x


@triton.jit
def _edge_tiles(
    first_tile, last_tile, most, weight, total, q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
    query, there, low, high, tree, context, path, count,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(M, L, A) with the key tiles [first_tile, last_tile) more, of which not every row sees all.

    ``query``: each row's query in the tile, of ``count``; ``path``: where their ancestors lie, or None.
    """
    column = tl.arange(0, TILE)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        position = tile * TILE + column
        sub_block = tile * (TILE // _LANES) + column // _LANES
        if path is None:
            most, weight, total = _masked_tile(
                position, sub_block, column % _LANES, False, most, weight, total, q, key_cache, value_cache, key_scales, value_scales,
                table, blocks, kv_head, factor, there, low, high, KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, DTYPE,
            )  # fmt: skip
        else:
            in_tree = (tree >= 0) & ((tile + 1) * TILE > tree)
            for i in tl.range(0, tl.where(in_tree, count, 1), num_stages=1):
                token = position
                if in_tree:
                    token = tl.where(position >= tree, tree + _path_nodes(tl.load(path + i), position - tree), position)
                    token = tl.minimum(tl.maximum(token, 0), context - 1)
                most, weight, total = _masked_tile(
                    position, token // _LANES, token % _LANES, True, most, weight, total, q, key_cache, value_cache, key_scales,
                    value_scales, table, blocks, kv_head, factor, there & ((in_tree == 0) | (query == i)), low, high,
                    KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, DTYPE,
                )  # fmt: skip
    return most, weight, total


@triton.jit
def _masked_tile(
    position, sub_block, lane, scattered: tl.constexpr, most, weight, total, q, key_cache, value_cache, key_scales, value_scales,
    table, blocks, kv_head, factor, there, low, high,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M, L, A) with a key tile more, for the rows that are ``there``. What stands at ``position`` lies in ``sub_block`` and ``lane``."""
    oldest = tl.min(tl.where(there, low, _FAR), axis=0)
    newest = tl.max(tl.where(there, high, 0), axis=0)
    needed = (position >= oldest) & (position < newest)
    keys_needed = needed
    if not scattered:  # keys of whole sub-blocks, so that loads stay vectors; what no row sees is not looked at
        keys_needed = (sub_block * _LANES < newest) & (sub_block * _LANES + _LANES > oldest)
    chunk = _chunks(table, sub_block, keys_needed, blocks, kv_head, KV_HEADS, BLOCK_SIZE)
    if scattered:
        k = _gather_keys(key_cache, chunk, lane, needed, DIM, PADDED, CHUNK)
    else:
        k = _load_keys(key_cache, chunk, lane, keys_needed, DIM, PADDED, CHUNK)
    v = _load_values(value_cache, chunk, lane, needed, DIM, PADDED, CHUNK)
    scale_of_keys = factor
    scale_of_values = None
    if key_scales is not None:
        scale_of_keys = (_load_scales(key_scales, chunk, lane, needed, DIM, CHUNK) * factor)[None, :]
        scale_of_values = _load_scales(value_scales, chunk, lane, needed, DIM, CHUNK)
    seen = there[:, None] & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
    return _step(q, k, v, scale_of_keys, scale_of_values, seen, most, weight, total, DTYPE, True)


@triton.jit
def _whole_tiles(
    first_tile, last_tile, most, weight, total, q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M, L, A) with the key tiles [first_tile, last_tile) more, of which every row sees all."""
    column = tl.arange(0, TILE)
    lane = column % _LANES
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        sub_block = tile * (TILE // _LANES) + column // _LANES
        chunk = _chunks(table, sub_block, None, blocks, kv_head, KV_HEADS, BLOCK_SIZE)
        k = _load_keys(key_cache, chunk, lane, None, DIM, PADDED, CHUNK)
        v = _load_values(value_cache, chunk, lane, None, DIM, PADDED, CHUNK)
        scale_of_keys = factor
        scale_of_values = None
        if key_scales is not None:
            scale_of_keys = (_load_scales(key_scales, chunk, lane, None, DIM, CHUNK) * factor)[None, :]
            scale_of_values = _load_scales(value_scales, chunk, lane, None, DIM, CHUNK)
        most, weight, total = _step(q, k, v, scale_of_keys, scale_of_values, None, most, weight, total, DTYPE, False)
    return most, weight, total


@triton.jit
def _split(
    split, q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
    query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SPLIT_TILES: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M, L, A) of one split, or of the whole context if SPLIT_TILES is 0.

    Some row sees the key tiles [begin, end), all rows the whole of [whole_begin, whole_end).
    """
    most = tl.full([ROWS], _NONE, tl.float32)
    weight = tl.zeros([ROWS, _ONES], tl.float32)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    first = begin
    last = end
    if SPLIT_TILES != 0:
        first = tl.maximum(begin, split * SPLIT_TILES)
        last = tl.minimum(end, (split + 1) * SPLIT_TILES)
    whole_first = tl.minimum(tl.maximum(whole_begin, first), last)
    whole_last = tl.minimum(tl.maximum(whole_end, whole_first), last)
    if WINDOWED:  # in two rounds, for one copy of the code: the edge of the window and the whole tiles; the end of the context
        for rounds in tl.range(0, 2, num_stages=1):
            most, weight, total = _edge_tiles(
                tl.where(rounds == 0, first, whole_last), tl.where(rounds == 0, whole_first, last), most, weight, total,
                q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor, query, there, low, high, tree,
                context, path, count, KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, DTYPE,
            )  # fmt: skip
            most, weight, total = _whole_tiles(
                tl.where(rounds == 0, whole_first, whole_last), whole_last, most, weight, total,
                q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
                KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, STAGES, DTYPE,
            )  # fmt: skip
    else:
        most, weight, total = _whole_tiles(
            whole_first, whole_last, most, weight, total,
            q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
            KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, STAGES, DTYPE,
        )  # fmt: skip
        most, weight, total = _edge_tiles(
            whole_last, last, most, weight, total,
            q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor, query, there, low, high, tree, context,
            path, count, KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, DTYPE,
        )  # fmt: skip
    return most, tl.max(weight, axis=1), total  # all columns of L are the same


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
    begin = tl.min(tl.where(there, low, _FAR), axis=0) // TILE
    end = (tl.max(high, axis=0) + TILE - 1) // TILE
    whole_begin = (tl.max(low, axis=0) + TILE - 1) // TILE
    committed = tl.where(tree >= 0, tree, _FAR)
    whole_end = tl.minimum(tl.min(tl.where(there, high, _FAR), axis=0), committed) // TILE
    return begin, end, whole_begin, whole_end


@triton.jit
def _load_queries(q, index, there, DIM: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    d = tl.arange(0, PADDED)
    x = tl.load(q + index[:, None] * DIM + d[None, :], mask=there[:, None] & (d[None, :] < DIM), other=0.0)
    return x


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
        queries = _load_queries(q, index, there, DIM, PADDED, dtype)
        table = block_table + s.to(tl.int64) * max_blocks
        path = None
        if ancestors is not None:
            path = ancestors + first + before
        if SPLIT_TILES == 0:
            most, weight, total = _split(
                0, queries, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
                query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
                KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, ROWS, SPLIT_TILES, WINDOWED, STAGES, dtype,
            )  # fmt: skip
        else:
            most = tl.full([ROWS], _NONE, tl.float32)
            weight = tl.zeros([ROWS], tl.float32)
            total = tl.zeros([ROWS, PADDED], tl.float32)
            for split in tl.range(begin // SPLIT_TILES, (end + SPLIT_TILES - 1) // SPLIT_TILES, num_stages=1):
                split_most, split_weight, split_total = _split(
                    split, queries, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
                    query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
                    KV_HEADS, BLOCK_SIZE, DIM, PADDED, CHUNK, TILE, ROWS, SPLIT_TILES, WINDOWED, STAGES, dtype,
                )  # fmt: skip
                most, weight, total = _fold(most, weight, total, split_most, split_weight, split_total)
        d = tl.arange(0, PADDED)
        result = _result(low < high, weight, total, dtype)
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
        queries = _load_queries(q, index, there, DIM, PADDED, dtype)
        table = block_table + s.to(tl.int64) * max_blocks
        path = None
        if ancestors is not None:
            path = ancestors + first + before
        most, weight, total = _split(
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
        most = tl.full([1], _NONE, tl.float32)
        weight = tl.zeros([1], tl.float32)
        total = tl.zeros([1, PADDED], tl.float32)
        last = (newest + SPLIT - 1) // SPLIT
        for begin in tl.range(oldest // SPLIT, last, AHEAD, num_stages=1):
            for i in tl.static_range(AHEAD):
                there = begin + i < last
                place = index * splits + begin + i + row
                split_m = tl.load(split_maximum + place, mask=there, other=_NONE)
                split_l = tl.load(split_weight + place, mask=there, other=0.0)
                split_a = tl.load(split_total + place[:, None] * DIM + d[None, :], mask=there & (d[None, :] < DIM), other=0.0)
                most, weight, total = _fold(most, weight, total, split_m, split_l, split_a)
        result = _result(low < high, weight, total, out.dtype.element_ty)
        tl.store(out + index * DIM + d[None, :], result, mask=d[None, :] < DIM)
