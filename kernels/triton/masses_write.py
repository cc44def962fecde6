"""The last kernel of ``masses``: the integers, once the sampler's kernels have found a row's threshold.

Grid (rows, chunks of 4096). It reads the logits once more and writes 8 bytes a token; what came before has read them too.
"""

from __future__ import annotations

import triton.language as tl

from .. import fixed_math as law
from ..api import STATUS_OK
from .fixed_math import ORDERED_INF, below, ordered, unordered, weight
from .sample_row import CHUNK, S_LARGEST, S_THRESHOLD, STATE, is_greedy, kernel, load_z

_OK = tl.constexpr(STATUS_OK)
_WHOLE = tl.constexpr(1 << law.WEIGHT_BITS)


@kernel
def masses_write(
    logits, row_stride, vocab, temperature, values, touched, listed, allowed, state, tokens, status, mass
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = ids < vocab
    at = mass + row * vocab + ids
    if tl.load(status + row) == _OK:
        heat = tl.load(temperature + row)
        highest = tl.load(state + row * STATE + S_LARGEST).to(tl.int32)
        threshold = tl.load(state + row * STATE + S_THRESHOLD).to(tl.int32)
        if is_greedy(heat):
            tl.store(at, tl.where(ids.to(tl.int64) == tl.load(tokens + row), _WHOLE, 0).to(tl.int64), mask=there)
        else:
            o = ordered(load_z(logits, row, row_stride, vocab, ids, there, heat, values, touched, listed, allowed))
            whole = (highest == ORDERED_INF) & (o == ORDERED_INF)
            share = tl.where(highest == ORDERED_INF, 0, weight(below(unordered(o), unordered(highest))))
            tl.store(at, tl.where(whole, _WHOLE, tl.where(o >= threshold, share, 0)).to(tl.int64), mask=there)
    else:
        tl.store(at, tl.zeros([CHUNK], tl.int64), mask=there)
