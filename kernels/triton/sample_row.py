"""What the kernels share: how a row is read, what its parameters ask for, and where its state lies.

Token ids are flat tiles; offsets of rows are int64. ``values``, ``touched`` and ``listed`` come from ``sample_adjust`` and are None where
the call has no lists; ``allowed`` is None where it has no mask.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

from .. import reference_sample as law
from .fixed_math import KEY_MIN, key_token, key_value, log, make_key, ordered, unordered
from .noise import token_noise

CHUNK = tl.constexpr(4096)  # tokens of one program of the wide kernels
MASS_CHUNK = tl.constexpr(2048)  # of `sample_masses`: the most whose count and mass fit into one int64 (see there)
SETTLE_CAP = tl.constexpr(2048)  # candidates that `sample_settle` works on; larger rows with more go on to the search
CAP = tl.constexpr(8192)  # candidates that `sample_resolve` works on
SETTLE_TOP_K = tl.constexpr(256)  # top-k above this is searched for
PIVOTS = tl.constexpr(16)

# The phase of a row between the kernels.
DONE = tl.constexpr(0)  # its token is known
SEARCH = tl.constexpr(1)  # its threshold is not known yet
RACE = tl.constexpr(2)  # its threshold is known; its tokens have yet to race

# int64 [R, STATE]: the state of a row between the kernels.
STATE = tl.constexpr(8)
S_PHASE = tl.constexpr(0)
S_THRESHOLD = tl.constexpr(1)  # ordered: tokens at or above it are kept
S_LARGEST = tl.constexpr(2)  # ordered: the largest z
S_BEST = tl.constexpr(3)  # the key of the best score so far
S_MASS = tl.constexpr(4)  # of the kept tokens
S_COUNT = tl.constexpr(5)  # candidates written

# `listed[r]`: what `sample_adjust` found.
LISTED = tl.constexpr(1)  # the row has lists
LIST_BAD = tl.constexpr(2)  # one of them is out of range

# Arguments whose value or alignment must not make Triton compile anew in the middle of a run, for they gain nothing from it.
_ANY_VALUE = (
    "chunks",
    "penalty_size",
    "bias_size",
    "end_size",
    "num_top",
    "rows",
    "groups",
    "num_candidates",
    "room",
    "num_drawn",
    "entries",
    "first_token",
    "tiles",
)
_ANY_ALIGNMENT = (
    "temperature", "top_k", "top_p", "min_p", "seed", "position", "stream",
    "repetition", "presence", "frequency", "penalty_token", "penalty_count", "penalty_start",
    "bias_token", "bias_value", "bias_start", "end_token", "end_position", "end_start", "allowed", "scores", "group_start",
    "draft", "parent", "start", "ids", "positions", "slots", "source", "target", "drawn",
)  # fmt: skip

_GREEDY_BELOW = tl.constexpr(law.GREEDY_BELOW)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)


def kernel(function: Any) -> Any:
    """``triton.jit`` for the functions that are launched."""
    names = set(inspect.signature(function).parameters)
    return triton.jit(
        function,
        do_not_specialize=[name for name in _ANY_VALUE if name in names],
        do_not_specialize_on_alignment=[name for name in _ANY_ALIGNMENT if name in names],
    )


@triton.jit
def load_raw(logits, row, row_stride, tokens, there):
    """Logits as given, float32; -inf where not ``there``."""
    raw = tl.load(logits + row * row_stride + tokens, mask=there, other=float("-inf"))
    if raw.dtype == tl.bfloat16:  # by its bits: the interpreter's own conversion loses subnormal values
        wide = (raw.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = raw.to(tl.float32)
    return wide


@triton.jit
def adjusted(raw, row, vocab, tokens, there, values, touched, listed, allowed):
    """Steps 1 and 2 of the contract on raw logits: the values of the row's lists, and -inf for what is not allowed."""
    x = raw
    if listed is not None:
        if (tl.load(listed + row) & LISTED) != 0:
            word = tl.load(touched + row * ((vocab + 15) // 16) + (tokens >> 4), mask=there, other=0)
            hit = there & (((word >> ((tokens & 15) * 2)) & 3) != 0)
            x = tl.where(hit, tl.load(values + row * vocab + tokens, mask=hit, other=0.0), x)
    if allowed is not None:
        word = tl.load(allowed + row * ((vocab + 31) // 32) + (tokens >> 5), mask=there, other=0)
        x = tl.where(((word >> (tokens & 31)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def divided(x, temperature):
    """``x / temperature``, without NaN (rows that have one draw nothing)."""
    z = x
    if temperature != 1.0:
        z = tl.div_rn(x, tl.zeros_like(x) + temperature)
    return tl.where(z == z, z, float("-inf"))


@triton.jit
def scaled(x, temperature):
    """Step 3: ``z``, without NaN."""
    return divided(x, tl.where(temperature >= _GREEDY_BELOW, temperature, 1.0))


@triton.jit
def load_z(logits, row, row_stride, vocab, tokens, there, temperature, values, touched, listed, allowed):
    """Steps 1 to 3 of the contract for a tile of tokens."""
    raw = load_raw(logits, row, row_stride, tokens, there)
    return scaled(adjusted(raw, row, vocab, tokens, there, values, touched, listed, allowed), temperature)


@triton.jit
def is_greedy(temperature):
    return temperature < _GREEDY_BELOW


@triton.jit
def has_top_k(top_k, vocab):
    return (top_k > 0) & (top_k < vocab)


@triton.jit
def has_min_p(min_p):
    return min_p >= _SMALLEST_NORMAL


@triton.jit
def is_unfiltered(temperature, top_k, top_p, min_p, vocab):
    """Whether a row is sampled from all its tokens."""
    return (temperature >= _GREEDY_BELOW) & (has_top_k(top_k, vocab) == 0) & (top_p >= 1.0) & (has_min_p(min_p) == 0)


@triton.jit
def min_p_threshold(largest, min_p):
    """Step 6's threshold, ordered; for rows that have min-p."""
    return ordered(largest + log(tl.where(has_min_p(min_p), min_p, 1.0)))


@triton.jit
def chunk_top(maxima, row, chunk, SUB: tl.constexpr, NSUB: tl.constexpr):
    """The ordered maximum of a chunk of CHUNK tokens."""
    subs: tl.constexpr = CHUNK // SUB
    return tl.max(ordered(tl.load(maxima + row * NSUB + chunk * subs + tl.arange(0, subs))), axis=0)


@triton.jit
def append(candidates, row, at, take, keys, LIMIT: tl.constexpr):
    """Write the taken keys behind the first ``at`` of the row's candidates, as far as ``LIMIT`` allows."""
    slot = at + tl.cumsum(take.to(tl.int32), axis=0) - 1
    tl.store(candidates + row * CAP + slot, keys, mask=take & (slot < LIMIT))


@triton.jit
def race_candidates(candidates, row, count, threshold, seed, position, stream):
    """The key of the best score of the row's first ``count`` candidates with z at or above ``threshold`` (ordered)."""
    best = tl.full([], KEY_MIN, tl.int64)
    at = 0
    while at < count:
        slot = at + tl.arange(0, SETTLE_CAP)
        keys = tl.load(candidates + row * CAP + slot, mask=slot < count, other=0)
        o = key_value(keys)
        ids = key_token(keys)
        score = ordered(unordered(o) - token_noise(ids, seed, position, stream))
        kept = (slot < count) & (o >= threshold)
        best = tl.maximum(best, tl.max(tl.where(kept, make_key(score, ids), KEY_MIN), axis=0))
        at += SETTLE_CAP
    return best
