"""The last kernels of ``sample``. ``sample_race``, grid (rows, chunks): every kept token of a row that is not settled gets its exact
score, and the best key of all chunks wins (an integer maximum, so the order does not matter); with log-probabilities asked for, every
row's kept mass is summed too. Chunks whose maximum is below the threshold end at once. ``sample_finish``, grid (rows): the token of
those rows, and the log-probabilities.

The n most likely tokens are popped one by one: the best sub-block by its maximum, in it the best token, whose successor in that
sub-block becomes its maximum. Keys order values, then tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fixed_math import (
    KEY_MAX,
    KEY_MIN,
    ORDERED_LOWEST,
    ORDERED_NEG_INF,
    below,
    exp,
    key_token,
    key_value,
    log,
    make_key,
    ordered,
    unordered,
    weight,
)
from .noise import quad_noise
from .sample_row import (
    CHUNK,
    RACE,
    S_BEST,
    S_LARGEST,
    S_MASS,
    S_PHASE,
    S_THRESHOLD,
    STATE,
    chunk_top,
    kernel,
    load_raw,
    load_z,
)

_POP = tl.constexpr(1024)  # maxima looked at in one go
_NAN = tl.constexpr(float("nan"))
_NONE = tl.constexpr(float("-inf"))


@kernel
def sample_race(
    logits, row_stride, vocab, temperature, seed, position, stream, values, touched, listed, allowed,
    maxima, state,
    LOGPROBS: tl.constexpr, SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = state + row * STATE
    draws = tl.load(at + S_PHASE) == RACE
    if (draws | LOGPROBS) == 0:
        return
    threshold = tl.load(at + S_THRESHOLD).to(tl.int32)
    if chunk_top(maxima, row, chunk, SUB, NSUB) < threshold:
        return
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    z = load_z(
        logits, row, row_stride, vocab, tokens, tokens < vocab, tl.load(temperature + row), values, touched, listed, allowed
    )  # fmt: skip
    kept = ordered(z) >= threshold
    if LOGPROBS:
        largest = unordered(tl.load(at + S_LARGEST).to(tl.int32))
        tl.atomic_add(at + S_MASS, tl.sum(tl.where(kept, weight(below(z, largest)), 0), axis=0), sem="relaxed")
    if draws:
        quads = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
        score = ordered(z - quad_noise(quads, tl.load(seed + row), tl.load(position + row), tl.load(stream + row)))
        tl.atomic_max(at + S_BEST, tl.max(tl.where(kept, make_key(score, tokens), KEY_MIN), axis=0), sem="relaxed")


@triton.jit
def _best_sub_block(maxima, filled):
    """The sub-block with the largest maximum, the first of several; also that maximum, ordered."""
    best = tl.full([], KEY_MIN, tl.int64)
    first = 0
    while first < filled:
        sub = first + tl.arange(0, _POP)
        o = ordered(tl.load(maxima + sub, mask=sub < filled, other=_NONE))
        best = tl.maximum(best, tl.max(make_key(o, sub), axis=0))
        first += _POP
    return key_token(best), key_value(best)


@triton.jit
def _pop(maxima, sub, z, tokens, last, SUB: tl.constexpr):
    """The best token of a sub-block below the key popped last; what comes after it becomes the sub-block's maximum."""
    keys = make_key(ordered(z), tokens)
    key = tl.max(tl.where(keys < last, keys, KEY_MIN), axis=0)
    rest = tl.max(tl.where(keys < key, keys, KEY_MIN), axis=0)
    tl.debug_barrier()  # all have read the maxima
    tl.store(maxima + sub, tl.where(rest == KEY_MIN, _NONE, unordered(key_value(rest))))
    tl.debug_barrier()
    return key


@kernel
def sample_finish(
    logits, row_stride, vocab, chunks, temperature, values, touched, listed, allowed,
    maxima, raw_maxima, raw_largest, raw_sum, state, tokens,
    chosen_raw, chosen, top_raw_tokens, top_raw, top_tokens, top, num_top,
    LOGPROBS: tl.constexpr, SUB: tl.constexpr, NSUB: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = state + row * STATE
    token = tl.load(tokens + row)
    if tl.load(at + S_PHASE) == RACE:
        token = key_token(tl.load(at + S_BEST)).to(tl.int64)
        tl.store(tokens + row, token)
    if LOGPROBS:
        heat = tl.load(temperature + row)
        chunk = tl.arange(0, MAX_CHUNKS)
        parts = tl.load(raw_largest + row * chunks + chunk, mask=chunk < chunks, other=_NONE)
        raw_most = tl.max(parts, axis=0)
        sums = tl.load(raw_sum + row * chunks + chunk, mask=chunk < chunks, other=0.0)
        raw_log = log(tl.sum(sums * exp(below(parts, raw_most)), axis=0))
        most = unordered(tl.load(at + S_LARGEST).to(tl.int32))
        mass_log = log(tl.load(at + S_MASS).to(tl.float32) * 2.0**-40)
        drawn = token >= 0
        one = tl.arange(0, 1) + tl.maximum(token, 0).to(tl.int32)
        chosen_x = tl.max(load_raw(logits, row, row_stride, one, one >= 0), axis=0)
        chosen_z = tl.max(load_z(logits, row, row_stride, vocab, one, one >= 0, heat, values, touched, listed, allowed), axis=0)
        tl.store(chosen_raw + row, tl.where(drawn, below(chosen_x, raw_most) - raw_log, _NAN))
        tl.store(chosen + row, tl.where(drawn, below(chosen_z, most) - mass_log, _NAN))
        if raw_maxima is not None:
            threshold = tl.maximum(tl.load(at + S_THRESHOLD).to(tl.int32), ORDERED_LOWEST)
            filled = chunks * (CHUNK // SUB)
            last = tl.full([], KEY_MAX, tl.int64)
            raw_last = tl.full([], KEY_MAX, tl.int64)
            i = 0
            while i < num_top:
                out = row * num_top + i
                sub, o = _best_sub_block(raw_maxima + row * NSUB, filled)
                there = drawn & (o > ORDERED_NEG_INF)
                if there:
                    ids = sub * SUB + tl.arange(0, SUB)
                    raw_last = _pop(raw_maxima + row * NSUB, sub, load_raw(logits, row, row_stride, ids, ids < vocab), ids, raw_last, SUB)
                tl.store(top_raw_tokens + out, tl.where(there, key_token(raw_last), -1))
                tl.store(top_raw + out, tl.where(there, below(unordered(key_value(raw_last)), raw_most) - raw_log, _NONE))
                sub, o = _best_sub_block(maxima + row * NSUB, filled)
                there = drawn & (o >= threshold)
                if there:
                    ids = sub * SUB + tl.arange(0, SUB)
                    z = load_z(logits, row, row_stride, vocab, ids, ids < vocab, heat, values, touched, listed, allowed)
                    last = _pop(maxima + row * NSUB, sub, z, ids, last, SUB)
                tl.store(top_tokens + out, tl.where(there, key_token(last), -1))
                tl.store(top + out, tl.where(there, below(unordered(key_value(last)), most) - mass_log, _NONE))
                i += 1
