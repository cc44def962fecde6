"""The kernels of ``beam_select`` that look at single rows: ``beam_scan``, ``beam_filter``, ``beam_mass``, ``beam_best``.

The log-probability of a token rises with its z, rounding included, and so does its score: the largest z of a sub-block of SUB tokens gives
the best score of the sub-block. Only rows that lists, a mask or noise change are read again for it. Nothing is written out but one number
per sub-block.

============  ==============  =====================================================================================
kernel        grid            does
============  ==============  =====================================================================================
beam_scan     rows x chunks   reads the row: the largest z of each sub-block; whether a NaN is there
beam_filter   rows            checks the row; the threshold of top-k, by bisection over the tokens of the sub-blocks
                              whose largest z reaches the k-th largest of them, a bound of the threshold
beam_mass     rows x chunks   the mass of what is kept, a sum of integers
beam_best     rows x chunks   the best score of each sub-block, as a key that orders equal ones by row and sub-block
============  ==============  =====================================================================================

``state`` is that of ``sample_row``: the phase is RACE for a row whose continuations count, else DONE; threshold, largest z, mass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import checks_sample as limits
from .. import fixed_math as law
from ..api import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK
from .fixed_math import KEY_MIN, ORDERED_INF, ORDERED_LOWEST, ORDERED_NEG_INF, below, log, make_key, ordered, unordered, weight
from .noise import quad_noise
from .sample_row import (
    CHUNK,
    DONE,
    LIST_BAD,
    LISTED,
    RACE,
    S_LARGEST,
    S_MASS,
    S_PHASE,
    S_THRESHOLD,
    STATE,
    adjusted,
    chunk_top,
    divided,
    has_top_k,
    kernel,
    load_raw,
)

_OK = tl.constexpr(STATUS_OK)
_NAN = tl.constexpr(STATUS_NAN)
_NOTHING = tl.constexpr(STATUS_NOTHING_ALLOWED)
_BAD = tl.constexpr(STATUS_BAD_PARAMETER)
_LARGEST = tl.constexpr(limits.LARGEST)
_MASS_SCALE = tl.constexpr(2.0**-law.WEIGHT_BITS)
_NONE = tl.constexpr(float("-inf"))
_TILE = tl.constexpr(4096)  # tokens looked at in one go by `beam_filter`
_GROUPS = tl.constexpr(1024)  # groups likewise


@triton.jit
def log_probability(z, row, state):
    """Step 2 of the contract for values ``z`` of a row."""
    at = state + row * STATE
    largest = unordered(tl.load(at + S_LARGEST).to(tl.int32))
    log_mass = log(tl.load(at + S_MASS).to(tl.float32) * _MASS_SCALE)
    # Where tokens of +inf share the probability it is minus the logarithm, -0.0 for a single one.
    logprob = tl.where(largest == float("inf"), log_mass * -1.0, below(z, largest) - log_mass)
    return tl.where(ordered(z) >= tl.load(at + S_THRESHOLD), logprob, _NONE)


@triton.jit
def load_continuations(
    logits, row, row_stride, vocab, chunk, scores, temperature, seed, position, stream, values, touched, listed, allowed, state
):  # fmt: skip
    """Log-probabilities and scores of the continuations of a row by the tokens of a chunk."""
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    there = tokens < vocab
    z = divided(load_raw(logits, row, row_stride, tokens, there), tl.load(temperature + row))
    logprob = adjusted(log_probability(z, row, state), row, vocab, tokens, there, values, touched, listed, allowed)
    score = logprob + tl.load(scores + row)
    if seed is not None:
        quads = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
        score = score - quad_noise(quads, tl.load(seed + row), tl.load(position + row), tl.load(stream + row))
    return logprob, score


@kernel
def beam_scan(logits, row_stride, vocab, temperature, maxima, chunk_nan, SUB: tl.constexpr, NSUB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    SUBS: tl.constexpr = CHUNK // SUB
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    raw = load_raw(logits, row, row_stride, tokens, tokens < vocab)
    tl.store(chunk_nan + row * tl.num_programs(1) + chunk, tl.max((raw != raw).to(tl.int32), axis=0))
    z = divided(raw, tl.load(temperature + row))
    tl.store(maxima + row * NSUB + chunk * SUBS + tl.arange(0, SUBS), tl.max(tl.reshape(z, [SUBS, SUB]), axis=1))


@triton.jit
def _groups_are_bad(group_start, groups, rows):
    """Whether the groups are not all the rows in order."""
    bad = (tl.load(group_start) != 0) | (tl.load(group_start + groups) != rows)
    at = 0
    while at < groups:
        g = at + tl.arange(0, _GROUPS)
        first = tl.load(group_start + g, mask=g < groups, other=0)
        last = tl.load(group_start + g + 1, mask=g < groups, other=0)
        bad = bad | (tl.max((last < first).to(tl.int32), axis=0) != 0)
        at += _GROUPS
    return bad


@triton.jit
def _count(bound, logits, row, row_stride, vocab, heat, selected, num_selected, SUB: tl.constexpr):
    """How many tokens of the selected sub-blocks have z at or above ``bound``."""
    GROUP: tl.constexpr = _TILE // SUB
    count = tl.zeros([_TILE], tl.int32)
    at = 0
    while at < num_selected:
        slot = at + tl.arange(0, GROUP)
        sub = tl.load(selected + slot, mask=slot < num_selected, other=vocab // SUB + 1)
        ids = tl.reshape(sub[:, None] * SUB + tl.arange(0, SUB)[None, :], [_TILE])
        z = divided(load_raw(logits, row, row_stride, ids, ids < vocab), heat)
        count += (ordered(z) >= bound).to(tl.int32)
        at += GROUP
    return tl.sum(count, axis=0)


@kernel
def beam_filter(
    logits, row_stride, vocab, chunks, rows, groups, scores, group_start, temperature, top_k,
    maxima, chunk_nan, selected, state, status,
    SUB: tl.constexpr, NSUB: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    score = tl.load(scores + row)
    k = tl.load(top_k + row)
    index = tl.arange(0, NSUB)
    top = ordered(tl.load(maxima + row * NSUB + index, mask=index < chunks * (CHUNK // SUB), other=_NONE))
    highest = tl.max(top, axis=0)
    chunk = tl.arange(0, MAX_CHUNKS)
    nan = tl.max(tl.load(chunk_nan + row * chunks + chunk, mask=chunk < chunks, other=0), axis=0) != 0
    is_out = score == _NONE
    bad = ((heat > 0.0) & (heat < float("inf")) & ((tl.abs(score) <= _LARGEST) | is_out)) == 0
    bad = bad | _groups_are_bad(group_start, groups, rows)
    counts = (bad | is_out | nan | (highest == ORDERED_NEG_INF)) == 0

    low = tl.full([], ORDERED_LOWEST, tl.int64)
    if counts:
        if highest == ORDERED_INF:
            low = highest.to(tl.int64)
        elif has_top_k(k, vocab):
            bound = low
            upper = highest.to(tl.int64)
            while bound < upper:  # the k-th largest maximum
                middle = bound + (upper - bound + 1) // 2
                enough = tl.sum((top >= middle).to(tl.int32), axis=0) >= k
                bound = tl.where(enough, middle, bound)
                upper = tl.where(enough, upper, middle - 1)
            chosen = top >= bound
            num_chosen = tl.sum(chosen.to(tl.int32), axis=0)
            mine = selected + row * NSUB
            tl.store(mine + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, index, mask=chosen)
            tl.debug_barrier()
            low = bound
            high = highest.to(tl.int64)
            while low < high:  # the k-th largest z
                middle = low + (high - low + 1) // 2
                enough = _count(middle, logits, row, row_stride, vocab, heat, mine, num_chosen, SUB) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)

    at = state + row * STATE
    tl.store(at + S_PHASE, tl.where(counts, RACE, DONE))
    tl.store(at + S_THRESHOLD, low)
    tl.store(at + S_LARGEST, highest)
    tl.store(at + S_MASS, 0)
    # `beam_best` makes it OK where there is a continuation.
    tl.store(status + row, tl.where(bad, _BAD, tl.where(nan & (is_out == 0), _NAN, _NOTHING)))


@kernel
def beam_mass(logits, row_stride, vocab, temperature, maxima, state, SUB: tl.constexpr, NSUB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = state + row * STATE
    if tl.load(at + S_PHASE) == DONE:
        return
    threshold = tl.load(at + S_THRESHOLD)
    if chunk_top(maxima, row, chunk, SUB, NSUB) < threshold:
        return
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    z = divided(load_raw(logits, row, row_stride, tokens, tokens < vocab), tl.load(temperature + row))
    largest = unordered(tl.load(at + S_LARGEST).to(tl.int32))
    mass = tl.sum(tl.where(ordered(z) >= threshold, weight(below(z, largest)), 0), axis=0)
    tl.atomic_add(at + S_MASS, mass, sem="relaxed")


@kernel
def beam_best(
    logits, row_stride, vocab, scores, temperature, seed, position, stream, values, touched, listed, allowed,
    maxima, state, best, status,
    SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    SUBS: tl.constexpr = CHUNK // SUB
    counts = tl.load(state + row * STATE + S_PHASE) == RACE
    again = (allowed is not None) | (seed is not None)
    if listed is not None:
        flags = tl.load(listed + row)
        counts = counts & ((flags & LIST_BAD) == 0)
        if ((flags & LIST_BAD) != 0) & (chunk == 0):
            tl.store(status + row, _BAD)
        again = again | ((flags & LISTED) != 0)

    sub = chunk * SUBS + tl.arange(0, SUBS)
    most = tl.full([SUBS], _NONE, tl.float32)
    if counts:
        if again:
            _logprob, score = load_continuations(
                logits, row, row_stride, vocab, chunk, scores, temperature, seed, position, stream, values, touched, listed, allowed, state
            )  # fmt: skip
            most = tl.max(tl.reshape(score, [SUBS, SUB]), axis=1)
        else:
            most = log_probability(tl.load(maxima + row * NSUB + sub), row, state) + tl.load(scores + row)
        if tl.max(most, axis=0) > _NONE:
            tl.store(status + row, _OK)
    at = row * (tl.num_programs(1) * SUBS) + sub
    tl.store(best + at, tl.where(most > _NONE, make_key(ordered(most), at.to(tl.int32)), KEY_MIN))
