"""Only in calls with lists: penalties, bias and early end tokens of single tokens, on the logits (``sample``, whose first kernel it is)
or on the log-probabilities (``beam_select``, which gives ``temperature`` and ``state``).

The row is not copied. The adjusted values of listed tokens go to ``values [R, V]``, of which nothing else is ever read, and two bits per
token in ``touched [R, ceil(V / 16)]`` say which they are: bit 0 for penalties and end tokens, bit 1 for bias. Traffic: V / 4 bytes of
bits for a row with lists, none for others.

Grid: one program per row. The lists follow each other with a barrier between, for a later list reads what an earlier one wrote. Ids of a
list are distinct, so no order within it matters; an id that finds its bit already set shows that they are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import checks_sample as limits
from .beam_rows import log_probability
from .sample_row import LIST_BAD, LISTED, divided, kernel, load_raw

_TILE = tl.constexpr(512)
_LARGEST = tl.constexpr(limits.LARGEST)
_MAX_COUNT = tl.constexpr(limits.MAX_COUNT)


@triton.jit
def _bounds(start, row, size):
    """First entry, end, and whether they are out of range; empty if so."""
    first = tl.load(start + row)
    end = tl.load(start + row + 1)
    bad = (first < 0) | (end < first) | (end > size)
    return tl.where(bad, 0, first), tl.where(bad, 0, end), bad.to(tl.int32)


@triton.jit
def _ids(token, at, end, vocab):
    """A tile of a list: ids, which entries are there with an id in range, and 1 if an id is out of range."""
    entry = at + tl.arange(0, _TILE)
    inside = entry < end
    ids = tl.load(token + entry, mask=inside, other=0)
    good = (ids >= 0) & (ids < vocab)
    return tl.where(good, ids, 0), inside & good, tl.max((inside & (good == 0)).to(tl.int32), axis=0)


@triton.jit
def _touch(touched, ids, there, BIT: tl.constexpr):
    """Set a bit of each id; for each whether it was set before."""
    bit = tl.full(ids.shape, 1, tl.int32) << ((ids & 15) * 2 + BIT)
    return there & ((tl.atomic_or(touched + (ids >> 4), bit, mask=there, sem="relaxed") & bit) != 0)


@triton.jit
def _given(logits, row, row_stride, ids, there, temperature, state):
    """What the lists change, before they do."""
    x = load_raw(logits, row, row_stride, ids, there)
    if state is not None:
        x = log_probability(divided(x, tl.load(temperature + row)), row, state)
    return x


@triton.jit
def _current(values, touched, given, ids, there):
    """The values of listed tokens as the earlier lists left them."""
    word = tl.load(touched + (ids >> 4), mask=there, other=0)
    hit = there & (((word >> ((ids & 15) * 2)) & 3) != 0)
    return tl.where(hit, tl.load(values + ids, mask=hit, other=0.0), given)


@kernel
def sample_adjust(
    logits, row_stride, vocab,
    repetition, presence, frequency, penalty_token, penalty_count, penalty_start, penalty_size,
    bias_token, bias_value, bias_start, bias_size,
    end_token, end_position, end_start, end_size, position,
    temperature, state, values, touched, listed,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values += row * vocab
    touched += row * ((vocab + 15) // 16)

    bad = 0
    entries = 0
    if penalty_start is not None:
        penalty_at, penalty_end, out = _bounds(penalty_start, row, penalty_size)
        bad |= out
        entries += penalty_end - penalty_at
    if bias_start is not None:
        bias_at, bias_end, out = _bounds(bias_start, row, bias_size)
        bad |= out
        entries += bias_end - bias_at
    if end_start is not None:
        end_at, end_end, out = _bounds(end_start, row, end_size)
        bad |= out
        entries += end_end - end_at

    if entries > 0:
        first = 0
        while first * 16 < vocab:
            word = first + tl.arange(0, _TILE)
            tl.store(touched + word, tl.zeros([_TILE], tl.int32), mask=word < (vocab + 15) // 16)
            first += _TILE
        tl.debug_barrier()

    if penalty_start is not None:
        divisor = tl.load(repetition + row)
        once = tl.load(presence + row)
        each = tl.load(frequency + row)
        finite = (divisor > 0.0) & (divisor < float("inf")) & (tl.abs(once) <= _LARGEST) & (tl.abs(each) <= _LARGEST)
        bad |= (finite == 0).to(tl.int32)
        at = penalty_at
        while at < penalty_end:
            ids, there, out = _ids(penalty_token, at, penalty_end, vocab)
            bad |= out
            count = tl.load(penalty_count + at + tl.arange(0, _TILE), mask=there, other=0)
            bad |= tl.max(((count < 0) | (count > _MAX_COUNT)).to(tl.int32), axis=0)
            x = _given(logits, row, row_stride, ids, there, temperature, state)
            x = tl.where(x > 0.0, tl.div_rn(x, tl.zeros_like(x) + divisor), x * divisor)
            x = tl.where(count > 0, x - each * count.to(tl.float32), x)
            x = tl.where(count > 0, x - once, x)
            bad |= tl.max(_touch(touched, ids, there, 0).to(tl.int32), axis=0)
            tl.store(values + ids, x, mask=there)
            at += _TILE
        tl.debug_barrier()

    if bias_start is not None:
        at = bias_at
        while at < bias_end:
            ids, there, out = _ids(bias_token, at, bias_end, vocab)
            bad |= out
            addend = tl.load(bias_value + at + tl.arange(0, _TILE), mask=there, other=0.0)
            good = (tl.abs(addend) <= _LARGEST) | (addend == float("-inf"))
            bad |= tl.max((good == 0).to(tl.int32), axis=0)
            x = _current(values, touched, _given(logits, row, row_stride, ids, there, temperature, state), ids, there)
            x = tl.where(addend == float("-inf"), float("-inf"), x + addend)
            tl.debug_barrier()  # all have read the bits
            bad |= tl.max(_touch(touched, ids, there, 1).to(tl.int32), axis=0)
            tl.store(values + ids, x, mask=there)
            at += _TILE
        tl.debug_barrier()

    if end_start is not None:
        early = tl.load(position + row) < tl.load(end_position + row)
        at = end_at
        while at < end_end:
            ids, there, out = _ids(end_token, at, end_end, vocab)
            bad |= out
            there = there & early
            _touch(touched, ids, there, 0)
            tl.store(values + ids, tl.full([_TILE], float("-inf"), tl.float32), mask=there)
            at += _TILE

    tl.store(listed + row, tl.where(entries > 0, LISTED, 0) | tl.where(bad != 0, LIST_BAD, 0))
