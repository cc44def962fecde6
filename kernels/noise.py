"""The noise of the token law, in PyTorch: the specification that C++ (csrc/common), CUDA and Triton repeat to the bit.

A token ``i`` of a row gets the word ``i & 3`` of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
under the key ``seed`` at the counter ``(i >> 2, position, stream, domain)``. The 32-bit word ``X`` becomes ``u = (X + 0.5) / 2^32``, or
``(X * 2^32 + L + 0.5) / 2^64`` for ``X < 256``, with ``L`` the same word of the tail domain: strictly inside (0, 1), fine where it is small
(a 24-bit u cuts the tail of the noise off: tokens far below the best one are then never drawn). ``E = -log1p(-u)`` is a unit exponential,
``-log(E)`` Gumbel noise: ``argmax_i(z_i - log(E_i))`` draws from ``softmax(z)`` (Gumbel-max).

Every float here is float32, every multiplication and addition rounds by itself (no fused multiply-add), and conversions round to nearest
even, so all implementations agree in every bit. Both logarithms use one core, with ``x = m * 2^e``, ``m in [sqrt(1/2), sqrt(2))``:

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
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DOMAIN_SAMPLE = 0  # words of the draw itself
DOMAIN_TAIL = 4  # the 32 further bits of a word below TAIL_WORDS
TAIL_WORDS = 256

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

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


class Noise(NamedTuple):
    """The noise of each token and what it came from, each ``[R, V]``."""

    word: Tensor  # int64: X in [0, 2^32)
    low: Tensor  # int64: L where X < TAIL_WORDS, else 0
    exponential: Tensor  # float32: E
    log_exponential: Tensor  # float32: log(E); the score is z - log(E)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. All tensors are int64 holding 32-bit values, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1  # int64 wraps like uint64
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + PHILOX_W0 & _MASK, k1 + PHILOX_W1 & _MASK
    return c0, c1, c2, c3


def words(seed: Tensor, position: Tensor, stream: Tensor, vocab_size: int, domain: int = DOMAIN_SAMPLE) -> Tensor:
    """The word of each token: int64 ``[R, vocab_size]`` for ``seed``, ``position``, ``stream`` of shape ``[R]`` (bits of any integer)."""
    seed, position, stream = (t.long()[:, None] for t in (seed, position, stream))
    index = torch.arange((vocab_size + 3) // 4, device=seed.device)[None, :]
    counter = (index, position & _MASK, stream & _MASK, torch.full_like(index[:, :1], domain))
    block = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(torch.broadcast_tensors(*block), dim=-1).flatten(1)[:, :vocab_size]


def _log(f: Tensor, exponent: Tensor) -> Tensor:
    """``log((1 + f) * 2^exponent)`` by the fixed sequence of the module's head."""
    square = f * f
    p = torch.full_like(f, LOG_COEFFICIENTS[-1])
    for c in reversed(LOG_COEFFICIENTS[:-1]):
        p = p * f + c
    y = p * f * square + exponent * LN2_LO - square * 0.5
    return f + y + exponent * LN2_HI


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """``f, e`` with ``x = (1 + f) * 2^e`` and ``1 + f`` in ``[sqrt(1/2), sqrt(2))``; both float32, both exact."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    return (bits - (exponent << 23)).view(torch.float32) - 1.0, exponent.float()


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 values, within 1.2e-7 of the exact one (relative)."""
    return _log(*_split(x))


def exponential(word: Tensor, low: Tensor) -> Tensor:
    """``E = -log1p(-u)``, float32, for words ``X`` and their tails ``L`` (int64, used where ``X < TAIL_WORDS``).

    Below ``X = 2^30``: ``log1p`` at ``f = -u`` itself, so that a small u keeps all its bits; above: the logarithm of ``1 - u``, exact in
    the integers. Integers pass through float64, which holds them all, so that each is rounded to float32 once.
    """
    tail = ((word << 32 | low) * 2 + 1).double().float() * 2.0**-65
    u = torch.where(word < TAIL_WORDS, tail, (word * 2 + 1).double().float() * 2.0**-33)
    f, exponent = _split(((_MASK - word) * 2 + 1).double().float() * 2.0**-33)
    small = word < 1 << 30
    return -_log(torch.where(small, -u, f), torch.where(small, 0.0, exponent))


def noise(seed: Tensor, position: Tensor, stream: Tensor, vocab_size: int) -> Noise:
    """The noise of every token of each row; arguments as of ``words``."""
    word = words(seed, position, stream, vocab_size)
    low = torch.zeros_like(word)
    needs_tail = word < TAIL_WORDS
    rows = needs_tail.any(dim=1).nonzero()[:, 0]
    if len(rows):
        low[rows] = words(seed[rows], position[rows], stream[rows], vocab_size, DOMAIN_TAIL) * needs_tail[rows]
    e = exponential(word, low)
    return Noise(word, low, e, log(e))
