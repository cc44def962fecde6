"""The kernels of ``sample_head``. The score of the law, ``logit / T - log(E)``, is known where the logit is made, and argmax and sums of
exponentials decompose: so the head's product keeps the best of each tile, and logits are never written (FlashSampling,
arXiv 2603.15854).

``head_tiles``, grid (tiles of 64 rows, tiles of the vocabulary): the product of a tile, exactly that of ``linear``; then for each of its
rows the key of the best score (ties to the lower token), that token's logit, the largest logit, and the sums of exponentials below it,
raw and divided by the temperature. Neighbouring programs share a tile of the head. ``head_merge``, grid (rows): the best key of all tiles,
which is the token of the row; the sums added in the order of the tiles.

Everything past the product is float32, rounded one operation at a time; sums of a tile are of integers (``fixed_math.weight``), so that a
row has the same bits however many others share the tile. Bytes: the head once, x once for each tile of the vocabulary (from L2), 24 for
each row and tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..api import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK
from .fixed_math import KEY_MIN, below, exp, key_token, key_value, log, make_key, ordered, unordered, weight
from .linear_kernels import product
from .noise import tile_noise
from .sample_row import is_greedy, kernel

_OK = tl.constexpr(STATUS_OK)
_NAN_STATUS = tl.constexpr(STATUS_NAN)
_NOTHING = tl.constexpr(STATUS_NOTHING_ALLOWED)
_BAD = tl.constexpr(STATUS_BAD_PARAMETER)
_BEHIND = tl.constexpr((1 << 31) - 1)  # every token
_NONE = tl.constexpr(float("-inf"))
ROWS = tl.constexpr(8)  # of a tile that are drawn for at a time: as many as registers allow
MERGE = tl.constexpr(1024)  # tiles looked at in one go


@triton.jit
def _divisor(temperature):
    """What logits are divided by; 1 in greedy rows and in those without a temperature."""
    return tl.where((is_greedy(temperature) == 0) & (temperature == temperature), temperature, 1.0)


@triton.jit
def _divided(x, divisor):
    return tl.div_rn(x, divisor + tl.zeros_like(x))


@triton.jit
def _noise(sampled, token, seed, position, stream, ALIGNED: tl.constexpr):
    """``log(E)`` in the rows that are sampled, 0 in the others. A tile of greedy rows makes no noise."""
    if tl.max(sampled.to(tl.int32), axis=0) > 0:
        noise = tile_noise(token, seed[:, None], position[:, None], stream[:, None], ALIGNED)
        noise = tl.where(sampled[:, None], noise, 0.0)
    else:
        noise = tl.zeros([sampled.numel, token.numel], tl.float32)
    return noise


@kernel
def head_tiles(
    x, x_stride, head, scale, stride, rows, depth, segment_depth, vocab, first_token, temperature, seed, position, stream,
    scores, winners, logits, largest, mass, scaled_mass, tiles,
    ALIGNED: tl.constexpr, SEGMENTS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    tile = tl.program_id(1)
    logit = product(
        x, x_stride, first, rows, head, scale, tile * BLOCK_N, vocab, stride, depth, segment_depth, SEGMENTS, FORMAT, EVEN, DTYPE,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    groups = tl.reshape(logit, [BLOCK_N, BLOCK_M // ROWS, ROWS])
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = first_token + column
    there = (column < vocab)[None, :]
    group = 0
    while (group < BLOCK_M // ROWS) & (first + group * ROWS < rows):
        row = first + group * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        heat = tl.load(temperature + row, mask=inside, other=0.0)
        noise = _noise(
            inside & (is_greedy(heat) == 0), token, tl.load(seed + row, mask=inside, other=0),
            tl.load(position + row, mask=inside, other=0), tl.load(stream + row, mask=inside, other=0), ALIGNED,
        )  # fmt: skip

        mine = (tl.arange(0, BLOCK_M // ROWS) == group)[None, :, None]
        given = tl.trans(tl.sum(tl.where(mine, groups, 0.0), axis=1))  # the logits of these rows, and zeros
        nan = tl.max((there & (given != given)).to(tl.int32), axis=1) != 0
        raw = tl.where(there & (given == given), given, _NONE)
        most = tl.max(raw, axis=1)
        divisor = _divisor(heat)[:, None]
        z = _divided(raw, divisor)
        score = z - noise
        best = tl.max(score, axis=1)
        winner = tl.min(tl.where(score == best[:, None], token[None, :], _BEHIND), axis=1)

        at = row.to(tl.int64) * tiles + tile
        tl.store(scores + at, best, mask=inside)
        tl.store(winners + at, winner, mask=inside)
        tl.store(logits + at, tl.max(tl.where(token[None, :] == winner[:, None], raw, _NONE), axis=1), mask=inside)
        tl.store(largest + at, tl.where(nan, float("nan"), most), mask=inside)
        tl.store(mass + at, _mass(raw, most[:, None]), mask=inside)
        tl.store(scaled_mass + at, _mass(z, _divided(most[:, None], divisor)), mask=inside)
        group += 1


@triton.jit
def _mass(x, most):
    """The sum of exp(x - most) of each row."""
    return tl.sum(exp(below(x, most)), axis=1)


@kernel
def head_merge(
    rows, first_token, temperature, keys, logits, largest, mass, scaled_mass, tiles,
    tokens, status, scores, logprobs, all_largest, all_mass,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    divisor = _divisor(heat)
    start = row * tiles

    best = tl.full([], KEY_MIN, tl.int64)
    most = tl.full([], _NONE, tl.float32)
    nan = tl.full([], 0, tl.int32)
    first = 0
    while first < tiles:
        tile = first + tl.arange(0, MERGE)
        best = tl.maximum(best, tl.max(tl.load(keys + start + tile, mask=tile < tiles, other=KEY_MIN), axis=0))
        part = tl.load(largest + start + tile, mask=tile < tiles, other=_NONE)
        nan = tl.maximum(nan, tl.max((part != part).to(tl.int32), axis=0))
        most = tl.maximum(most, tl.max(tl.where(part == part, part, _NONE), axis=0))
        first += MERGE

    z_most = _divided(most, divisor)
    sums = tl.zeros([MERGE], tl.float32)
    z_sums = tl.zeros([MERGE], tl.float32)
    first = 0
    while first < tiles:
        tile = first + tl.arange(0, MERGE)
        part = tl.load(largest + start + tile, mask=tile < tiles, other=_NONE)
        part = tl.where(part == part, part, _NONE)
        sums += tl.load(mass + start + tile, mask=tile < tiles, other=0.0) * exp(below(part, most))
        z_part = _divided(part, divisor)
        z_sums += tl.load(scaled_mass + start + tile, mask=tile < tiles, other=0.0) * exp(below(z_part, z_most))
        first += MERGE
    total = tl.sum(sums, axis=0)
    z_total = tl.sum(z_sums, axis=0)

    bad = ((heat >= 0.0) & (heat < float("inf"))) == 0
    outcome = tl.where(best == KEY_MIN, _NOTHING, _OK)
    outcome = tl.where(bad, _BAD, tl.where(nan != 0, _NAN_STATUS, outcome))
    drawn = outcome == _OK
    token = key_token(best)
    logit = tl.load(logits + start + (token - first_token) // BLOCK_N, mask=drawn, other=0.0)
    tl.store(status + row, outcome)
    tl.store(tokens + row, tl.where(drawn, token, -1).to(tl.int64))
    tl.store(scores + row, tl.where(drawn, unordered(key_value(best)), _NONE))
    z = _divided(logit, divisor)
    tl.store(logprobs + row, tl.where(drawn, below(logit, most) - log(total), float("nan")))
    tl.store(logprobs + rows + row, tl.where(drawn, below(z, z_most) - log(z_total), float("nan")))
    tl.store(all_largest + row, tl.where(drawn, most, _NONE))
    tl.store(all_largest + rows + row, tl.where(drawn, z_most, _NONE))
    tl.store(all_mass + row, tl.where(drawn, total, 0.0))
    tl.store(all_mass + rows + row, tl.where(drawn, z_total, 0.0))

