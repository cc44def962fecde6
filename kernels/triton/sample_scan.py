"""Second kernel of ``sample``: the one read of the whole row.

For every sub-block of SUB tokens the largest *key value*, ``maxima [R, NSUB]`` (float32, -inf past the row):

* ``z`` for greedy and filtered rows: the k-th largest maximum bounds the k-th largest z from below (Dr. Top-k, Gaihre et al. 2021);
* for unfiltered rows the upper bound of the score (``noise.quad_bounds``), with the largest lower bound of each chunk beside it: only
  sub-blocks whose upper bound reaches the largest lower bound can hold the winner, one or two per row. Scores themselves would need two
  logarithms per token, which cost more than reading it; the bound needs none. With log-probabilities asked for, such rows take ``z`` too:
  they need the mass of all tokens anyway.

Per chunk also whether a NaN was seen, and for raw log-probabilities the largest raw logit and the sum of exponentials below it.

Grid (rows, chunks of 4096). Bytes per row: the logits, a 32nd of the mask if any, 4 / SUB of them written back.
"""

from __future__ import annotations

import triton.language as tl

from .fixed_math import below, exp
from .noise import quad_bounds
from .sample_row import CHUNK, adjusted, is_unfiltered, kernel, load_raw, scaled


@kernel
def sample_scan(
    logits, row_stride, vocab, temperature, top_k, top_p, min_p, seed, position, stream,
    values, touched, listed, allowed,
    maxima, chunk_lower, chunk_nan, raw_maxima, raw_largest, raw_sum,
    SUB: tl.constexpr, NSUB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    SUBS: tl.constexpr = CHUNK // SUB
    sub = row * NSUB + chunk * SUBS + tl.arange(0, SUBS)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    there = tokens < vocab

    raw = load_raw(logits, row, row_stride, tokens, there)
    tl.store(chunk_nan + row * chunks + chunk, tl.max((raw != raw).to(tl.int32), axis=0))
    heat = tl.load(temperature + row)
    z = scaled(adjusted(raw, row, vocab, tokens, there, values, touched, listed, allowed), heat)
    if raw_sum is None:
        if is_unfiltered(heat, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), vocab):
            lower, upper = quad_bounds(
                chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4), tl.load(seed + row), tl.load(position + row), tl.load(stream + row)
            )
            tl.store(chunk_lower + row * chunks + chunk, tl.max(z + lower, axis=0))
            z = z + upper
    else:
        raw = tl.where(raw == raw, raw, float("-inf"))
        largest = tl.max(raw, axis=0)
        tl.store(raw_largest + row * chunks + chunk, largest)
        tl.store(raw_sum + row * chunks + chunk, tl.sum(exp(below(raw, largest)), axis=0))
        if raw_maxima is not None:
            tl.store(raw_maxima + sub, tl.max(tl.reshape(raw, [SUBS, SUB]), axis=1))
    tl.store(maxima + sub, tl.max(tl.reshape(z, [SUBS, SUB]), axis=1))
