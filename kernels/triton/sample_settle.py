"""Third kernel of ``sample``: checks the row, and draws its token wherever a few candidates decide it.

One program per row. A lower bound of what can win (or must be counted) selects sub-blocks by their maxima, and their tokens at or above
the bound become candidates: keys of (z, token).

==========================  =========================================================================================
row                         bound
==========================  =========================================================================================
greedy, or +inf is there    the largest z, in the first sub-block that has it
unfiltered                  the largest lower bound of a score, against upper bounds (``sample_scan``)
top-k up to 256             the k-th largest maximum, for k sub-blocks hold k tokens at or above it
min-p alone                 its threshold; with top-k but no top-p the larger of the two
few tokens in all           none
==========================  =========================================================================================

With up to 2048 candidates the thresholds are exact here: the k-th largest by bisection over ordered integers, the top-p threshold by
bisection over integer masses, both with the candidates in registers; then the survivors race. More candidates, or a row that has no bound
(top-p without top-k, large k), make it a row for the search (``sample_search``), or straight for the race where the threshold is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..api import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK
from .fixed_math import (
    KEY_MIN,
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
from .noise import quad_bounds
from .sample_row import (
    CAP,
    CHUNK,
    DONE,
    LIST_BAD,
    PIVOTS,
    RACE,
    S_BEST,
    S_COUNT,
    S_LARGEST,
    S_MASS,
    S_PHASE,
    S_THRESHOLD,
    SEARCH,
    SETTLE_CAP,
    SETTLE_TOP_K,
    STATE,
    append,
    has_min_p,
    has_top_k,
    is_greedy,
    is_unfiltered,
    kernel,
    load_z,
    min_p_threshold,
    race_candidates,
)

_OK = tl.constexpr(STATUS_OK)
_NAN = tl.constexpr(STATUS_NAN)
_NOTHING = tl.constexpr(STATUS_NOTHING_ALLOWED)
_BAD = tl.constexpr(STATUS_BAD_PARAMETER)
_GATHER = tl.constexpr(2048)  # tokens looked at in one go
_SAMPLE = tl.constexpr(1024)  # tokens whose quantiles are the first pivots of the search
_NOWHERE = tl.constexpr(0x7FFFFFFF)  # a threshold that keeps nothing


@triton.jit
def kth_largest(o, k, low, high):
    """The largest x in [low, high] with ``count(o >= x) >= k``, which holds for ``low``: the k-th largest."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((o >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def mass_threshold(o, weights, needed, low, high):
    """The largest x in [low, high] with ``mass(o >= x) >= needed``, which holds for ``low``: the token that crosses."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum(tl.where(o >= middle, weights, 0), axis=0) >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def filter_candidates(o, largest, threshold, top_k, top_p, min_p, vocab):
    """Steps 4 to 6 on all that can matter: the threshold, ordered. ``o`` are candidates, padded with ORDERED_NEG_INF: every token at
    or above ``threshold``, of which there are k or more unless the row's others are below every threshold."""
    high = ordered(largest)
    if has_top_k(top_k, vocab):
        if tl.sum((o > ORDERED_NEG_INF).to(tl.int32), axis=0) >= top_k:
            threshold = kth_largest(o, top_k, threshold, high)
    if top_p < 1.0:
        weights = tl.where(o >= threshold, weight(below(unordered(o), largest)), 0)
        threshold = mass_threshold(o, weights, mass_needed(tl.sum(weights, axis=0), top_p), threshold, high)
    if has_min_p(min_p):
        threshold = tl.maximum(threshold, min_p_threshold(largest, min_p))
    return threshold


@triton.jit
def _store_state(state, row, phase, threshold, largest, best):
    at = state + row * STATE
    tl.store(at + S_PHASE, phase)
    tl.store(at + S_THRESHOLD, threshold)
    tl.store(at + S_LARGEST, largest)
    tl.store(at + S_BEST, best)
    tl.store(at + S_MASS, 0)
    tl.store(at + S_COUNT, 0)


@triton.jit
def _status(row, heat, p, m, largest, chunk_nan, chunks, listed, MAX_CHUNKS: tl.constexpr):
    bad = ((heat >= 0.0) & (heat < float("inf")) & (p >= 0.0) & (p <= 1.0) & (m >= 0.0) & (m <= 1.0)) == 0
    if listed is not None:
        bad = bad | ((tl.load(listed + row) & LIST_BAD) != 0)
    chunk = tl.arange(0, MAX_CHUNKS)
    nan = tl.max(tl.load(chunk_nan + row * chunks + chunk, mask=chunk < chunks, other=0), axis=0) != 0
    status = tl.where(largest == ORDERED_NEG_INF, _NOTHING, _OK)
    return tl.where(bad, _BAD, tl.where(nan, _NAN, status))


@kernel
def sample_settle(
    logits, row_stride, vocab, chunks, temperature, top_k, top_p, min_p, seed, position, stream,
    values, touched, listed, allowed,
    maxima, chunk_lower, chunk_nan, selected, candidates, state, pivots, totals, tokens, status,
    LOGPROBS: tl.constexpr, SUB: tl.constexpr, NSUB: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    m = tl.load(min_p + row)
    row_seed = tl.load(seed + row)
    row_position = tl.load(position + row)
    row_stream = tl.load(stream + row)

    index = tl.arange(0, NSUB)
    filled = chunks * (CHUNK // SUB)
    top = ordered(tl.load(maxima + row * NSUB + index, mask=index < filled, other=float("-inf")))
    highest = tl.max(top, axis=0)
    outcome = _status(row, heat, p, m, highest, chunk_nan, chunks, listed, MAX_CHUNKS)
    tl.store(status + row, outcome)
    tl.store(tokens + row, -1)
    _store_state(state, row, DONE, _NOWHERE, highest, KEY_MIN)
    if outcome == _OK:
        largest = unordered(highest)
        unfiltered = is_unfiltered(heat, k, p, m, vocab) & (LOGPROBS == 0)
        first_only = is_greedy(heat) | (highest == ORDERED_INF)
        by_k = has_top_k(k, vocab)

        bound = 0 * highest + ORDERED_LOWEST
        settles = vocab <= SETTLE_CAP
        if first_only:
            settles = True
            bound = highest
        elif unfiltered:
            settles = True
            chunk = tl.arange(0, MAX_CHUNKS)
            lower = tl.load(chunk_lower + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
            bound = tl.maximum(ordered(tl.max(lower, axis=0)), ORDERED_LOWEST)
        else:
            if by_k & (k <= SETTLE_TOP_K):
                settles = True
                bound = kth_largest(top, k, bound - 1, highest)
            elif (by_k == 0) & (p >= 1.0):
                settles = True  # min-p alone, or (with log-probabilities) no filter
            bound = tl.maximum(bound, ORDERED_LOWEST)
            if has_min_p(m) & (p >= 1.0):
                bound = tl.maximum(bound, min_p_threshold(largest, m))

        count = 0
        if settles:
            chosen = top >= bound
            if first_only:
                chosen = index == tl.min(tl.where(chosen, index, NSUB), axis=0)
            num_chosen = tl.sum(chosen.to(tl.int32), axis=0)
            tl.store(selected + row * NSUB + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, index, mask=chosen)
            tl.debug_barrier()

            GROUP: tl.constexpr = _GATHER // SUB
            at = 0
            while (at < num_chosen) & (count <= SETTLE_CAP):
                slot = at + tl.arange(0, GROUP)
                sub = tl.load(selected + row * NSUB + slot, mask=slot < num_chosen, other=vocab // SUB + 1)
                ids = tl.reshape(sub[:, None] * SUB + tl.arange(0, SUB)[None, :], [_GATHER])
                there = ids < vocab
                z = load_z(logits, row, row_stride, vocab, ids, there, heat, values, touched, listed, allowed)
                o = ordered(z)
                take = o >= bound
                if unfiltered & (first_only == 0):
                    quads = tl.reshape(sub[:, None] * (SUB // 4) + tl.arange(0, SUB // 4)[None, :], [_GATHER // 4])
                    lower, upper = quad_bounds(quads, row_seed, row_position, row_stream)
                    take = (ordered(z + upper) >= bound) & (o >= ORDERED_LOWEST)
                append(candidates, row, count, take, make_key(o, ids), SETTLE_CAP)
                count += tl.sum(take.to(tl.int32), axis=0)
                at += GROUP
            tl.debug_barrier()

        if settles & (count <= SETTLE_CAP):
            slot = tl.arange(0, SETTLE_CAP)
            keys = tl.load(candidates + row * CAP + slot, mask=slot < count, other=KEY_MIN)
            o = tl.where(slot < count, key_value(keys), ORDERED_NEG_INF)
            threshold = bound
            if first_only:
                best = tl.max(keys, axis=0)
                threshold = tl.where(highest == ORDERED_INF, ORDERED_INF, ORDERED_LOWEST)
            else:
                if unfiltered:
                    threshold = 0 * bound + ORDERED_LOWEST
                else:
                    threshold = filter_candidates(o, largest, bound, k, p, m, vocab)
                best = race_candidates(candidates, row, count, threshold, row_seed, row_position, row_stream)
            tl.store(tokens + row, key_token(best).to(tl.int64))
            _store_state(state, row, DONE, threshold, highest, best)
        elif settles & ((by_k == 0) | unfiltered):
            # Min-p, or bounds that are all alike: every token above a threshold that is known.
            _store_state(state, row, RACE, tl.where(unfiltered, ORDERED_LOWEST, bound), highest, KEY_MIN)
        else:
            _store_state(state, row, SEARCH, bound, highest, KEY_MIN)
            _first_pivots(logits, row, row_stride, vocab, heat, values, touched, listed, allowed, pivots, totals)


@triton.jit
def _first_pivots(logits, row, row_stride, vocab, heat, values, touched, listed, allowed, pivots, totals):
    """Quantiles of every so many-th token, and the lowest value of all, whose totals are those of the whole row. They need not be
    good: what they are is no matter to the result."""
    ids = ((tl.arange(0, _SAMPLE).to(tl.int64) * vocab) // _SAMPLE).to(tl.int32)
    o = ordered(load_z(logits, row, row_stride, vocab, ids, ids < vocab, heat, values, touched, listed, allowed))
    pivot = tl.arange(0, PIVOTS)
    rank = (tl.sum((o >= ORDERED_LOWEST).to(tl.int32), axis=0) * (pivot + 1)) // PIVOTS
    low = tl.full([PIVOTS], ORDERED_LOWEST, tl.int64)
    high = tl.full([PIVOTS], ORDERED_INF, tl.int64)
    for _ in range(33):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((o[:, None] >= middle[None, :]).to(tl.int32), axis=0) >= rank
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    chosen = tl.where(pivot == PIVOTS - 1, ORDERED_LOWEST, low.to(tl.int32))
    tl.store(pivots + row * (2 * PIVOTS) + pivot, chosen)
    total = tl.arange(0, 4 * PIVOTS)
    tl.store(totals + row * (4 * PIVOTS) + total, tl.zeros([4 * PIVOTS], tl.int64))
