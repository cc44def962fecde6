"""The oracle: every op in plain PyTorch, float32, on any device. Written to be read, not to be fast; contracts in ``api``.

It also serves machines without a compiler. Attention walks its rows one by one, so that a row never depends on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, checks_sample
from .api import HeadDraw
from .packed import INTEGER_FORMATS, PackedWeight
from .quantized import QuantizedWeight
from .reference_beam import beam_select
from .reference_head import draw
from .reference_linear import integer_product
from .reference_sample import sample
from .reference_verify import masses, verify_block, verify_drafts

__all__ = [
    "beam_select", "copy_blocks", "embed", "feed_tokens", "linear", "masses", "move_tokens", "paged_attention", "rms_norm", "rope_append",
    "sample", "sample_head", "silu_mul", "unavailable", "verify_block", "verify_drafts",
]  # fmt: skip


def unavailable(device_type: str) -> str | None:
    """PyTorch serves every device."""
    return None


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ``ValueError`` unless all of ``values`` lie in ``[low, high)``."""
    bad = (values < low) | (values >= high)
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} must hold values in [{low}, {high}), got {int(values[where])} at {where}")


def embed(tokens: Tensor, table: Tensor | PackedWeight | QuantizedWeight) -> Tensor:
    checks.embed(tokens, table)
    _check_range("tokens", tokens, 0, table.shape[0])
    dense = table if isinstance(table, Tensor) else table.dense()
    return dense[tokens.long()].float()


def linear(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    checks.linear(x, weights, biases, residual, out)
    parts = []
    for i, weight in enumerate(weights):
        part = _product(x, weight)
        bias = None if biases is None else biases[i]
        parts.append(part if bias is None else part + bias.float())
    y = torch.cat(parts, dim=1)
    if residual is not None:
        y = y + residual
    return (y if residual is not None else y.to(x.dtype)) if out is None else out.copy_(y)


def _product(x: Tensor, weight: Tensor | PackedWeight | QuantizedWeight) -> Tensor:
    """``x @ weight.T`` in float32."""
    if isinstance(weight, QuantizedWeight):
        dense = weight.dense()
        return x.float() @ (dense.to(x.dtype).float() if weight.format == "int4" else dense).T
    x = x.float()
    if isinstance(weight, Tensor):
        return x @ weight.float().T
    if weight.format in INTEGER_FORMATS:
        return integer_product(x, weight)
    return (x.bfloat16().float() if weight.format == "bfloat16" else x) @ weight.dense().float().T


def sample_head(
    x: Tensor,
    head: Tensor | PackedWeight | QuantizedWeight,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    first_token: int = 0,
) -> HeadDraw:
    checks_sample.sample_head(x, head, temperature, seed, position, stream, first_token)
    checks_sample.temperature_values(temperature)
    logits = linear(x, (head,), out=x.new_empty((len(x), head.shape[0]), dtype=torch.float32))
    return draw(logits, temperature, seed, position, stream, first_token)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    checks.rms_norm(x, weight, dtype)
    return _normalise(x, weight, eps).to(dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of ``x [T, heads, D]`` by the angles of ``cos, sin [T, rot / 2]``; components past ``rot`` pass."""
    half = cos.shape[1]
    turned, passed = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    c, s = cos[:, None, :], sin[:, None, :]
    pair = (first * c - second * s, second * c + first * s)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, passed), dim=-1)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    num_heads: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    sizes = checks.rope_append(qkv, positions, slots, cos, sin, key_cache, value_cache, num_heads, q_norm, k_norm)
    _check_range("positions", positions, 0, cos.shape[0])
    _check_range("slots", slots, -1, sizes.num_blocks * sizes.block_size)
    heads = qkv.view(qkv.shape[0], num_heads + 2 * sizes.num_kv_heads, sizes.head_dim)
    q, k, v = heads.float().split((num_heads, sizes.num_kv_heads, sizes.num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = _normalise(q, q_norm, norm_eps), _normalise(k, k_norm, norm_eps)
    c, s = cos[positions.long()], sin[positions.long()]
    q, k = _rotate(q, c, s, interleaved), _rotate(k, c, s, interleaved)

    kept = slots >= 0
    slot = slots[kept].long()
    block, offset = slot // sizes.block_size, slot % sizes.block_size
    sub_block, lane = offset // checks.SUB_BLOCK, offset % checks.SUB_BLOCK
    for cache, x, is_key in ((key_cache, k[kept], True), (value_cache, v[kept], False)):
        elements, scales = _tokens(cache, sizes, is_key)
        if scales is not None:
            x, scales[0, block, :, sub_block, lane] = _quantised(x, cache.dtype)
        elements[0, block, :, sub_block, lane] = x.to(cache.dtype).view(elements.dtype)
    return q.to(qkv.dtype).contiguous()


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x [..., D]`` as elements for a cache of ``dtype`` and scales ``[...]``."""
    limit = checks.cache_limit(dtype)
    largest = x.abs().amax(dim=-1)
    scales = torch.where(largest.isfinite(), largest / limit, torch.nan)
    elements = (x / scales[..., None]).clamp(-limit, limit)
    if dtype == torch.int8:
        elements = elements.round()
    return torch.where(scales[..., None] > 0, elements, 0.0), scales


def _tokens(cache: Tensor, sizes: checks.CacheShape, is_key: bool, layers: int = 1) -> tuple[Tensor, Tensor | None]:
    """Views of keys or values as ``[layers, num_blocks, num_kv_heads, sub-block, token in it, head_dim]``, of float8 as int8 (which
    PyTorch can index), and of the scales of a cache that has them as ``[layers, num_blocks, num_kv_heads, sub-block, token in it]``."""
    scaled = cache.dtype in checks.SCALED_DTYPES
    if scaled:
        cache = cache.view(torch.int8)
    width = checks.SUB_BLOCK * sizes.head_dim
    row = width + (checks.SUB_BLOCK * checks.SCALE_BYTES if scaled else 0)
    rows = cache.view(layers, sizes.num_blocks, sizes.num_kv_heads, sizes.block_size // checks.SUB_BLOCK, row)
    shape = (sizes.head_dim, checks.SUB_BLOCK) if is_key else (checks.SUB_BLOCK, sizes.head_dim)
    elements = rows[..., :width].unflatten(-1, shape)
    return elements.mT if is_key else elements, rows[..., width:].view(torch.float32) if scaled else None


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    tree_start: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    sizes = checks.paged_attention(q, key_cache, value_cache, block_table, query_start, context_len, window, tree_start, ancestors)
    start, context = query_start.tolist(), context_len.tolist()
    _check_batch(start, context, q.shape[0], block_table.shape[1] * sizes.block_size)
    trees = [-1] * len(context) if tree_start is None else tree_start.tolist()
    num_heads, head_dim = q.shape[1], q.shape[2]
    out = torch.empty_like(q)
    for s, length in enumerate(context):
        queries = start[s + 1] - start[s]
        if queries == 0:
            continue
        committed, paths = length - queries, None
        if ancestors is not None and trees[s] != -1:
            committed = trees[s]
            paths = _paths(ancestors[start[s] : start[s + 1]].tolist(), s, start[s], length, committed)
        first_end = committed + (1 if paths is None else len(paths[0]))
        oldest = max(0, first_end - window) if window else 0  # that any row of this sequence sees
        first_block = min(oldest, committed) // sizes.block_size
        blocks = block_table[s, first_block : -(-length // sizes.block_size)]
        _check_range(f"block_table[{s}, {first_block}:]", blocks, 0, sizes.num_blocks)
        blocks = blocks.long()
        keys, values = _dense(key_cache, sizes, True, blocks), _dense(value_cache, sizes, False, blocks)
        for i in range(queries):
            path = torch.arange(i + 1) if paths is None else torch.tensor(paths[i])
            seen = torch.cat((torch.arange(committed), committed + path))[-window:]  # all of them if 0
            seen = (seen - first_block * sizes.block_size).to(q.device)
            grouped = q[start[s] + i].float().view(sizes.num_kv_heads, num_heads // sizes.num_kv_heads, head_dim)
            # Copies: how the product of a view rounds may depend on its strides, and so on the other rows of the sequence.
            scores = grouped @ keys.index_select(1, seen).transpose(1, 2) * scale
            out[start[s] + i] = (scores.softmax(dim=-1) @ values.index_select(1, seen)).view(num_heads, head_dim)
    return out


def _dense(cache: Tensor, sizes: checks.CacheShape, is_key: bool, blocks: Tensor) -> Tensor:
    """The keys or values of some blocks as float32 ``[num_kv_heads, tokens, head_dim]``."""
    elements, scales = _tokens(cache, sizes, is_key)
    x = elements[0, blocks]
    x = (x.view(cache.dtype) if cache.dtype == torch.float8_e4m3fn else x).float()
    if scales is not None:
        x = x * scales[0, blocks][..., None]
    return x.transpose(0, 1).reshape(sizes.num_kv_heads, -1, sizes.head_dim)


def _check_batch(start: list[int], context: list[int], rows: int, capacity: int) -> None:
    """The ragged batch must cover the query rows in order, and each sequence fit its blocks."""
    if start[0] != 0 or start[-1] != rows:
        raise ValueError(f"query_start must run from 0 to the {rows} rows of q, got {start[0]} to {start[-1]}")
    for s in range(len(context)):
        if start[s + 1] < start[s]:
            raise ValueError(f"query_start must not decrease, got {start[s]} then {start[s + 1]} at sequence {s}")
    for s, length in enumerate(context):
        queries = start[s + 1] - start[s]
        if not queries <= length <= capacity:
            raise ValueError(f"context_len[{s}] must be in [{queries} queries, {capacity} slots of block_table], got {length}")


def _paths(ancestors: list[int], sequence: int, first_row: int, context: int, tree: int) -> list[list[int]]:
    """The nodes that each row of a tree sees, in order."""
    lowest, first_query = max(0, context - checks.MAX_TREE_TOKENS), context - len(ancestors)
    if not lowest <= tree <= first_query:
        raise ValueError(
            f"tree_start[{sequence}] must be -1 or in [{lowest}, {first_query}] (a tree has at most {checks.MAX_TREE_TOKENS} tokens, all "
            f"queries among them), got {tree}"
        )
    paths: list[list[int]] = []
    for i, mask in enumerate(ancestors):
        node, bits, name = first_query + i - tree, mask % 2**64, f"ancestors[{first_row + i}]"
        if bits >> node != 1:
            raise ValueError(f"{name} must have its own bit {node} as its highest, got {bits:#x}")
        paths.append([j for j in range(node + 1) if bits >> j & 1])
        if i > 0 and len(paths[i]) < len(paths[i - 1]):
            raise ValueError(f"{name} must be at least as deep as the row before it, got {len(paths[i])} nodes after {len(paths[i - 1])}")
    return paths


def move_tokens(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    sizes = checks.copies(key_cache, value_cache, source, target)
    for name, slots in (("source", source), ("target", target)):
        _check_range(name, slots, 0, sizes.num_blocks * sizes.block_size)
    (block, offset), (to_block, to_offset) = ((s.long() // sizes.block_size, s.long() % sizes.block_size) for s in (source, target))
    (sub_block, lane), (to_sub_block, to_lane) = ((o // checks.SUB_BLOCK, o % checks.SUB_BLOCK) for o in (offset, to_offset))
    for cache, is_key in ((key_cache, True), (value_cache, False)):
        for moved in _tokens(cache, sizes, is_key, len(cache)):
            if moved is not None:
                moved[:, to_block, :, to_sub_block, to_lane] = moved[:, block, :, sub_block, lane]


def copy_blocks(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    sizes = checks.copies(key_cache, value_cache, source, target)
    for name, blocks in (("source", source), ("target", target)):
        _check_range(name, blocks, 0, sizes.num_blocks)
    checks.chains(source.tolist(), target.tolist())
    for cache in (key_cache, value_cache):
        bits = cache.view(torch.int8)
        bits[:, target.long()] = bits[:, source.long()]


def feed_tokens(tokens: Tensor, source: Tensor, drawn: Tensor) -> None:
    checks.feed_tokens(tokens, source, drawn)
    _check_range("source", source, -1, len(drawn))
    fed = source >= 0
    tokens[fed] = drawn[source[fed].long()].int()


def silu_mul(x: Tensor) -> Tensor:
    checks.silu_mul(x)
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)
