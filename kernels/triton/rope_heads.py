"""The kernel of ``rope_append``, which the forward (``Transformer.hidden``) calls in each layer.

A program turns one head of 16 tokens, which is a sub-block of a prompt: its keys go to the cache transposed, 16 neighbours in memory to 16
lanes, where a token by itself writes single elements. It reads ``qkv`` and the rows of the tables once (a pair's other component comes
from the first-level cache) and writes what it read. Every element is computed by itself, as the oracle rounds it, except for the sum of
squares of a head, whose order ``head_dim`` alone decides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import checks
from .sample_row import kernel

_SUB_BLOCK = tl.constexpr(checks.SUB_BLOCK)
_SCALE_BYTES = tl.constexpr(checks.SCALE_BYTES)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer, ties to even


@triton.jit
def _quantised(x, limit):
    """``x [tokens, D]`` as elements within ``limit``, not yet rounded, and the scales ``[tokens]`` (see ``api``)."""
    size = tl.abs(x)
    finite = tl.min((size < float("inf")).to(tl.int32), axis=1) != 0
    scale = tl.where(finite, tl.div_rn(tl.max(size, axis=1), tl.zeros([x.shape[0]], tl.float32) + limit), float("nan"))
    divisor = tl.where(scale > 0.0, scale, 1.0)[:, None]
    q = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    q = tl.minimum(tl.maximum(q, -limit), limit)  # a subnormal scale is coarse: past the limit
    return tl.where((scale > 0.0)[:, None], q, 0.0), scale


@triton.jit
def _cache_elements(x, limit, dtype: tl.constexpr):
    """Elements of a cache and, where it has them, their scales (else zeros)."""
    scale = tl.zeros([x.shape[0]], tl.float32)
    if dtype == tl.int8:
        q, scale = _quantised(x, limit)
        elements = ((q + _ROUND) - _ROUND).to(tl.int32).to(tl.int8)
    elif dtype == tl.float8e4nv:
        q, scale = _quantised(x, limit)
        elements = q.to(tl.float8e4nv)
    else:
        elements = x.to(dtype)
    return elements, scale


@kernel
def rope_heads(
    qkv, positions, slots, cos, sin, keys, values, key_scales, value_scales, q_norm, k_norm, out, eps, limit, rows, max_position,
    num_blocks, num_heads, num_kv_heads, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of the tokens; heads of queries, then of keys, then of values."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    there = token < rows
    d = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (d < HEAD_DIM)[None, :]
    place = (token.to(tl.int64) * (num_heads + 2 * num_kv_heads) + head) * HEAD_DIM
    x = tl.load(qkv + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)

    if head < num_heads + num_kv_heads:
        turned = d < 2 * HALF
        other = d
        column = d
        if INTERLEAVED:
            other = tl.where(turned, d ^ 1, d)
            column = d // 2
            is_first = d % 2 == 0
        else:
            other = tl.where(turned, tl.where(d < HALF, d + HALF, d - HALF), d)
            column = tl.where(d < HALF, d, d - HALF)
            is_first = d < HALF
        y = tl.load(qkv + place[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
        if q_norm is not None:
            if head < num_heads:
                w = tl.load(q_norm + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
                v = tl.load(q_norm + other, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
            else:
                w = tl.load(k_norm + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
                v = tl.load(k_norm + other, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / HEAD_DIM) + eps)[:, None]
            x = x * factor * w[None, :]
            y = y * factor * v[None, :]
        if HALF > 0:
            position = tl.load(positions + token, mask=there, other=-1).to(tl.int64)
            known = (position >= 0) & (position < max_position)
            angle = position[:, None] * HALF + column[None, :]
            c = tl.load(cos + angle, mask=known[:, None] & turned[None, :], other=1.0)
            s = tl.load(sin + angle, mask=known[:, None] & turned[None, :], other=0.0)
            sign = tl.where(is_first, -1.0, 1.0)
            x = tl.where(turned[None, :], x * c + y * s * sign[None, :], x)

    if head < num_heads:
        to = (token.to(tl.int64) * num_heads + head) * HEAD_DIM
        tl.store(out + to[:, None] + d[None, :], x.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token, mask=there, other=-1)
        kept = (slot >= 0) & (slot // BLOCK_SIZE < num_blocks)
        kv_head = head - num_heads - tl.where(head < num_heads + num_kv_heads, 0, num_kv_heads)
        block = (slot // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head
        sub_block = block * (BLOCK_SIZE // _SUB_BLOCK) + slot % BLOCK_SIZE // _SUB_BLOCK
        lane = slot % _SUB_BLOCK
        width: tl.constexpr = _SUB_BLOCK * (HEAD_DIM if key_scales is None else HEAD_DIM + _SCALE_BYTES)
        elements, scale = _cache_elements(x, limit, keys.dtype.element_ty)
        scale_place = sub_block * (width // _SCALE_BYTES) + _SUB_BLOCK * HEAD_DIM // _SCALE_BYTES + lane
        if head < num_heads + num_kv_heads:
            key_at = (sub_block * width + lane)[None, :] + d[:, None] * _SUB_BLOCK
            tl.store(keys + key_at, tl.trans(elements), mask=kept[None, :] & (d < HEAD_DIM)[:, None])
            if key_scales is not None:
                tl.store(key_scales + scale_place, scale, mask=kept)
        else:
            value_at = (sub_block * width + lane * HEAD_DIM)[:, None] + d[None, :]
            tl.store(values + value_at, elements, mask=kept[:, None] & (d < HEAD_DIM)[None, :])
            if key_scales is not None:
                tl.store(value_scales + scale_place, scale, mask=kept)
