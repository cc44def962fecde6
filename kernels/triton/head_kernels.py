"""The kernels of ``sample_head``. The score of the law, ``logit / T - log(E)``, is known where the logit is made, and argmax and sums of
exponentials decompose: so the head's product keeps the best of each tile, and logits are never written (FlashSampling,
arXiv 2603.15854).

``head_tiles``, grid (tiles of 64 rows, tiles of the vocabulary, at most 65,535 of these): the product of a tile, that of ``linear`` to the
bit; then for each of its rows the best score and its token (the lowest on ties), that token's logit, the largest logit, and the sums of
exponentials below it, raw and divided by the temperature. Neighbouring programs share a tile of the head. ``head_merge``, grid (rows):
the best of all tiles by (score, token), which is the row's token; the sums of the tiles. ``head.py`` launches both.

Everything past the product is float32, each operation rounded by itself. A row's sums are made in the same order in any batch: ROWS rows
at a time, whoever they are. Bytes: the head once; x once for each tile of the vocabulary and 24 for each row and tile, both of which L2
holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..api import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK
from .fixed_math import KEY_MIN, ORDERED_NEG_INF, below, exp, key_token, key_value, log, make_key, ordered, unordered
from .linear_kernels import product
from .noise import tile_noise
from .sample_row import is_greedy, kernel

_OK = tl.constexpr(STATUS_OK)
_NAN = tl.constexpr(STATUS_NAN)
_NOTHING = tl.constexpr(STATUS_NOTHING_ALLOWED)
_BAD = tl.constexpr(STATUS_BAD_PARAMETER)
_NONE = tl.constexpr(float("-inf"))
_BEHIND = tl.constexpr((1 << 31) - 1)  # every token
ROWS = tl.constexpr(8)  # of a tile, drawn for at a time: with more, registers do not suffice
MERGE = tl.constexpr(1024)  # tiles merged at a time


@triton.jit
def _divisor(temperature):
    """What logits are divided by; 1 where greedy, and where the temperature is out of range."""
    return tl.where(is_greedy(temperature) | ((temperature < float("inf")) == 0), 1.0, temperature)


@triton.jit
def _divided(x, divisor):
    return tl.div_rn(x, divisor + tl.zeros_like(x))


@triton.jit
def _mass(x, largest):
    """The sum of exp(x - largest) of each row."""
    return tl.sum(exp(below(x, largest)), axis=1)


@triton.jit
def _noise(sampled, tokens, seed, position, stream, ALIGNED: tl.constexpr):
    """``log(E)`` in the rows that are sampled, 0 in the others. Where all are greedy none is made."""
    if tl.max(sampled.to(tl.int32), axis=0) > 0:
        noise = tile_noise(tokens, seed[:, None], position[:, None], stream[:, None], ALIGNED)
        noise = tl.where(sampled[:, None], noise, 0.0)
    else:
        noise = tl.zeros([sampled.numel, tokens.numel], tl.float32)
    return noise


@kernel
def head_tiles(
    x, x_stride, head, scale, stride, rows, depth, segment_depth, vocab, first_token, temperature, seed, position, stream,
    tile_scores, tile_tokens, tile_logits, tile_largest, tile_mass, tile_scaled_mass, tiles,
    ALIGNED: tl.constexpr, SEGMENTS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    tile = tl.program_id(1)
    column = tile * BLOCK_N
    logits = product(
        x, x_stride, first, rows, head, scale, column, vocab, stride, depth, segment_depth, SEGMENTS, FORMAT, EVEN, DTYPE,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    groups = tl.reshape(logits, [BLOCK_N, BLOCK_M // ROWS, ROWS])
    columns = column + tl.arange(0, BLOCK_N)
    tokens = first_token + columns
    there = (columns < vocab)[None, :]
    group = 0
    while (group < BLOCK_M // ROWS) & (first + group * ROWS < rows):
        row = first + group * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        heat = tl.load(temperature + row, mask=inside, other=0.0)
        # First, while least else is held in registers.
        noise = _noise(
            inside & (is_greedy(heat) == 0), tokens, tl.load(seed + row, mask=inside, other=0),
            tl.load(position + row, mask=inside, other=0), tl.load(stream + row, mask=inside, other=0), ALIGNED,
        )  # fmt: skip

        mine = (tl.arange(0, BLOCK_M // ROWS) == group)[None, :, None]
        given = tl.trans(tl.sum(tl.where(mine, groups, 0.0), axis=1))  # the logits of these rows: sums of one and zeros
        nan = tl.max((there & (given != given)).to(tl.int32), axis=1) != 0
        raw = tl.where(there & (given == given), given, _NONE)
        largest = tl.max(raw, axis=1)
        divisor = _divisor(heat)[:, None]
        z = _divided(raw, divisor)
        score = z - noise
        best = tl.max(score, axis=1)
        token = tl.min(tl.where(score == best[:, None], tokens[None, :], _BEHIND), axis=1)

        at = row.to(tl.int64) * tiles + tile
        tl.store(tile_scores + at, best, mask=inside)
        tl.store(tile_tokens + at, token, mask=inside)
        tl.store(tile_logits + at, tl.max(tl.where(tokens[None, :] == token[:, None], raw, _NONE), axis=1), mask=inside)
        tl.store(tile_largest + at, tl.where(nan, float("nan"), largest), mask=inside)
        tl.store(tile_mass + at, _mass(raw, largest[:, None]), mask=inside)
        tl.store(tile_scaled_mass + at, _mass(z, _divided(largest[:, None], divisor)), mask=inside)
        group += 1


@triton.jit
def _largest(tile_largest, tile, tiles):
    """The largest logits of some tiles, -inf past the last and where a tile has NaN; and which have."""
    largest = tl.load(tile_largest + tile, mask=tile < tiles, other=_NONE)
    nan = largest != largest
    return tl.where(nan, _NONE, largest), nan


@kernel
def head_merge(
    rows, first_token, temperature,
    tile_scores, tile_tokens, tile_logits, tile_largest, tile_mass, tile_scaled_mass, tiles,
    tokens, status, scores, logprobs, largest, mass,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * tiles
    best = tl.full([], KEY_MIN, tl.int64)
    most = tl.full([], _NONE, tl.float32)
    has_nan = tl.full([], 0, tl.int32)
    first = 0
    while first < tiles:
        tile = first + tl.arange(0, MERGE)
        score = tl.load(tile_scores + start + tile, mask=tile < tiles, other=_NONE)
        token = tl.load(tile_tokens + start + tile, mask=tile < tiles, other=_BEHIND)
        best = tl.maximum(best, tl.max(make_key(ordered(score), token), axis=0))
        part, nan = _largest(tile_largest + start, tile, tiles)
        most = tl.maximum(most, tl.max(part, axis=0))
        has_nan = tl.maximum(has_nan, tl.max(nan.to(tl.int32), axis=0))
        first += MERGE

    heat = tl.load(temperature + row)
    divisor = _divisor(heat)
    z_most = _divided(most, divisor)
    masses = tl.zeros([MERGE], tl.float32)
    scaled_masses = tl.zeros([MERGE], tl.float32)
    first = 0
    while first < tiles:
        tile = first + tl.arange(0, MERGE)
        part, nan = _largest(tile_largest + start, tile, tiles)
        masses += tl.load(tile_mass + start + tile, mask=tile < tiles, other=0.0) * exp(below(part, most))
        share = exp(below(_divided(part, divisor), z_most))
        scaled_masses += tl.load(tile_scaled_mass + start + tile, mask=tile < tiles, other=0.0) * share
        first += MERGE
    total = tl.sum(masses, axis=0)
    scaled_total = tl.sum(scaled_masses, axis=0)

    bad = ((heat >= 0.0) & (heat < float("inf"))) == 0
    outcome = tl.where(key_value(best) == ORDERED_NEG_INF, _NOTHING, _OK)
    outcome = tl.where(bad, _BAD, tl.where(has_nan != 0, _NAN, outcome))
    drawn = outcome == _OK
    token = key_token(best)
    logit = tl.load(tile_logits + start + (token - first_token) // BLOCK_N, mask=drawn, other=0.0)
    z = _divided(logit, divisor)
    tl.store(tokens + row, tl.where(drawn, token, -1).to(tl.int64))
    tl.store(status + row, outcome)
    tl.store(scores + row, tl.where(drawn, unordered(key_value(best)), _NONE))
    tl.store(logprobs + row, tl.where(drawn, below(logit, most) - log(total), float("nan")))
    tl.store(logprobs + rows + row, tl.where(drawn, below(z, z_most) - log(scaled_total), float("nan")))
    tl.store(largest + row, tl.where(drawn, most, _NONE))
    tl.store(largest + rows + row, tl.where(drawn, z_most, _NONE))
    tl.store(mass + row, tl.where(drawn, total, 0.0))
    tl.store(mass + rows + row, tl.where(drawn, scaled_total, 0.0))
