"""A query tile over key tiles: what the kernels of ``paged_attention`` compute, shared by all of them (see ``attention_kernels``).

(M, L, A) is the state of the online softmax: the largest score of each row, the sum of its weights relative to that, and the sum of the
values with those weights. L has several columns, all the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from .. import checks

LANES = tl.constexpr(checks.SUB_BLOCK)  # tokens of a sub-block
FAR = tl.constexpr(2**31 - 1)
_FAR_ROW = tl.constexpr(2**63 - 1)
NONE = tl.constexpr(float("-inf"))
_ONES = tl.constexpr(16)  # columns of L: the least that an MMA has
_PRECISION = tl.constexpr("tf32x3")  # of products of float32: three MMAs of their halves, near float32's own

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
def count_bits(x):
    """How many bits of int64 are set."""
    x = (x & 0x5555555555555555) + ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x & 0x0F0F0F0F0F0F0F0F) + ((x >> 4) & 0x0F0F0F0F0F0F0F0F)
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 0x7F).to(tl.int32)


@triton.jit
def _path_nodes(path, depth):
    """Which nodes of a path, bits of int64, have the depths ``depth``, from 0: by bisection of the bits."""
    node = depth * 0
    for i in tl.static_range(6):
        half = 32 >> i
        below = count_bits((path >> node.to(tl.int64)) << (64 - half))  # of the next `half` bits
        beyond = depth >= below
        node = tl.where(beyond, node + half, node)
        depth = tl.where(beyond, depth - below, depth)
    return node


# ---- the arithmetic ----


@triton.jit
def _product(q, k, DTYPE: tl.constexpr):
    """``[ROWS, TILE]``, of queries and keys ``[D, TILE]`` as stored."""
    return tl.dot(q, _stored(k).to(DTYPE), input_precision=_PRECISION)


@triton.jit
def _step(product, v, factor, value_scale, seen, most, weight, total, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """(M, L, A) with a key tile more: the ``product [ROWS, TILE]`` of queries and keys, its ``factor``, and ``v [TILE, D]`` as stored."""
    score = product * factor
    if MASKED:
        score = tl.where(seen, score, NONE)
    top = tl.maximum(most, tl.max(score, axis=1))
    base = tl.where(top == NONE, 0.0, top)  # without keys that count: weights 0, not NaN
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
def fold(most, weight, total, split_most, split_weight, split_total):
    """(M, L, A) with a split more. Beginning with (-inf, 0, 0) it is the split; with such a split nothing changes."""
    top = tl.maximum(most, split_most)
    base = tl.where(top == NONE, 0.0, top)
    old = tl.exp2(most - base)
    new = tl.exp2(split_most - base)
    return top, weight * old + split_weight * new, total * old[:, None] + split_total * new[:, None]


@triton.jit
def result_of(there, weight, total, DTYPE: tl.constexpr):
    """A / L; NaN throughout where A is not finite; 0 where not ``there``."""
    share = tl.div_rn(tl.full(weight.shape, 1.0, tl.float32), weight)
    bad = tl.max(_is_not_finite(total).to(tl.int32), axis=1)
    ratio = tl.where(bad[:, None] != 0, float("nan"), total * share[:, None])
    return tl.where(there[:, None], ratio, 0.0).to(DTYPE)


# ---- keys and values ----


@triton.jit
def _chunks(table, sub_block, needed, blocks, kv_head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where sub-blocks of a sequence lie, counted in sub-blocks of the cache. ``needed``: None for all."""
    per_block: tl.constexpr = BLOCK_SIZE // LANES
    block = tl.load(table + sub_block // per_block, mask=needed)
    block = tl.minimum(tl.maximum(block, 0), blocks - 1).to(tl.int64)
    return (block * KV_HEADS + kv_head) * per_block + sub_block % per_block


@triton.jit
def _load_keys(key_cache, chunk, lane, needed, begin, SIZE: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """``[SIZE, TILE]``: the elements of keys from ``begin`` on."""
    d = begin + tl.arange(0, SIZE)
    there = None
    if needed is not None:
        there = needed[None, :] & (d[:, None] < DIM)
    elif DIM % SIZE != 0:
        there = (d[:, None] < DIM) & (lane[None, :] >= 0)
    pointers = key_cache + (chunk * CHUNK + lane)[None, :] + d[:, None] * LANES
    if there is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=there, other=0.0)
    return x


@triton.jit
def _gather_keys(key_cache, chunk, lane, needed, begin, SIZE: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The same of tokens that lie anywhere: loaded as ``[TILE, SIZE]``, for which a thread needs the addresses of few tokens."""
    d = begin + tl.arange(0, SIZE)
    pointers = key_cache + (chunk * CHUNK + lane)[:, None] + d[None, :] * LANES
    return tl.trans(tl.load(pointers, mask=needed[:, None] & (d[None, :] < DIM), other=0.0))


@triton.jit
def load_queries(q, index, there, DIM: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """``[ROWS, D]``, the query tile. Of float32 with more than 128 elements, pointers ``[ROWS]`` to its rows: as the operand of products
    such a tile would need more registers than there are, so ``_product_in_parts`` loads it anew for every key tile."""
    if DTYPE == tl.float32 and PADDED > 128:
        some = tl.min(tl.where(there, index, _FAR_ROW), axis=0)  # a row that is there, in place of those that are not
        x = q + tl.where(there, index, some) * DIM
    else:
        d = tl.arange(0, PADDED)
        x = tl.load(q + index[:, None] * DIM + d[None, :], mask=there[:, None] & (d[None, :] < DIM), other=0.0)
    return x


@triton.jit
def _product_in_parts(
    q, key_cache, chunk, lane, needed, scattered: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr
):
    """``[ROWS, TILE]``: the product of queries, given by pointers to their rows, and keys, a part of their elements at a time."""
    part: tl.constexpr = 16  # larger ones come near the limit of registers
    product = tl.zeros([q.shape[0], chunk.shape[0]], tl.float32)
    for begin in tl.range(0, DIM, part, num_stages=3):
        d = begin + tl.arange(0, part)
        if DIM % part != 0:
            x = tl.load(q[:, None] + d[None, :], mask=d[None, :] < DIM, other=0.0)
        else:
            x = tl.load(q[:, None] + d[None, :])
        if scattered:
            k = _gather_keys(key_cache, chunk, lane, needed, begin, part, DIM, CHUNK)
        else:
            k = _load_keys(key_cache, chunk, lane, needed, begin, part, DIM, CHUNK)
        product = tl.dot(x, _stored(k).to(DTYPE), product, input_precision=_PRECISION)
    return product


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
    pointers = scales + chunk * (CHUNK // 4) + (DIM * LANES // 4) + lane
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
        sub_block = tile * (TILE // LANES) + column // LANES
        if path is None:
            most, weight, total = _masked_tile(
                position, sub_block, column % LANES, False, most, weight, total, q, key_cache, value_cache, key_scales, value_scales,
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
                    position, token // LANES, token % LANES, True, most, weight, total, q, key_cache, value_cache, key_scales,
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
    oldest = tl.min(tl.where(there, low, FAR), axis=0)
    newest = tl.max(tl.where(there, high, 0), axis=0)
    needed = (position >= oldest) & (position < newest)
    keys_needed = needed
    if not scattered:  # keys of whole sub-blocks, so that loads stay vectors; what no row sees is not looked at
        keys_needed = (sub_block * LANES < newest) & (sub_block * LANES + LANES > oldest)
    chunk = _chunks(table, sub_block, keys_needed, blocks, kv_head, KV_HEADS, BLOCK_SIZE)
    if q.dtype.is_ptr():
        product = _product_in_parts(q, key_cache, chunk, lane, needed if scattered else keys_needed, scattered, DIM, CHUNK, DTYPE)
    elif scattered:
        k = _gather_keys(key_cache, chunk, lane, needed, 0, PADDED, DIM, CHUNK)
    else:
        k = _load_keys(key_cache, chunk, lane, keys_needed, 0, PADDED, DIM, CHUNK)
    v = _load_values(value_cache, chunk, lane, needed, DIM, PADDED, CHUNK)
    scale_of_keys = factor
    scale_of_values = None
    if key_scales is not None:
        scale_of_keys = (_load_scales(key_scales, chunk, lane, needed, DIM, CHUNK) * factor)[None, :]
        scale_of_values = _load_scales(value_scales, chunk, lane, needed, DIM, CHUNK)
    seen = there[:, None] & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
    if not q.dtype.is_ptr():
        product = _product(q, k, DTYPE)
    return _step(product, v, scale_of_keys, scale_of_values, seen, most, weight, total, DTYPE, True)


@triton.jit
def _whole_tiles(
    first_tile, last_tile, most, weight, total, q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M, L, A) with the key tiles [first_tile, last_tile) more, of which every row sees all."""
    column = tl.arange(0, TILE)
    lane = column % LANES
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        sub_block = tile * (TILE // LANES) + column // LANES
        chunk = _chunks(table, sub_block, None, blocks, kv_head, KV_HEADS, BLOCK_SIZE)
        if q.dtype.is_ptr():
            product = _product_in_parts(q, key_cache, chunk, lane, None, False, DIM, CHUNK, DTYPE)
        else:
            k = _load_keys(key_cache, chunk, lane, None, 0, PADDED, DIM, CHUNK)
        v = _load_values(value_cache, chunk, lane, None, DIM, PADDED, CHUNK)
        scale_of_keys = factor
        scale_of_values = None
        if key_scales is not None:
            scale_of_keys = (_load_scales(key_scales, chunk, lane, None, DIM, CHUNK) * factor)[None, :]
            scale_of_values = _load_scales(value_scales, chunk, lane, None, DIM, CHUNK)
        if not q.dtype.is_ptr():
            product = _product(q, k, DTYPE)
        most, weight, total = _step(product, v, scale_of_keys, scale_of_values, None, most, weight, total, DTYPE, False)
    return most, weight, total


@triton.jit
def split_of(
    split, q, key_cache, value_cache, key_scales, value_scales, table, blocks, kv_head, factor,
    query, there, low, high, tree, context, path, count, begin, end, whole_begin, whole_end,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SPLIT_TILES: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M, L, A) of one split, or of the whole context if SPLIT_TILES is 0.

    Some row sees the key tiles [begin, end), all rows the whole of [whole_begin, whole_end).
    """
    most = tl.full([ROWS], NONE, tl.float32)
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
