"""The kernels of ``beam_select`` that look at groups: ``beam_bound``, ``beam_gather``, ``beam_finish``.

The best C continuations of a group lie in the C sub-blocks that ``beam_best`` orders first: every other sub-block comes after C that have
a continuation each which beats all of its own, by its score or, among equal ones, by its row or token. The scores of those sub-blocks
bound the scores of the continuations too (Dr. Top-k, Gaihre et al. 2021). So however many scores are equal, at most C sub-blocks hold all
that can be chosen, as a rule only little more than C continuations that reach the bound. Bisection over the sub-blocks' keys ends as soon
as no more than 2 C are left.

============  ==============  =========================================================================================
kernel        grid            does
============  ==============  =========================================================================================
beam_bound    groups          the key that C to 2 C sub-blocks of the group reach (or all of them, if they are fewer)
beam_gather   rows x chunks   writes out the continuations of those sub-blocks that reach its score, in any order
beam_finish   groups          the best C of them by bisection over their keys, if they are many; in order, by counting
============  ==============  =========================================================================================

A continuation's key is its score and ``row * PADDED + token``, where PADDED is a power of two and V or more: ties go to the lower row,
then the lower token. No two keys are equal, so what is chosen does not depend on the order in which they were written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .beam_rows import load_continuations
from .fixed_math import KEY_MIN, ORDERED_LOWEST, key_token, key_value, make_key, ordered
from .sample_row import CHUNK, kernel

_TILE = tl.constexpr(4096)  # keys looked at in one go
_ROWS = tl.constexpr(64)  # rows of a group likewise
_RANKED = tl.constexpr(512)  # as many keys are ranked as they are
_RANKS, _RIVALS = tl.constexpr(256), tl.constexpr(16)  # how many are ranked in one go, against how many
_LOWEST_KEY = tl.constexpr(ORDERED_LOWEST.value << 32)  # that something finite can have
_NONE = tl.constexpr(float("-inf"))


@triton.jit
def _count(keys, n, bound):
    """How many of ``keys[:n]`` are at or above ``bound``, and the largest."""
    count = tl.zeros([_TILE], tl.int32)
    largest = tl.full([_TILE], KEY_MIN, tl.int64)
    at = 0
    while at < n:
        slot = at + tl.arange(0, _TILE)
        key = tl.load(keys + slot, mask=slot < n, other=KEY_MIN)
        count += (key >= bound).to(tl.int32)
        largest = tl.maximum(largest, key)
        at += _TILE
    return tl.sum(count, axis=0), tl.max(largest, axis=0)


@triton.jit
def _bound(keys, n, wanted, limit):
    """A key that ``wanted`` to ``limit`` of the distinct ``keys[:n]`` reach; if they are no more than ``limit``, that all reach."""
    low = tl.full([], _LOWEST_KEY, tl.int64)
    count, high = _count(keys, n, low)
    while count > limit:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up; their sum might overflow
        reach, _largest = _count(keys, n, middle)
        if reach >= wanted:
            low = middle
            count = reach
        else:
            high = middle - 1
    return low


@kernel
def beam_bound(group_start, rows, num_candidates, best, bounds, row_group, counts, SUBS_OF_ROW: tl.constexpr):
    group = tl.program_id(0)
    # Groups that are out of range have no continuations, and may not make the kernel leave its tensors.
    first = tl.minimum(tl.maximum(tl.load(group_start + group), 0), rows)
    last = tl.minimum(tl.maximum(tl.load(group_start + group + 1), first), rows)
    bound = _bound(best + first.to(tl.int64) * SUBS_OF_ROW, (last - first) * SUBS_OF_ROW, num_candidates, 2 * num_candidates)
    at = first
    while at < last:
        row = at + tl.arange(0, _ROWS)
        tl.store(bounds + row, tl.zeros([_ROWS], tl.int64) + bound, mask=row < last)
        tl.store(row_group + row, tl.zeros([_ROWS], tl.int32) + group, mask=row < last)
        at += _ROWS
    tl.store(counts + group, 0)


@kernel
def beam_gather(
    logits, row_stride, vocab, scores, temperature, seed, position, stream, values, touched, listed, allowed,
    state, best, bounds, row_group, room, counts, keys, key_scores, key_logprobs,
    SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    SUBS: tl.constexpr = CHUNK // SUB
    sub = chunk * SUBS + tl.arange(0, SUBS)
    key = tl.load(best + row * (tl.num_programs(1) * SUBS) + sub)
    bound = tl.load(bounds + row)
    chosen = (key >= bound) & (key > KEY_MIN)
    if tl.max(chosen.to(tl.int32), axis=0) == 0:
        return
    logprob, score = load_continuations(
        logits, row, row_stride, vocab, chunk, scores, temperature, seed, position, stream, values, touched, listed, allowed, state
    )  # fmt: skip
    o = ordered(score)
    take = tl.reshape(tl.broadcast_to(chosen[:, None], [SUBS, SUB]), [CHUNK]) & (o >= key_value(bound)) & (o >= ORDERED_LOWEST)
    group = tl.load(row_group + row)
    at = tl.atomic_add(counts + group, tl.sum(take.to(tl.int32), axis=0), sem="relaxed")
    slot = group.to(tl.int64) * room + at + tl.cumsum(take.to(tl.int32), axis=0) - 1
    flat = row.to(tl.int32) * (NSUB * SUB) + chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(keys + slot, make_key(o, flat), mask=take)
    tl.store(key_scores + slot, score, mask=take)
    tl.store(key_logprobs + slot, logprob, mask=take)


@kernel
def beam_finish(
    num_candidates, room, counts, keys, key_scores, key_logprobs, best_scores, best_tokens, best_parents, best_logprobs,
    SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    PADDED: tl.constexpr = SUB * NSUB
    keys += group * room
    key_scores += group * room
    key_logprobs += group * room
    n = tl.load(counts + group)
    limit = tl.maximum(num_candidates, _RANKED)
    if n > limit:
        bound = _bound(keys, n, num_candidates, limit)
        kept = tl.zeros([], tl.int32)
        at = 0
        while at < n:  # move them to the front
            slot = at + tl.arange(0, _TILE)
            key = tl.load(keys + slot, mask=slot < n, other=KEY_MIN)
            score = tl.load(key_scores + slot, mask=slot < n, other=0.0)
            logprob = tl.load(key_logprobs + slot, mask=slot < n, other=0.0)
            take = key >= bound
            to = kept + tl.cumsum(take.to(tl.int32), axis=0) - 1
            tl.debug_barrier()  # all have read
            tl.store(keys + to, key, mask=take)
            tl.store(key_scores + to, score, mask=take)
            tl.store(key_logprobs + to, logprob, mask=take)
            kept += tl.sum(take.to(tl.int32), axis=0)
            at += _TILE
        n = kept
        tl.debug_barrier()

    out = group * num_candidates
    at = 0
    while at < tl.maximum(n, num_candidates):
        slot = at + tl.arange(0, _RANKS)
        there = slot < n
        key = tl.load(keys + slot, mask=there, other=0)
        rank = tl.zeros([_RANKS], tl.int32)
        rival = 0
        while rival < n:
            other = rival + tl.arange(0, _RIVALS)
            others = tl.load(keys + other, mask=other < n, other=KEY_MIN)
            rank += tl.sum((others[None, :] > key[:, None]).to(tl.int32), axis=1)
            rival += _RIVALS
        rank = tl.where(there, rank, slot)  # what is missing comes last
        among = rank < num_candidates
        flat = key_token(key)
        score = tl.load(key_scores + slot, mask=there, other=_NONE)
        logprob = tl.load(key_logprobs + slot, mask=there, other=_NONE)
        tl.store(best_scores + out + rank, score, mask=among)
        tl.store(best_tokens + out + rank, tl.where(there, flat % PADDED, -1).to(tl.int64), mask=among)
        tl.store(best_parents + out + rank, tl.where(there, flat // PADDED, -1), mask=among)
        tl.store(best_logprobs + out + rank, logprob, mask=among)
        at += _RANKS
