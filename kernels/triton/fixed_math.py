"""The fixed logarithm and exponential of the token law (``kernels/fixed_math.py`` is the specification), and order in integers.

All of it in separately rounded float32: the kernels are launched with ``enable_fp_fusion=False``.

Floats are ordered as integers: ``ordered`` maps float32 to int32 so that ``a < b`` if and only if ``ordered(a) < ordered(b)``, with -0.0
taken as 0.0. A *key* is a value and a token in one int64, larger for a larger value, then for a lower token: the maximum of keys is the
tie rule of the law, whatever the order of the reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import fixed_math as law

_P = tl.constexpr(law.LOG_COEFFICIENTS)
_Q = tl.constexpr(law.EXP_COEFFICIENTS)
_LN2_HI = tl.constexpr(law.LN2_HI)
_LN2_LO = tl.constexpr(law.LN2_LO)
_SQRT_HALF_BITS = tl.constexpr(law.SQRT_HALF_BITS)
_LOG2_E = tl.constexpr(law.LOG2_E)
_ROUND = tl.constexpr(law.ROUND)
_WEIGHT_BITS = tl.constexpr(law.WEIGHT_BITS)
_WEIGHT_FLOOR = tl.constexpr(law.WEIGHT_FLOOR)
_MASS_BITS = tl.constexpr(law.MASS_BITS)
_MASS_SCALE = tl.constexpr(2.0**law.MASS_BITS)
_MASS_LOW = tl.constexpr((1 << law.MASS_BITS) - 1)
_SIGNLESS = tl.constexpr(0x7FFFFFFF)

ORDERED_INF = tl.constexpr(0x7F800000)
ORDERED_NEG_INF = tl.constexpr(-0x7F800001)
ORDERED_LOWEST = tl.constexpr(-0x7F800000)  # of the smallest finite float32
KEY_MIN = tl.constexpr(-(1 << 63))
KEY_MAX = tl.constexpr((1 << 63) - 1)


@triton.jit
def ordered(x):
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # the sum makes +0.0 of -0.0
    return bits ^ ((bits >> 31) & _SIGNLESS)


@triton.jit
def unordered(o):
    return (o ^ ((o >> 31) & _SIGNLESS)).to(tl.float32, bitcast=True)


@triton.jit
def make_key(o, token):
    """The key of an ordered value and a token below 2^31."""
    return (o.to(tl.int64) << 32) | (token ^ _SIGNLESS).to(tl.int64)


@triton.jit
def key_value(key):
    """The ordered value of a key, int32."""
    return (key >> 32).to(tl.int32)


@triton.jit
def key_token(key):
    return (key & _SIGNLESS).to(tl.int32) ^ _SIGNLESS


@triton.jit
def log_1f(f, exponent):
    """``log((1 + f) * 2^exponent)``."""
    square = f * f
    p = f * _P[7] + _P[6]
    p = p * f + _P[5]
    p = p * f + _P[4]
    p = p * f + _P[3]
    p = p * f + _P[2]
    p = p * f + _P[1]
    p = p * f + _P[0]
    y = p * f * square + exponent * _LN2_LO - square * 0.5
    return f + y + exponent * _LN2_HI


@triton.jit
def split(x):
    """``f, e`` with ``x = (1 + f) * 2^e`` and ``1 + f`` in ``[sqrt(1/2), sqrt(2))``."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    return (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0, exponent.to(tl.float32)


@triton.jit
def log(x):
    """Natural logarithm of positive normal float32 values."""
    f, exponent = split(x)
    return log_1f(f, exponent)


@triton.jit
def _exp_parts(d):
    """``e, n`` with ``exp(d) = e * 2^n`` for ``d`` in ``[-28, 0]``; ``e`` is near 1."""
    n = (d * _LOG2_E + _ROUND) - _ROUND
    r = d - n * _LN2_HI
    r = r - n * _LN2_LO
    q = r * _Q[4] + _Q[3]
    q = q * r + _Q[2]
    q = q * r + _Q[1]
    q = q * r + _Q[0]
    return q * r * r + r + 1.0, n.to(tl.int32)


@triton.jit
def _scale(e, power):
    """``e * 2^power``, exact."""
    return (e.to(tl.int32, bitcast=True) + (power << 23)).to(tl.float32, bitcast=True)


@triton.jit
def weight(d):
    """``floor(exp(d) * 2^40)``, int64, for ``d <= 0``; 0 below -28."""
    e, n = _exp_parts(tl.maximum(d, _WEIGHT_FLOOR))
    return tl.where(d < _WEIGHT_FLOOR, 0.0, _scale(e, n + _WEIGHT_BITS)).to(tl.int64)


@triton.jit
def exp(d):
    """``exp(d)`` for ``d <= 0``, within 1e-7; 0 below -28."""
    e, n = _exp_parts(tl.maximum(d, _WEIGHT_FLOOR))
    return tl.where(d < _WEIGHT_FLOOR, 0.0, _scale(e, n))


@triton.jit
def below(z, largest):
    """``z - largest`` for ``z <= largest``, 0 where they are equal (also where both are +inf)."""
    return tl.where(z == largest, 0.0, z - largest)


@triton.jit
def mass_needed(mass, top_p):
    """``max(1, ceil(top_p * mass))`` for int64 ``mass`` and ``top_p`` in [0, 1), cut to 31 bits."""
    p = (top_p * _MASS_SCALE).to(tl.int64)
    low = mass & _MASS_LOW
    needed = p * (mass >> _MASS_BITS) + ((p * low + _MASS_LOW) >> _MASS_BITS)
    return tl.where(needed > 1, needed, 1)
