"""The search for the threshold of rows that ``sample_settle`` could not settle: ``sample_masses`` twice, ``sample_gather``,
``sample_resolve``. For all other rows their programs end at the phase.

The threshold is the largest x for which the tokens with ``z >= x`` still are ``need`` many (top-k) or have ``need`` mass (top-p): one
target, an integer, so that no order of summation matters. A *bracket* [low, high) holds it. ``sample_masses`` finds the count and the
mass at or above 16 pivots in one pass over the row; the tightest pair of pivots around ``need`` is the next bracket, whatever the pivots
are. The first 16 are quantiles of a sample (``sample_settle``), so about a 16th of the row is left; the second are spread over the
bracket, and one of them is its second lowest value, so that a heap of ties is found out.

``sample_gather`` writes out the tokens in and above the bracket, or if those are more than 8192 the tokens in it, a few hundred as a
rule; ``sample_resolve`` bisects them exactly, and lets them race if they are all. A row with top-k and top-p needs both thresholds in
turn. Where it has more than 8192 tokens above the first, or a bracket has more, the last resort is a bisection over the row itself: exact,
and slow.

Grids: (rows, chunks) but for ``sample_resolve``, which has one program per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fixed_math import (
    ORDERED_INF,
    ORDERED_LOWEST,
    ORDERED_NEG_INF,
    below,
    key_token,
    key_value,
    make_key,
    mass_needed,
    ordered,
    unordered,
    weight,
)
from .sample_row import (
    CAP,
    CHUNK,
    DONE,
    MASS_CHUNK,
    PIVOTS,
    RACE,
    S_COUNT,
    S_LARGEST,
    S_PHASE,
    S_THRESHOLD,
    SEARCH,
    STATE,
    append,
    chunk_top,
    has_min_p,
    has_top_k,
    kernel,
    load_z,
    min_p_threshold,
    race_candidates,
)
from .sample_settle import kth_largest, mass_threshold

# Count and mass of up to MASS_CHUNK tokens in one int64: 2048 weights of 2^40 stay below 2^52, and 2048 * 2^52 is 2^63 without a sign.
_COUNT_SHIFT = tl.constexpr(52)
_COUNT_ONE = tl.constexpr(1 << 52)
_COUNT_BITS = tl.constexpr((1 << 12) - 1)


@triton.jit
def _tighten(low, high, count_low, mass_low, count_high, mass_high, pivot, counts, masses, need, by_count):
    """The bracket after a pass: from the largest pivot that has enough at or above it to the smallest that has not."""
    have = tl.where(by_count, counts, masses)
    low_pivot = tl.max(tl.where(have >= need, pivot, low), axis=0)
    high_pivot = tl.min(tl.where(have < need, pivot, high), axis=0)
    # Equal pivots have equal totals, so a maximum picks them out.
    if low_pivot > low:
        count_low = tl.max(tl.where(pivot == low_pivot, counts, 0), axis=0)
        mass_low = tl.max(tl.where(pivot == low_pivot, masses, 0), axis=0)
    if high_pivot < high:
        count_high = tl.max(tl.where(pivot == high_pivot, counts, 0), axis=0)
        mass_high = tl.max(tl.where(pivot == high_pivot, masses, 0), axis=0)
    return tl.maximum(low_pivot, low), tl.minimum(high_pivot, high), count_low, mass_low, count_high, mass_high


@triton.jit
def _bracket(row, highest, k, p, vocab, pivots, totals, PASSES: tl.constexpr):
    """After ``PASSES`` passes: the bracket, the counts and masses at or above its ends, and what is needed."""
    index = tl.arange(0, PIVOTS)
    pivots += row * (2 * PIVOTS)
    totals += row * (4 * PIVOTS)
    counts = tl.load(totals + index)
    masses = tl.load(totals + PIVOTS + index)
    count_low = tl.max(counts, axis=0)  # the lowest pivot is the lowest value
    mass_low = tl.max(masses, axis=0)
    count_high = count_low * 0
    mass_high = mass_low * 0
    low = 0 * highest + ORDERED_LOWEST
    high = highest + 1
    by_count = has_top_k(k, vocab)
    need = tl.where(by_count, tl.minimum(k.to(tl.int64), count_low), mass_needed(mass_low, p))
    low, high, count_low, mass_low, count_high, mass_high = _tighten(
        low, high, count_low, mass_low, count_high, mass_high, tl.load(pivots + index), counts, masses, need, by_count
    )
    if PASSES == 2:
        counts = tl.load(totals + 2 * PIVOTS + index)
        masses = tl.load(totals + 3 * PIVOTS + index)
        low, high, count_low, mass_low, count_high, mass_high = _tighten(
            low, high, count_low, mass_low, count_high, mass_high, tl.load(pivots + PIVOTS + index), counts, masses, need, by_count
        )
    return low, high, count_low, mass_low, count_high, mass_high, need


@triton.jit
def _second_pivots(low, high):
    """The second lowest value of the bracket, and 15 spread evenly over it (over its upper 32 at most)."""
    index = tl.arange(0, PIVOTS)
    top = unordered(high - 1)
    bottom = tl.maximum(unordered(low), top - 32.0)
    part = index.to(tl.float32) * (1.0 / PIVOTS)
    return tl.where(index == 0, low + 1, ordered(bottom * (1.0 - part) + top * part))


@kernel
def sample_masses(
    logits, row_stride, vocab, temperature, top_k, top_p, values, touched, listed, allowed,
    maxima, state, pivots, totals,
    PASS: tl.constexpr, SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(state + row * STATE + S_PHASE) != SEARCH:
        return
    highest = tl.load(state + row * STATE + S_LARGEST).to(tl.int32)
    index = tl.arange(0, PIVOTS)
    mine = pivots + row * (2 * PIVOTS) + PASS * PIVOTS
    if PASS == 0:
        pivot = tl.load(mine + index)
    else:
        low, high, _a, _b, _c, _d, _e = _bracket(row, highest, tl.load(top_k + row), tl.load(top_p + row), vocab, pivots, totals, 1)
        pivot = _second_pivots(low, high)
        if chunk == 0:
            tl.store(mine + index, pivot)
    subs: tl.constexpr = MASS_CHUNK // SUB
    sub = chunk * subs + tl.arange(0, subs)
    top = tl.max(ordered(tl.load(maxima + row * NSUB + sub)), axis=0)
    if top < tl.min(pivot, axis=0):
        return

    tokens = chunk * MASS_CHUNK + tl.arange(0, MASS_CHUNK)
    z = load_z(
        logits, row, row_stride, vocab, tokens, tokens < vocab, tl.load(temperature + row), values, touched, listed, allowed
    )  # fmt: skip
    o = ordered(z)
    both = weight(below(z, unordered(highest))) + _COUNT_ONE
    sums = tl.zeros([PIVOTS], tl.int64)
    for i in tl.static_range(PIVOTS):
        this = tl.sum(tl.where(index == i, pivot, 0), axis=0)
        sums = tl.where(index == i, tl.sum(tl.where(o >= this, both, 0), axis=0), sums)
    counts = (sums >> _COUNT_SHIFT) & _COUNT_BITS
    at = totals + row * (4 * PIVOTS) + PASS * (2 * PIVOTS) + index
    tl.atomic_add(at, counts, mask=counts > 0, sem="relaxed")
    tl.atomic_add(at + PIVOTS, sums & (_COUNT_ONE - 1), mask=counts > 0, sem="relaxed")


@triton.jit
def _gathered(low, high, count_low, count_high):
    """Up to which value tokens are written out, how many they are (none of a bracket that is one value, or too full), and whether they
    are all that can be kept."""
    all_above = count_low <= CAP
    end = tl.where(all_above, ORDERED_INF, high)
    count = tl.where(all_above, count_low, count_low - count_high)
    return end, tl.where((count <= CAP) & (all_above | (high - low > 1)), count, 0), all_above


@kernel
def sample_gather(
    logits, row_stride, vocab, temperature, top_k, top_p, values, touched, listed, allowed,
    maxima, state, pivots, totals, candidates,
    SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(state + row * STATE + S_PHASE) != SEARCH:
        return
    highest = tl.load(state + row * STATE + S_LARGEST).to(tl.int32)
    low, high, count_low, _a, count_high, _b, _c = _bracket(
        row, highest, tl.load(top_k + row), tl.load(top_p + row), vocab, pivots, totals, 2
    )  # fmt: skip
    end, count, _d = _gathered(low, high, count_low, count_high)
    if (count == 0) | (chunk_top(maxima, row, chunk, SUB, NSUB) < low):
        return
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    z = load_z(
        logits, row, row_stride, vocab, tokens, tokens < vocab, tl.load(temperature + row), values, touched, listed, allowed
    )  # fmt: skip
    o = ordered(z)
    take = (o >= low) & (o < end)
    found = tl.sum(take.to(tl.int32), axis=0)
    if found > 0:
        at = tl.atomic_add(state + row * STATE + S_COUNT, found.to(tl.int64), sem="relaxed")
        append(candidates, row, at, take, make_key(o, tokens), CAP)


@triton.jit
def _row_totals(
    bound, highest, logits, row, row_stride, vocab, heat, values, touched, listed, allowed, maxima, SUB: tl.constexpr, NSUB: tl.constexpr
):  # fmt: skip
    """Count and mass of the row's tokens at or above ``bound``."""
    count = tl.zeros([], tl.int64)
    mass = tl.zeros([], tl.int64)
    chunk = 0
    while chunk * CHUNK < vocab:
        if chunk_top(maxima, row, chunk, SUB, NSUB) >= bound:
            tokens = chunk * CHUNK + tl.arange(0, CHUNK)
            z = load_z(logits, row, row_stride, vocab, tokens, tokens < vocab, heat, values, touched, listed, allowed)
            take = ordered(z) >= bound
            count += tl.sum(take.to(tl.int64), axis=0)
            mass += tl.sum(tl.where(take, weight(below(z, unordered(highest))), 0), axis=0)
        chunk += 1
    return count, mass


@triton.jit
def _last_resort(
    need, by_count, low, high, highest,
    logits, row, row_stride, vocab, heat, values, touched, listed, allowed, maxima, SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    """The largest x in [low, high) with ``need`` tokens or mass at or above it, which holds for ``low``."""
    low = low.to(tl.int64)
    high = high.to(tl.int64) - 1
    while low < high:
        middle = low + (high - low + 1) // 2
        count, mass = _row_totals(
            middle, highest, logits, row, row_stride, vocab, heat, values, touched, listed, allowed, maxima, SUB, NSUB
        )  # fmt: skip
        enough = tl.where(by_count, count, mass) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@kernel
def sample_resolve(
    logits, row_stride, vocab, temperature, top_k, top_p, min_p, seed, position, stream, values, touched, listed, allowed,
    maxima, state, pivots, totals, candidates, tokens,
    SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state + row * STATE + S_PHASE) != SEARCH:
        return
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    m = tl.load(min_p + row)
    highest = tl.load(state + row * STATE + S_LARGEST).to(tl.int32)
    largest = unordered(highest)
    by_k = has_top_k(k, vocab)
    low, high, count_low, mass_low, count_high, mass_high, need = _bracket(row, highest, k, p, vocab, pivots, totals, 2)
    _end, count, all_above = _gathered(low, high, count_low, count_high)

    slot = tl.arange(0, CAP)
    keys = tl.load(candidates + row * CAP + slot, mask=slot < count, other=0)
    o = tl.where(slot < count, key_value(keys), ORDERED_NEG_INF)
    threshold = low
    if count > 0:
        if by_k:
            threshold = kth_largest(o, need - tl.where(all_above, 0, count_high), low, high - 1)
        else:
            weights = weight(below(unordered(o), largest))
            threshold = mass_threshold(o, weights, need - tl.where(all_above, 0, mass_high), low, high - 1)
    elif high - low > 1:
        threshold = _last_resort(
            need, by_k, low, high, highest,
            logits, row, row_stride, vocab, heat, values, touched, listed, allowed, maxima, SUB, NSUB,
        )  # fmt: skip
    if by_k & (p < 1.0):
        if all_above:
            weights = tl.where(o >= threshold, weight(below(unordered(o), largest)), 0)
            threshold = mass_threshold(o, weights, mass_needed(tl.sum(weights, axis=0), p), threshold, highest)
        else:
            _count, mass = _row_totals(
                threshold, highest, logits, row, row_stride, vocab, heat, values, touched, listed, allowed, maxima, SUB, NSUB
            )  # fmt: skip
            threshold = _last_resort(
                mass_needed(mass, p), False, threshold, highest + 1, highest,
                logits, row, row_stride, vocab, heat, values, touched, listed, allowed, maxima, SUB, NSUB,
            )  # fmt: skip
    if has_min_p(m):
        threshold = tl.maximum(threshold, min_p_threshold(largest, m))

    at = state + row * STATE
    tl.store(at + S_THRESHOLD, threshold)
    if all_above:
        best = race_candidates(
            candidates, row, count, threshold, tl.load(seed + row), tl.load(position + row), tl.load(stream + row)
        )  # fmt: skip
        tl.store(tokens + row, key_token(best).to(tl.int64))
        tl.store(at + S_PHASE, DONE)
    else:
        tl.store(at + S_PHASE, RACE)
