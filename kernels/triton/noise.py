"""The noise of the token law (``kernels/noise.py`` is the specification) and bounds on it that need no logarithm.

**Bounds.** With ``u' = (X >> 9) / 2^23``, cut from ``u``, let ``g = (exponent - mantissa part) ln 2`` be minus the logarithm of ``u'`` with
``log2(1 + m)`` replaced by ``m``: the bits of ``u'`` read as an integer give it. ``log2(1 + m)`` lies in ``[m, m + 0.0861]``, so

    g - 0.0597 <= -log u' <= g,  and  -log E <= -log u <= -log u' <= g   (E = -log1p(-u) >= u >= u'; u' = 0 makes g = 88 > 65 ln 2)

From below, for ``u < 1/16``, ``-log E >= -log u + log(1 - u) >= -log u - 0.0646``, and ``-log u >= -log u' - 0.0313`` where
``u' >= 2^-18``; a smaller ``u`` has ``-log u >= 18 ln 2 = 12.476``. So ``-log E >= min(g, 12.47) - 0.17``; and ``-log E >= -3.15`` for
every ``u``, which stays below ``1 - 2^-33``. The constants leave 1e-4 for what the polynomials round (5e-6). Rounding the sum with ``z``
keeps order, so ``fl(z + upper)`` and ``fl(z + lower)`` enclose the score as it is computed, for ``z`` of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import noise as law
from .fixed_math import log, log_1f, split

_M0 = tl.constexpr(law.PHILOX_M0)
_M1 = tl.constexpr(law.PHILOX_M1)
_W0 = tl.constexpr(law.PHILOX_W0)
_W1 = tl.constexpr(law.PHILOX_W1)
_SAMPLE = tl.constexpr(law.DOMAIN_SAMPLE)
_TAIL = tl.constexpr(law.DOMAIN_TAIL)
_TAIL_WORDS = tl.constexpr(law.TAIL_WORDS)
_LN2 = tl.constexpr(0.6931472)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; everything uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, _M0, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, _M1, tl.uint32))
        low0 = c0 * _M0
        low1 = c2 * _M1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _block(quads, domain: tl.constexpr, seed, position, stream):
    """The four words of each counter ``quads`` (token >> 2)."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = quads.to(tl.uint32)
    zero = c0 ^ c0
    c1 = zero + position.to(tl.uint32, bitcast=True)
    c2 = zero + stream.to(tl.uint32, bitcast=True)
    return philox4x32(c0, c1, c2, zero + domain, k0, k1)


@triton.jit
def quad_words(quads, domain: tl.constexpr, seed, position, stream):
    """The words of the tokens ``4 * quads + (0, 1, 2, 3)``, flat: uint32, four times as many as ``quads``."""
    w0, w1, w2, w3 = _block(quads, domain, seed, position, stream)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * quads.numel])


@triton.jit
def token_words(tokens, domain: tl.constexpr, seed, position, stream):
    """The words of arbitrary tokens."""
    w0, w1, w2, w3 = _block(tokens >> 2, domain, seed, position, stream)
    which = tokens & 3
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def needs_tail(words):
    """Whether a word of the tile needs its tail: once in 2^24 words."""
    return tl.max((words < _TAIL_WORDS).to(tl.int32), axis=0) > 0


@triton.jit
def _unit(words):
    """``u`` where ``X < 2^30``, else ``1 - u``, each rounded once.

    ``2 Y + 1`` has 33 bits where ``Y = 2^32 - 1 - X >= 2^31``; there ``Y | 1`` rounds to half of the same float, for all bits below the
    rounding are then decided by whether they are more than half of a unit in the last place.
    """
    small = words < (1 << 30)
    y = words ^ 0xFFFFFFFF
    wide = (y >= (1 << 31)) & (words >= (1 << 30))
    odd = tl.where(small, words * 2 + 1, tl.where(wide, y | 1, y * 2 + 1))
    return small, odd.to(tl.float32) * tl.where(wide, 2.0**-32, 2.0**-33)


@triton.jit
def _tailed(words, tails, unit):
    """``unit`` with the tail ``L`` of words below 256."""
    wide = (words.to(tl.int64) << 32) | tails.to(tl.int64)
    wide = tl.where(words < _TAIL_WORDS, wide, 0) * 2 + 1
    return tl.where(words < _TAIL_WORDS, wide.to(tl.float32) * 2.0**-65, unit)


@triton.jit
def _log_exponential(small, unit):
    """``log(E)`` from ``_unit``."""
    f, exponent = split(unit)
    return log(-log_1f(tl.where(small, -unit, f), tl.where(small, 0.0, exponent)))


@triton.jit
def log_exponential(words):
    """``log(E)`` of words that need no tail."""
    small, unit = _unit(words)
    return _log_exponential(small, unit)


@triton.jit
def log_exponential_tailed(words, tails):
    """``log(E)`` with the tail ``L`` of words below 256."""
    small, unit = _unit(words)
    return _log_exponential(small, _tailed(words, tails, unit))


@triton.jit
def quad_noise(quads, seed, position, stream):
    """``log(E)`` of the tokens ``4 * quads + (0, 1, 2, 3)``, flat."""
    words = quad_words(quads, _SAMPLE, seed, position, stream)
    if needs_tail(words):
        noise = log_exponential_tailed(words, quad_words(quads, _TAIL, seed, position, stream))
    else:
        noise = log_exponential(words)
    return noise


@triton.jit
def token_noise(tokens, seed, position, stream):
    """``log(E)`` of arbitrary tokens ``[N]``."""
    words = token_words(tokens, _SAMPLE, seed, position, stream)
    if needs_tail(words):
        noise = log_exponential_tailed(words, token_words(tokens, _TAIL, seed, position, stream))
    else:
        noise = log_exponential(words)
    return noise


@triton.jit
def _tile_words(tokens, domain: tl.constexpr, seed, position, stream, ALIGNED: tl.constexpr):
    if ALIGNED:
        quads = tl.max(tl.reshape(tokens, [tokens.numel // 4, 4]), axis=1) >> 2
        w0, w1, w2, w3 = _block(quads[None, :], domain, seed, position, stream)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [seed.numel, tokens.numel])
    else:
        words = token_words(tokens[None, :], domain, seed, position, stream)
    return words


@triton.jit
def tile_noise(tokens, seed, position, stream, ALIGNED: tl.constexpr):
    """``log(E)`` of ``tokens [N]`` in each of R rows, ``[R, N]``; the others are ``[R, 1]``. ALIGNED: the tokens are consecutive and begin
    with a multiple of 4, so that four of them share the work for their words."""
    words = _tile_words(tokens, _SAMPLE, seed, position, stream, ALIGNED)
    if tl.max(tl.max((words < _TAIL_WORDS).to(tl.int32), axis=1), axis=0) > 0:
        noise = log_exponential_tailed(words, _tile_words(tokens, _TAIL, seed, position, stream, ALIGNED))
    else:
        noise = log_exponential(words)
    return noise


@triton.jit
def bounds(words):
    """``lower, upper`` with ``lower <= -log(E) <= upper``, whatever the tail; see the head of the module."""
    cut = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    g = (0x3F800000 - cut.to(tl.int32, bitcast=True)).to(tl.float32) * (_LN2 * 2.0**-23)
    lower = tl.where(words < (1 << 28), tl.minimum(g, 12.47) - 0.17, -3.2)
    return lower, g + 1e-4


@triton.jit
def quad_bounds(quads, seed, position, stream):
    """``bounds`` of the tokens ``4 * quads + (0, 1, 2, 3)``, flat."""
    return bounds(quad_words(quads, _SAMPLE, seed, position, stream))
