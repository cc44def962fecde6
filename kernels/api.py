"""Every op of the engine: its signature and its contract, written once.

A backend is a module (``reference``, ``cpu``) with functions of exactly these names and signatures; ``registry`` chooses one per op.
The functions here check nothing themselves: each backend validates its own arguments and raises ``ValueError``/``TypeError``.

Words used throughout:

* ``T`` query tokens of one step, all sequences flattened; ``S`` sequences; ``R`` rows of logits; ``V`` vocabulary size.
* A *block* holds ``block_size`` (a multiple of 16) consecutive tokens of one sequence; a *slot* is ``block * block_size + offset``.
* ``key_cache [num_blocks, num_kv_heads, block_size // 16, head_dim, 16]``: within a sub-block of 16 tokens the tokens are contiguous,
  so that scores of 16 keys come from vector loads without horizontal sums.
* ``value_cache [num_blocks, num_kv_heads, block_size, head_dim]``.
* Row-invariance: every op computes a row of its result with the same operations in the same order whatever other rows are in the call
  and however many threads run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .registry import default_ops

STATUS_OK = 0
STATUS_NAN = 1
STATUS_NOTHING_ALLOWED = 2


class SampleResult(NamedTuple):
    """What ``sample`` returns, one entry per row of logits."""

    tokens: Tensor  # int64 [R]; -1 where status is not STATUS_OK
    logprobs: Tensor  # float32 [R]; natural log-softmax of the raw logits at the token (before penalty, temperature, filters)
    status: Tensor  # int32 [R]; STATUS_OK, STATUS_NAN or STATUS_NOTHING_ALLOWED


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table [V, H]`` (fp32, bf16 or fp16) at ``tokens [T]`` (int32) as float32 ``[T, H]``.

    Token ids are the caller's promise (validated at admission); an id outside ``[0, V)`` raises ``ValueError``.
    """
    return default_ops(table.device).embed(tokens, table)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``concat_i(x @ weights[i].T + biases[i]) + residual`` in float32.

    ``x [M, K]`` float32, unit stride in K, any row stride. ``weights[i] [N_i, K]`` contiguous, all of one dtype (fp32, bf16 or fp16), in
    the model's own storage: nothing is packed or copied. ``biases[i] [N_i]`` of the weights' dtype or fp32. ``residual`` and ``out`` are
    ``[M, sum N_i]`` float32 and contiguous; ``out`` may be ``residual``.

    Products accumulate in float32. Each output is a function of its own x row and weight row only (row-invariance): K is cut at fixed
    absolute places and lanes and partial sums are added in one fixed order.
    """
    return default_ops(x.device).linear(x, weights, biases, residual=residual, out=out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` per row (Zhang and Sennrich 2019).

    ``x [M, H]`` float32; ``weight [H]`` fp32, bf16 or fp16.
    """
    return default_ops(x.device).rms_norm(x, weight, eps)


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
    """Rotate queries and keys, write keys and values into the cache, return the rotated queries ``[T, num_heads, D]`` float32.

    ``qkv [T, (num_heads + 2 * num_kv_heads) * D]`` float32: queries, then keys, then values of each token. ``positions``, ``slots``: int32
    ``[T]``. ``cos``, ``sin``: float32 ``[max_position, rot / 2]`` with ``rot <= D`` even; components past ``rot`` pass unrotated (RoPE, Su
    et al. 2021). ``interleaved`` pairs components (0,1),(2,3)...; otherwise (i, i + rot/2), each pair turned by table column i. ``q_norm``
    and ``k_norm [D]`` (both or neither): RMS normalisation of each head before the rotation (Qwen3). Caches are fp32 or bf16 (round to
    nearest even). A slot of -1 writes nothing.
    """
    return default_ops(qkv.device).rope_append(
        qkv, positions, slots, cos, sin, key_cache, value_cache,
        num_heads=num_heads, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps,
    )  # fmt: skip


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
) -> Tensor:
    """Causal attention of a ragged batch over the paged cache; float32 ``[T, num_heads, D]``.

    ``q [T, num_heads, D]`` float32 contiguous, D a multiple of 8 in 8..256, num_heads a multiple of num_kv_heads. Sequence s owns query
    rows ``query_start[s]:query_start[s+1]`` (int32 ``[S+1]``, ``query_start[S] == T``), which are the last of its ``context_len[s]`` (int32
    ``[S]``) tokens, whose keys and values are already in the cache; its blocks are ``block_table[s, :]`` (int32 ``[S, max_blocks]``). Query
    row i attends keys ``0..p`` with ``p = context_len - num_queries + i``, or the last ``window`` of those if ``window > 0``. Cache slots
    no row may see are never read into a result, whatever they hold. Keys are walked in fixed absolute splits of 512, merged in order
    (FlashDecoding, Dao et al. 2023), so decode, verification and chunked prefill give the same bits.
    """
    return default_ops(q.device).paged_attention(
        q, key_cache, value_cache, block_table, query_start, context_len, scale=scale, window=window
    )


def silu_mul(x: Tensor) -> Tensor:
    """``silu(x[:, :F]) * x[:, F:]`` for ``x [M, 2F]`` float32 contiguous; float32 ``[M, F]`` (SwiGLU, Shazeer 2020)."""
    return default_ops(x.device).silu_mul(x)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    repetition_penalty: Tensor | None = None,
    history: Tensor | None = None,
    history_start: Tensor | None = None,
) -> SampleResult:
    """One token per row of ``logits [R, V]`` (float32, unit stride in V, any row stride), by the token law.

    Per row: ``temperature`` float32 (below 1e-5: greedy), ``top_k`` int32 (0 off; ties with the k-th are kept), ``seed`` int64 (the bits of
    a 64-bit key), ``position`` int32 (absolute position of the token drawn), ``stream`` int32. ``repetition_penalty`` float32 ``[R]``
    divides positive and multiplies other logits of the distinct ids ``history[history_start[r]:history_start[r+1]]`` (int32; CTRL, Keskar
    et al. 2019); all three are given or none. ``logits`` is unchanged on return.

    The token is ``argmax_i(z_i - log(E_i))`` over kept i, ``z = penalised logit / T``, lowest id on ties, with the noise ``E_i`` of
    ``kernels/noise.py`` (Gumbel-max). Order: penalty, temperature, top-k. +inf wins over everything finite (lowest id first among
    several when greedy or drawn); -inf is never drawn. A NaN anywhere in a row gives STATUS_NAN, a row of only -inf STATUS_NOTHING_ALLOWED.
    """
    return default_ops(logits.device).sample(
        logits, temperature, top_k, seed, position, stream,
        repetition_penalty=repetition_penalty, history=history, history_start=history_start,
    )  # fmt: skip
