"""The CPU backend: argument checks and calls into ``engine.kernels._cpu`` (C++, ``csrc/cpu``). Contracts in ``api``.

Each op tests its arguments with a few plain comparisons; when one fails, ``checks`` finds which and raises. These functions run about a
hundred times per decode step, so they must cost microseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import checks, checks_sample, checks_verify, reference
from .api import BeamResult, EndTokens, HeadDraw, LogitBias, Penalties, SampleResult, VerifyResult
from .packed import PackedWeight
from .quantized import QuantizedWeight
from .reference_head import draw

_cpu: Any = None
_reason: str | None = None
try:
    _cpu = importlib.import_module("._cpu", __package__)
except ImportError as error:
    _reason = f"engine.kernels._cpu cannot be imported: {error}"

# ---- helpers shared by the ops ----

_F32 = torch.float32
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType in csrc/cpu/kernels.h
_CACHE_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}  # likewise
# enum WeightFormat there: matrices in rows have the numbers of their dtypes, then come the packed ones
_PACKED = {"float32": 3, "bfloat16": 4, "float16": 5, "int8": 6, "int4": 7}


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    return _reason if device_type == "cpu" else f"these kernels run on cpu, not on {device_type}"


def describe() -> str:
    """Threads and instruction set in use, as one line."""
    pinned = ", pinned" if _cpu.threads_pinned() else ""
    return f"{_cpu.num_threads()} threads{pinned}; instruction set {_cpu.isa()}, of {', '.join(_cpu.supported_isas())}"


def check_environment() -> None:
    """``ValueError`` where ``ENGINE_NUM_THREADS`` or ``ENGINE_PIN_THREADS`` holds no such number."""
    _cpu.num_threads()
    _cpu.threads_pinned()


def _on_cpu(name: str, t: Tensor) -> None:
    """For the first argument: ``checks`` holds the others to its device."""
    if not t.is_cpu:
        raise ValueError(f"{name} is on {t.device}; these kernels run on cpu")


def _float32(name: str, t: Tensor) -> None:
    """For activations, beside ``_on_cpu``."""
    _on_cpu(name, t)
    if t.dtype is not _F32:
        raise TypeError(f"{name} must be float32, got {t.dtype}")


def _cache_dtype(key_cache: Tensor) -> int:
    try:
        return _CACHE_DTYPE[key_cache.dtype]
    except KeyError:
        raise TypeError(f"key_cache is {key_cache.dtype}, which is for GPUs; the C++ kernels have float32, bfloat16 and int8") from None


# ---- linear ----


def _linear_plan(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> tuple[int, int, int, int, tuple[int, ...], int] | None:
    """Rows, width of the result, and what ``_cpu.linear`` takes: x's row stride, K, the weights as one flat tuple, their format. None
    where ``checks.linear`` must say what is wrong."""
    if isinstance(weights, (Tensor, PackedWeight)):
        return None
    rows, k = x.shape
    if x.dtype is not _F32 or not x.is_cpu or (biases is not None and len(biases) != len(weights)):
        return None
    if x.is_contiguous():
        row_stride = k
    else:
        row_stride, unit = x.stride()
        if unit != 1 and k > 1:
            return None
    width = 0
    segments: tuple[int, ...] = ()
    kind = _kind(weights[0])
    for i, w in enumerate(weights):
        n, depth = w.shape
        data = w.data
        if depth != k or _kind(w) != kind or not data.is_contiguous() or not data.is_cpu:
            return None
        width += n
        scale = w.scale.data_ptr() if isinstance(w, PackedWeight) and w.scale is not None else 0
        if biases is None or (bias := biases[i]) is None:
            segments += (data.data_ptr(), scale, n, 0, 0)
            continue
        if bias.shape != (n,) or not bias.is_contiguous() or not bias.is_cpu:
            return None
        if bias.dtype is not _F32 and isinstance(w, Tensor) and bias.dtype is not w.dtype:
            return None
        segments += (data.data_ptr(), scale, n, bias.data_ptr(), _DTYPE[bias.dtype])
    shape = (rows, width)
    if residual is not None and not (residual.dtype is _F32 and residual.shape == shape and residual.is_contiguous() and residual.is_cpu):
        return None
    if out is not None and not (out.dtype is _F32 and out.shape == shape and out.is_contiguous() and out.is_cpu):
        return None
    return rows, width, row_stride, k, segments, kind


def _kind(weight: Tensor | PackedWeight | QuantizedWeight) -> int:
    """Its WeightFormat; ``KeyError`` for a dtype that none has."""
    if isinstance(weight, PackedWeight):
        return _PACKED[weight.format]
    if isinstance(weight, QuantizedWeight):
        raise TypeError(f"a matrix is quantised for a GPU ({weight.format}); the C++ kernels take tensors or kernels.pack(...)")
    return _DTYPE[weight.dtype]


def linear(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``api.linear``; at most 16 weights."""
    try:
        plan = _linear_plan(x, weights, biases, residual, out)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # not a tensor, not two dimensions, no weight
        plan = None
    if plan is None:
        checks.linear(x, weights, biases, residual, out)
        _float32("x", x)
        _kind(weights[0])  # refuses what is quantised for a GPU
        raise ValueError("linear: x, weights, biases, residual or out is not what the contract says")
    rows, width, row_stride, k, segments, kind = plan
    if out is None:
        out = x.new_empty((rows, width))
    _cpu.linear(
        x.data_ptr(), row_stride, rows, k, segments, kind, 0 if residual is None else residual.data_ptr(), out.data_ptr()
    )  # fmt: skip
    return out


# ---- embed, rms_norm, rope_append, silu_mul ----


def embed(tokens: Tensor, table: Tensor | PackedWeight | QuantizedWeight) -> Tensor:
    checks.embed(tokens, table)
    _on_cpu("tokens", tokens)
    vocab, width = table.shape
    out = torch.empty((tokens.shape[0], width), dtype=_F32)
    scale = table.scale.data_ptr() if isinstance(table, PackedWeight) and table.scale is not None else 0
    _cpu.embed(tokens.data_ptr(), tokens.shape[0], table.data.data_ptr(), scale, _kind(table), vocab, width, out.data_ptr())
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = _F32) -> Tensor:
    checks.rms_norm(x, weight, dtype)
    _on_cpu("x", x)
    if dtype is not _F32:
        raise TypeError(f"dtype must be float32 for the C++ kernels, got {dtype}")
    out = torch.empty_like(x)
    rows, width = x.shape
    _cpu.rms_norm(x.data_ptr(), rows, width, weight.data_ptr(), _DTYPE[weight.dtype], eps, out.data_ptr())
    return out


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
    num_blocks, num_kv_heads, block_size, head_dim = checks.rope_append(
        qkv, positions, slots, cos, sin, key_cache, value_cache, num_heads, q_norm, k_norm
    )
    _float32("qkv", qkv)
    tokens = qkv.shape[0]
    max_position, half = cos.shape
    out = qkv.new_empty((tokens, num_heads, head_dim))
    q_weight, k_weight, norm_dtype = 0, 0, 0
    if q_norm is not None and k_norm is not None:
        q_weight, k_weight, norm_dtype = q_norm.data_ptr(), k_norm.data_ptr(), _DTYPE[q_norm.dtype]
    _cpu.rope_append(
        qkv.data_ptr(), positions.data_ptr(), slots.data_ptr(), cos.data_ptr(), sin.data_ptr(), key_cache.data_ptr(),
        value_cache.data_ptr(), q_weight, k_weight, out.data_ptr(), _cache_dtype(key_cache), norm_dtype, tokens, max_position,
        num_blocks, num_heads, num_kv_heads, head_dim, half, block_size, norm_eps, interleaved,
    )  # fmt: skip
    return out


def silu_mul(x: Tensor) -> Tensor:
    checks.silu_mul(x)
    _float32("x", x)
    rows, width = x.shape
    out = x.new_empty((rows, width // 2))
    _cpu.silu_mul(x.data_ptr(), rows, width // 2, out.data_ptr())
    return out


# ---- paged_attention ----


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
    num_blocks, num_kv_heads, block_size, head_dim = checks.paged_attention(
        q, key_cache, value_cache, block_table, query_start, context_len, window, tree_start, ancestors
    )
    _float32("q", q)
    tokens, num_heads, _ = q.shape
    sequences, max_blocks = block_table.shape
    out = torch.empty_like(q)
    _cpu.paged_attention(
        q.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), _cache_dtype(key_cache), block_table.data_ptr(),
        query_start.data_ptr(), context_len.data_ptr(), 0 if tree_start is None else tree_start.data_ptr(),
        0 if ancestors is None else ancestors.data_ptr(), out.data_ptr(), tokens, sequences, max_blocks, num_blocks, num_heads,
        num_kv_heads, head_dim, block_size, scale, window,
    )  # fmt: skip
    return out


# ---- move_tokens, copy_blocks, feed_tokens ----


def move_tokens(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    num_blocks, num_kv_heads, block_size, head_dim = checks.copies(key_cache, value_cache, source, target)
    _on_cpu("key_cache", key_cache)
    _cpu.move_tokens(
        key_cache.data_ptr(), value_cache.data_ptr(), key_cache.element_size(), source.data_ptr(), target.data_ptr(), len(source),
        len(key_cache), num_blocks, num_kv_heads, block_size, head_dim,
    )  # fmt: skip


def copy_blocks(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    sizes = checks.copies(key_cache, value_cache, source, target)
    _on_cpu("key_cache", key_cache)
    sources, targets = source.tolist(), target.tolist()
    for name, blocks in (("source", sources), ("target", targets)):
        for i, block in enumerate(blocks):
            if not 0 <= block < sizes.num_blocks:
                raise ValueError(f"{name} must hold values in [0, {sizes.num_blocks}), got {block} at {i}")
    checks.chains(sources, targets)
    # By NumPy: torch wakes OpenMP's threads for this, and they then spin on the cores that the kernels want.
    for cache in (key_cache, value_cache):
        bits = cache.view(torch.int8).numpy()
        for block, to in zip(sources, targets, strict=True):
            bits[:, to] = bits[:, block]


def feed_tokens(tokens: Tensor, source: Tensor, drawn: Tensor) -> None:
    checks.feed_tokens(tokens, source, drawn)
    _on_cpu("tokens", tokens)
    reference.feed_tokens(tokens, source, drawn)


# ---- sample ----


class SampleWorkspace:
    """What a caller of ``sample`` keeps between its calls: the results, which the next call overwrites, and the arguments of the last one.

    A call with the very same tensors as the last (the numbers in them may be others, their memory may not) and with logits of the same form
    checks and allocates nothing. Two calls that may overlap need a workspace each.
    """

    def __init__(self) -> None:
        self._given: tuple[Any, ...] = ()
        self._form: tuple[Any, ...] | None = None
        self._call: Any = None
        self._result: Any = None

    def run(self, logits: Tensor, given: tuple[Any, ...]) -> SampleResult:
        """``given``: the arguments of ``sample`` past the logits, in their order."""
        same = len(given) == len(self._given) and all(map(is_, given, self._given))
        if not same or not isinstance(logits, Tensor) or _form(logits) != self._form:
            self._prepare(logits, given)
        self._call(logits.data_ptr())
        result: SampleResult = self._result
        return result

    def _prepare(self, logits: Tensor, given: tuple[Any, ...]) -> None:
        self._given = ()
        checks_sample.sample(logits, *given)
        *law, penalties, bias, end_tokens, allowed, logprobs = given
        _on_cpu("logits", logits)
        rows, vocab = logits.shape
        result = SampleResult(torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int32))
        if logprobs is not None:
            result = result._replace(logprobs=torch.empty(rows, dtype=_F32), processed_logprobs=torch.empty(rows, dtype=_F32))
        if logprobs:
            result = result._replace(
                top_tokens=torch.empty(rows, logprobs, dtype=torch.int64),
                top_logprobs=torch.empty(rows, logprobs, dtype=_F32),
                processed_top_tokens=torch.empty(rows, logprobs, dtype=torch.int64),
                processed_top_logprobs=torch.empty(rows, logprobs, dtype=_F32),
            )
        self._call = _cpu.SampleCall(
            _DTYPE[logits.dtype], logits.stride(0), rows, vocab, _addresses(law), _lists(penalties, bias, end_tokens, allowed),
            logprobs or 0, _addresses(result),
        )  # fmt: skip
        self._result = result
        self._form = _form(logits)
        self._given = given


def _form(logits: Tensor) -> tuple[Any, ...]:
    return logits.dtype, logits.shape, logits.stride(), logits.device


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    logprobs: int | None = None,
    workspace: Any = None,
) -> SampleResult:
    """See ``api.sample``."""
    if workspace is None:
        workspace = SampleWorkspace()
    elif not isinstance(workspace, SampleWorkspace):
        raise TypeError(f"workspace must be a cpu.SampleWorkspace or None, got {type(workspace).__name__}")
    law = (temperature, top_k, top_p, min_p, seed, position, stream)
    return workspace.run(logits, (*law, penalties, bias, end_tokens, allowed, logprobs))


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _lists(penalties: Penalties | None, bias: LogitBias | None, end_tokens: EndTokens | None, allowed: Tensor | None) -> tuple[Any, ...]:
    """The addresses of each list of tokens with its length, and of the mask; zeros for what is not there."""
    addresses: list[Any] = []
    for group, size in ((penalties, 6), (bias, 3), (end_tokens, 3)):
        addresses += ((0,) * size, 0) if group is None else (_addresses(group), len(group.token))
    return (*addresses, 0 if allowed is None else allowed.data_ptr())


# ---- sample_head ----


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
    """See ``api.sample_head``: the product in C++, the draw in PyTorch. On a CPU only shards of a vocabulary want this op; for a whole one
    ``sample`` costs next to nothing beside the product."""
    checks_sample.sample_head(x, head, temperature, seed, position, stream, first_token)
    _float32("x", x)
    checks_sample.temperature_values(temperature)
    return draw(linear(x, (head,)), temperature, seed, position, stream, first_token)


# ---- beam_select ----


def beam_select(
    logits: Tensor,
    scores: Tensor,
    group_start: Tensor,
    num_candidates: int,
    temperature: Tensor,
    top_k: Tensor,
    position: Tensor,
    *,
    seed: Tensor | None = None,
    stream: Tensor | None = None,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    workspace: Any = None,
) -> BeamResult:
    """See ``api.beam_select``."""
    checks_sample.beam_select(
        logits, scores, group_start, num_candidates, temperature, top_k, position, seed, stream, penalties, bias, end_tokens, allowed
    )  # fmt: skip
    _on_cpu("logits", logits)
    rows, vocab = logits.shape
    groups = len(group_start) - 1
    shape = (groups, num_candidates)
    result = BeamResult(
        torch.empty(shape), torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int32), torch.empty(shape),
        torch.empty(rows, dtype=torch.int32),
    )  # fmt: skip
    _cpu.beam_select(
        logits.data_ptr(), _DTYPE[logits.dtype], logits.stride(0), rows, vocab, groups, num_candidates,
        _addresses((scores, group_start, temperature, top_k, position, seed, stream)), _lists(penalties, bias, end_tokens, allowed),
        _addresses(result),
    )  # fmt: skip
    return result


# ---- verification of drafts ----


def verify_drafts(tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> VerifyResult:
    """See ``api.verify_drafts``."""
    checks_verify.verify_drafts(tokens, status, draft, parent, start)
    _on_cpu("tokens", tokens)
    rows, sequences = len(tokens), len(start) - 1
    result = VerifyResult(torch.empty(sequences, dtype=torch.int32), torch.empty(rows, dtype=torch.int32))
    _cpu.verify_drafts(_addresses((tokens, status, draft, parent, start)), rows, sequences, _addresses(result[:2]))
    return result


def masses(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    position: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``api.masses``."""
    checks_sample.masses(logits, temperature, top_k, top_p, min_p, position, penalties, bias, end_tokens, allowed)
    _on_cpu("logits", logits)
    rows, vocab = logits.shape
    mass, status = torch.empty(rows, vocab, dtype=torch.int64), torch.empty(rows, dtype=torch.int32)
    _cpu.masses(
        logits.data_ptr(), _DTYPE[logits.dtype], logits.stride(0), rows, vocab,
        _addresses((temperature, top_k, top_p, min_p, None, position, None)), _lists(penalties, bias, end_tokens, allowed),
        mass.data_ptr(), status.data_ptr(),
    )  # fmt: skip
    return mass, status


def verify_block(
    target: Tensor, status: Tensor, proposal: Tensor, draft: Tensor, start: Tensor, seed: Tensor, position: Tensor, stream: Tensor
) -> VerifyResult:
    """See ``api.verify_block``."""
    checks_verify.verify_block(target, status, proposal, draft, start, seed, position, stream)
    _on_cpu("target", target)
    rows, vocab = target.shape
    sequences = len(start) - 1
    result = VerifyResult(
        torch.empty(sequences, dtype=torch.int32), torch.empty(rows, dtype=torch.int32), torch.empty(sequences, dtype=torch.int64),
        torch.empty(sequences, dtype=torch.int32),
    )  # fmt: skip
    arguments = (target, status, proposal, draft, start, seed, position, stream)
    _cpu.verify_block(_addresses(arguments), rows, vocab, sequences, _addresses(result))
    return result
