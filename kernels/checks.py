"""Argument checks shared by the backends: one clear ``ValueError`` or ``TypeError`` that names the argument and what it was.

They run about a hundred times per decode step, so they are plain comparisons; the ops with many arguments first test for the usual call in
one expression (``_usual_*``) and look closer only when it fails. Indices inside tensors (slots, block tables, token ids) are checked by
each backend where it reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packed import PackedWeight
from .quantized import QuantizedWeight

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_DTYPES = WEIGHT_DTYPES  # of which the C++ kernels have float32 only
SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)  # of caches in which each token has a scale
CACHE_DTYPES = (torch.float32, torch.bfloat16, *SCALED_DTYPES)
SCALE_BYTES = 4  # of a token's scale
_STORED = (PackedWeight, QuantizedWeight)  # matrices that are no tensors
_F32 = (torch.float32,)
_I32 = (torch.int32,)
_I64 = (torch.int64,)
SUB_BLOCK = 16  # tokens that lie side by side in the key cache
MAX_TREE_TOKENS = 64  # as many as a row of `ancestors` has bits
_HEAD_DIMS = range(8, 257, 8)


def _dtype(name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in allowed)}, got {t.dtype}")


def _contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(t.shape)} with strides {t.stride()}")


def _shape(name: str, t: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if t.shape != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(t.shape)}")


def _plain(name: str, t: Tensor, allowed: tuple[torch.dtype, ...], dims: int, meaning: str) -> None:
    """Check dtype, number of dimensions and contiguity."""
    _dtype(name, t, allowed)
    if t.dim() != dims:
        raise ValueError(f"{name} must have shape {meaning}, got {tuple(t.shape)}")
    if not t.is_contiguous():
        _contiguous(name, t)


def _device(first: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    device = first.device
    for name, t in others:
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device} while the first argument is on {device}")


def embed(tokens: Tensor, table: Tensor | PackedWeight | QuantizedWeight) -> None:
    _plain("tokens", tokens, _I32, 1, "[T]")
    if isinstance(table, _STORED):
        _device(tokens, (("table", table.data),))
        return
    _plain("table", table, WEIGHT_DTYPES, 2, "[V, H]")
    _device(tokens, (("table", table),))


def linear(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> int:
    """Check the arguments of ``linear`` and return the width of its result."""
    _dtype("x", x, ACTIVATION_DTYPES)
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [M, K] with unit stride in K, got shape {tuple(x.shape)} with strides {x.stride()}")
    if isinstance(weights, (Tensor, *_STORED)):
        raise TypeError("weights must be a list of matrices, got a single one: pass [weight]")
    if not weights:
        raise ValueError("weights must hold at least one matrix, got none")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases must match weights one to one, got {len(biases)} for {len(weights)}")
    width = 0
    kind = _kind(weights[0])
    for i, w in enumerate(weights):
        if isinstance(w, _STORED):
            bias_dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES
        else:
            _plain(f"weights[{i}]", w, WEIGHT_DTYPES, 2, "[N, K]")
            bias_dtypes = (w.dtype, torch.float32)
        if _kind(w) != kind:
            raise TypeError(f"weights[{i}] must be of one kind with weights[0], {kind}, got {_kind(w)}")
        if w.shape[1] != x.shape[1]:
            raise ValueError(f"weights[{i}] must have shape [N, K] with K = {x.shape[1]}, got {tuple(w.shape)}")
        b = None if biases is None else biases[i]
        if b is not None:
            _dtype(f"biases[{i}]", b, bias_dtypes)
            _shape(f"biases[{i}]", b, (w.shape[0],), "[N]")
            _contiguous(f"biases[{i}]", b)
        _device(x, ((f"weights[{i}]", w.data), (f"biases[{i}]", b)))
        width += w.shape[0]
    for name, t, dtypes in (("residual", residual, _F32), ("out", out, _F32 if residual is not None else (torch.float32, x.dtype))):
        if t is not None:
            _dtype(name, t, dtypes)
            _shape(name, t, (x.shape[0], width), "[M, sum N]")
            _contiguous(name, t)
    _device(x, (("residual", residual), ("out", out)))
    return width


def _kind(weight: Tensor | PackedWeight | QuantizedWeight) -> str:
    if isinstance(weight, Tensor):
        return str(weight.dtype)
    return f"{'packed' if isinstance(weight, PackedWeight) else 'quantised'} {weight.format}"


def rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    _plain("x", x, _F32, 2, "[M, H]")
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    _dtype("weight", weight, WEIGHT_DTYPES)
    _shape("weight", weight, (x.shape[1],), "[H]")
    _contiguous("weight", weight)
    _device(x, (("weight", weight),))


def silu_mul(x: Tensor) -> None:
    _plain("x", x, ACTIVATION_DTYPES, 2, "[M, 2F]")
    if x.shape[1] % 2:
        raise ValueError(f"x must have shape [M, 2F], got {tuple(x.shape)}")


class CacheShape(NamedTuple):
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int


def cache(key_cache: Tensor, value_cache: Tensor) -> CacheShape:
    """Check the two caches against each other and return their sizes."""
    _dtype("key_cache", key_cache, CACHE_DTYPES)
    scaled = key_cache.dtype in SCALED_DTYPES
    layout = f"[num_blocks, num_kv_heads, block_size / 16, head_dim{' + 4' if scaled else ''}, 16]"
    _plain("key_cache", key_cache, CACHE_DTYPES, 5, layout)
    num_blocks, num_kv_heads, sub_blocks, head_dim, lanes = key_cache.shape
    if lanes != SUB_BLOCK:
        raise ValueError(f"key_cache must have shape {layout}, got {tuple(key_cache.shape)}")
    if scaled:
        head_dim -= SCALE_BYTES
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 8 in 8..256, got {head_dim} in key_cache {tuple(key_cache.shape)}")
    if num_kv_heads < 1 or sub_blocks < 1:
        raise ValueError(f"key_cache must have at least one KV head and one sub-block, got {tuple(key_cache.shape)}")
    block_size = sub_blocks * SUB_BLOCK
    _dtype("value_cache", value_cache, (key_cache.dtype,))
    if scaled:
        _shape("value_cache", value_cache, tuple(key_cache.shape), layout)
    else:
        expected = (num_blocks, num_kv_heads, block_size, head_dim)
        _shape("value_cache", value_cache, expected, "[num_blocks, num_kv_heads, block_size, head_dim]")
    _contiguous("value_cache", value_cache)
    return CacheShape(num_blocks, num_kv_heads, block_size, head_dim)


def cache_limit(dtype: torch.dtype) -> float:
    """The largest number that an element of a cache with scales holds."""
    return float((torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max)


def device_has(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where a GPU has no instructions for a cache of ``dtype``."""
    if dtype == torch.float8_e4m3fn and device.type == "cuda" and (have := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(f"a cache of float8_e4m3fn needs compute capability 8.9 or later, and {device} has {have[0]}.{have[1]}")


def copies(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> CacheShape:
    """Check the arguments of ``move_tokens`` and of ``copy_blocks``, and return the sizes of one layer."""
    for name, t in (("key_cache", key_cache), ("value_cache", value_cache)):
        if t.dim() < 1:
            raise ValueError(f"{name} must have a first dimension num_layers, got {tuple(t.shape)}")
        _contiguous(name, t)
    if len(key_cache) != len(value_cache) or len(key_cache) == 0:
        raise ValueError(f"key_cache and value_cache must have the same number of layers, got {len(key_cache)} and {len(value_cache)}")
    sizes = cache(key_cache[0], value_cache[0])
    for name, t in (("source", source), ("target", target)):
        _plain(name, t, _I32, 1, "[N]")
    if source.shape != target.shape:
        _shape("target", target, tuple(source.shape), "[N]")
    _device(key_cache, (("value_cache", value_cache), ("source", source), ("target", target)))
    return sizes


def chains(source: list[int], target: list[int]) -> None:
    """Raise ``ValueError`` unless the blocks that are written are distinct and none of them is read."""
    seen = set(source)
    for i, block in enumerate(target):
        if block in seen:
            raise ValueError(f"target must hold distinct blocks that are not in source, got {block} at {i}")
        seen.add(block)


def feed_tokens(tokens: Tensor, source: Tensor, drawn: Tensor) -> None:
    for name, t, dtypes, meaning in (("tokens", tokens, _I32, "[T]"), ("source", source, _I32, "[T]"), ("drawn", drawn, _I64, "[R]")):
        _plain(name, t, dtypes, 1, meaning)
    if source.shape != tokens.shape:
        _shape("source", source, tuple(tokens.shape), "[T]")
    _device(tokens, (("source", source), ("drawn", drawn)))


def _usual_cache(key_cache: Tensor, value_cache: Tensor) -> CacheShape | None:
    num_blocks, num_kv_heads, sub_blocks, head_dim, lanes = key_cache.shape
    block_size = sub_blocks * SUB_BLOCK
    values: tuple[int, ...] = (num_blocks, num_kv_heads, block_size, head_dim)
    if key_cache.dtype in SCALED_DTYPES:
        values = key_cache.shape
        head_dim -= SCALE_BYTES
    if (
        key_cache.dtype in CACHE_DTYPES
        and key_cache.dtype is value_cache.dtype
        and lanes == SUB_BLOCK
        and num_kv_heads >= 1
        and sub_blocks >= 1
        and head_dim in _HEAD_DIMS
        and value_cache.shape == values
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
        and key_cache.is_cpu
        and value_cache.is_cpu
    ):
        return CacheShape(num_blocks, num_kv_heads, block_size, head_dim)
    return None


def _heads(num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a positive multiple of num_kv_heads = {num_kv_heads}, got {num_heads}")


def _usual_rope_append(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, num_heads: int
) -> CacheShape | None:
    try:
        sizes = _usual_cache(key_cache, value_cache)
        if sizes is None:
            return None
        tokens = len(positions)
        table = cos.shape
        if (
            qkv.dtype is cos.dtype is sin.dtype is torch.float32
            and positions.dtype is slots.dtype is torch.int32
            and qkv.shape == (tokens, (num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim)
            and positions.shape == slots.shape == (tokens,)
            and table == sin.shape
            and len(table) == 2
            and table[1] * 2 <= sizes.head_dim
            and num_heads >= 1
            and num_heads % sizes.num_kv_heads == 0
            and qkv.is_contiguous()
            and positions.is_contiguous()
            and slots.is_contiguous()
            and cos.is_contiguous()
            and sin.is_contiguous()
            and qkv.is_cpu
            and positions.is_cpu
            and slots.is_cpu
            and cos.is_cpu
            and sin.is_cpu
        ):
            return sizes
    except (AttributeError, TypeError, ValueError):  # not tensors, or of other dimensions
        pass
    return None


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> CacheShape:
    if q_norm is None and k_norm is None:
        usual = _usual_rope_append(qkv, positions, slots, cos, sin, key_cache, value_cache, num_heads)
        if usual is not None:
            return usual
    sizes = cache(key_cache, value_cache)
    head_dim = sizes.head_dim
    _heads(num_heads, sizes.num_kv_heads)
    _plain("qkv", qkv, ACTIVATION_DTYPES, 2, "[T, (num_heads + 2 * num_kv_heads) * head_dim]")
    tokens = qkv.shape[0]
    if qkv.shape[1] != (num_heads + 2 * sizes.num_kv_heads) * head_dim:
        width = (num_heads + 2 * sizes.num_kv_heads) * head_dim
        _shape("qkv", qkv, (tokens, width), "[T, (num_heads + 2 * num_kv_heads) * head_dim]")
    for name, t in (("positions", positions), ("slots", slots)):
        _plain(name, t, _I32, 1, "[T]")
        if t.shape[0] != tokens:
            _shape(name, t, (tokens,), "[T]")
    for name, t in (("cos", cos), ("sin", sin)):
        _plain(name, t, _F32, 2, "[max_position, rot / 2]")
        if t.shape[1] * 2 > head_dim:
            raise ValueError(f"{name} must have shape [max_position, rot / 2] with rot <= head_dim = {head_dim}, got {tuple(t.shape)}")
    if cos.shape != sin.shape:
        _shape("sin", sin, tuple(cos.shape), "the shape of cos")
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"q_norm and k_norm must both be given or both be None, got {type(q_norm).__name__} and {type(k_norm).__name__}")
    if q_norm is not None and k_norm is not None:
        for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
            _plain(name, t, WEIGHT_DTYPES, 1, "[head_dim]")
            _shape(name, t, (head_dim,), "[head_dim]")
        if q_norm.dtype != k_norm.dtype:
            raise TypeError(f"k_norm must have the dtype of q_norm, {q_norm.dtype}, got {k_norm.dtype}")
    _device(
        qkv,
        (
            ("positions", positions),
            ("slots", slots),
            ("cos", cos),
            ("sin", sin),
            ("key_cache", key_cache),
            ("value_cache", value_cache),
            ("q_norm", q_norm),
            ("k_norm", k_norm),
        ),
    )
    return sizes


def _usual_paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, window: int
) -> CacheShape | None:
    try:
        sizes = _usual_cache(key_cache, value_cache)
        if sizes is None:
            return None
        _, num_heads, head_dim = q.shape
        sequences, _ = block_table.shape
        if (
            q.dtype is torch.float32
            and block_table.dtype is query_start.dtype is context_len.dtype is torch.int32
            and head_dim == sizes.head_dim
            and num_heads >= 1
            and num_heads % sizes.num_kv_heads == 0
            and context_len.shape == (sequences,)
            and query_start.shape == (sequences + 1,)
            and window >= 0
            and q.is_contiguous()
            and block_table.is_contiguous()
            and query_start.is_contiguous()
            and context_len.is_contiguous()
            and q.is_cpu
            and block_table.is_cpu
            and query_start.is_cpu
            and context_len.is_cpu
        ):
            return sizes
    except (AttributeError, TypeError, ValueError):  # not tensors, or of other dimensions
        pass
    return None


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    window: int,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
) -> CacheShape:
    sizes = _usual_paged_attention(q, key_cache, value_cache, block_table, query_start, context_len, window)
    if sizes is None:
        sizes = _paged_attention(q, key_cache, value_cache, block_table, query_start, context_len, window)
    if tree_start is not None or ancestors is not None:
        _trees(q, context_len, tree_start, ancestors)
    return sizes


def _paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, window: int
) -> CacheShape:
    sizes = cache(key_cache, value_cache)
    _plain("q", q, ACTIVATION_DTYPES, 3, "[T, num_heads, head_dim]")
    if q.shape[2] != sizes.head_dim:
        raise ValueError(f"q must have shape [T, num_heads, head_dim] with head_dim = {sizes.head_dim}, got {tuple(q.shape)}")
    _heads(q.shape[1], sizes.num_kv_heads)
    _plain("block_table", block_table, _I32, 2, "[S, max_blocks]")
    _plain("query_start", query_start, _I32, 1, "[S + 1]")
    _plain("context_len", context_len, _I32, 1, "[S]")
    sequences = context_len.shape[0]
    if query_start.shape[0] != sequences + 1:
        _shape("query_start", query_start, (sequences + 1,), "[S + 1]")
    if block_table.shape[0] != sequences:
        raise ValueError(f"block_table must have shape [S, max_blocks] with S = {sequences}, got {tuple(block_table.shape)}")
    if window < 0:
        raise ValueError(f"window must be >= 0 (0: the whole context), got {window}")
    _device(
        q,
        (
            ("key_cache", key_cache),
            ("value_cache", value_cache),
            ("block_table", block_table),
            ("query_start", query_start),
            ("context_len", context_len),
        ),
    )
    return sizes


def _trees(q: Tensor, context_len: Tensor, tree_start: Tensor | None, ancestors: Tensor | None) -> None:
    if tree_start is None or ancestors is None:
        given = f"{type(tree_start).__name__} and {type(ancestors).__name__}"
        raise ValueError(f"tree_start and ancestors must both be given or both be None, got {given}")
    _plain("tree_start", tree_start, _I32, 1, "[S]")
    _plain("ancestors", ancestors, _I64, 1, "[T]")
    if tree_start.shape != context_len.shape:
        _shape("tree_start", tree_start, tuple(context_len.shape), "[S]")
    if ancestors.shape[0] != q.shape[0]:
        _shape("ancestors", ancestors, (q.shape[0],), "[T]")
    _device(q, (("tree_start", tree_start), ("ancestors", ancestors)))


def step(batch: Any) -> None:
    """The tensors of a step, ``engine.models.StepBatch``."""
    _plain("tokens", batch.tokens, _I32, 1, "[T]")
    for name in ("positions", "slots"):
        t = getattr(batch, name)
        _plain(name, t, _I32, 1, "[T]")
        _shape(name, t, tuple(batch.tokens.shape), "[T]")
    _plain("context_len", batch.context_len, _I32, 1, "[S]")
    _plain("query_start", batch.query_start, _I32, 1, "[S + 1]")
    _shape("query_start", batch.query_start, (len(batch.context_len) + 1,), "[S + 1]")
    _plain("block_table", batch.block_table, _I32, 2, "[S, max_blocks]")
    if len(batch.block_table) != len(batch.context_len):
        raise ValueError(
            f"block_table must have shape [S, max_blocks] with S = {len(batch.context_len)}, got {tuple(batch.block_table.shape)}"
        )
    _plain("logit_rows", batch.logit_rows, _I64, 1, "[R]")
    if batch.tree_start is not None or batch.ancestors is not None:
        _trees(batch.tokens, batch.context_len, batch.tree_start, batch.ancestors)
    names = ("positions", "slots", "query_start", "context_len", "block_table", "logit_rows", "tree_start", "ancestors")
    _device(batch.tokens, [(name, getattr(batch, name)) for name in names])
