"""Logarithm and exponential of the token law in PyTorch: the specification that C++ (csrc/common), CUDA and Triton repeat to the bit.

Every float here is float32, every multiplication and addition rounds by itself (no fused multiply-add), and conversions round to nearest
even.

**log.** With ``x = m * 2^e``, ``m in [sqrt(1/2), sqrt(2))``:

    log(x) = ((f + ((f^3 P(f) + e * LN2_LO) - f^2 / 2)) + e * LN2_HI,    f = m - 1

``P`` of degree 7 is a minimax fit (weighted least squares, reweighted by Lawson's rule) of ``(log1p(f) - f + f^2 / 2) / f^3``, its error
weighted by ``f^3 / log1p(f)``: 7e-9 of the logarithm with the rounded coefficients, a tenth of float32's own rounding. Its fit:

    n, a, b = 4001, 0.5**0.5 - 1, 2**0.5 - 1
    f = (a + b) / 2 + (b - a) / 2 * np.cos(np.pi * (np.arange(n) + 0.5) / n)
    y, w, q = (np.log1p(f) - f + f * f / 2) / f**3, np.abs(f**3 / np.log1p(f)), np.ones(n) / n     # series for |f| < 0.05
    for _ in range(300):
        c = np.linalg.lstsq(np.vander(f, 8, increasing=True) * (np.sqrt(q) * w)[:, None], y * np.sqrt(q) * w, rcond=None)[0]
        r = np.abs(np.vander(f, 8, increasing=True) @ c - y) * w
        q = q * r / (q * r).sum()

**weight.** Probability mass is summed in integers, so that no order of summation can change a filter: the weight of a token ``d <= 0`` away
from the largest is ``floor(exp(d) * 2^40)``, 0 below ``d = -28``. With ``n`` the integer next to ``d / ln 2`` and ``r = d - n ln 2``:

    exp(d) = 2^n * (((Q(r) * r) * r + r) + 1)

``Q`` of degree 4 is the same kind of fit of ``(exp(r) - 1 - r) / r^2``, weighted by ``r^2 / exp(r)``: 4e-9 of the exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

# P, lowest power first; hexadecimal, so that no decimal conversion can differ between languages.
LOG_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.555554p-2",
        "-0x1.000226p-2",
        "0x1.99a008p-3",
        "-0x1.547244p-3",
        "0x1.22da1cp-3",
        "-0x1.0d8542p-3",
        "0x1.055b6ap-3",
        "-0x1.38b58p-4",
    )
)
LN2_HI = 355.0 / 512.0  # 9 bits: its product with an exponent is exact
LN2_LO = float.fromhex("-0x1.bd0106p-13")  # ln(2) - LN2_HI, rounded to float32
SQRT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as float32

# Q, lowest power first.
EXP_COEFFICIENTS = tuple(float.fromhex(c) for c in ("0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558f2p-5", "0x1.1239e2p-7", "0x1.6a2434p-10"))
LOG2_E = float.fromhex("0x1.715476p+0")  # 1 / ln(2), rounded to float32
ROUND = 1.5 * 2.0**23  # adding it rounds a small float to an integer, to even on ties
WEIGHT_BITS = 40  # the weight of the largest token is 2^40
WEIGHT_FLOOR = -28.0  # e^-28 < 2^-40
MASS_BITS = 31  # of top_p as a fraction


def log_1f(f: Tensor, exponent: Tensor) -> Tensor:
    """``log((1 + f) * 2^exponent)`` by the fixed sequence of the module's head."""
    square = f * f
    p = torch.full_like(f, LOG_COEFFICIENTS[-1])
    for c in reversed(LOG_COEFFICIENTS[:-1]):
        p = p * f + c
    y = p * f * square + exponent * LN2_LO - square * 0.5
    return f + y + exponent * LN2_HI


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """``f, e`` with ``x = (1 + f) * 2^e`` and ``1 + f`` in ``[sqrt(1/2), sqrt(2))``; both float32, both exact."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    return (bits - (exponent << 23)).view(torch.float32) - 1.0, exponent.float()


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 values, within 1.2e-7 of the exact one (relative)."""
    return log_1f(*split(x))


def weight(d: Tensor) -> Tensor:
    """``floor(exp(d) * 2^40)`` as int64 for float32 ``d <= 0`` (-inf too), the exponential within 1e-7 (relative)."""
    n = (d.clamp(min=WEIGHT_FLOOR) * LOG2_E + ROUND) - ROUND
    r = d.clamp(min=WEIGHT_FLOOR) - n * LN2_HI
    r = r - n * LN2_LO
    q = torch.full_like(r, EXP_COEFFICIENTS[-1])
    for c in reversed(EXP_COEFFICIENTS[:-1]):
        q = q * r + c
    e = q * r * r + r + 1.0
    scaled = (e.view(torch.int32) + ((n.int() + WEIGHT_BITS) << 23)).view(torch.float32)
    return torch.where(d < WEIGHT_FLOOR, 0, scaled.long())


def mass_needed(mass: Tensor, top_p: Tensor) -> Tensor:
    """``max(1, ceil(top_p * mass))``, int64, exact for ``top_p`` (float32 in [0, 1)) cut to 31 bits and ``mass`` (int64) below 2^62."""
    p = (top_p.double() * 2.0**MASS_BITS).long()
    low = mass & ((1 << MASS_BITS) - 1)
    return (p * (mass >> MASS_BITS) + ((p * low + ((1 << MASS_BITS) - 1)) >> MASS_BITS)).clamp(min=1)
