"""The noise of the token law, in PyTorch: the specification that C++ (csrc/common), CUDA and Triton repeat to the bit.

A token ``i`` of a row gets the word ``i & 3`` of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
under the key ``seed`` at the counter ``(i >> 2, position, stream, domain)``. The 32-bit word ``X`` becomes ``u = (X + 0.5) / 2^32``, or
``(X * 2^32 + L + 0.5) / 2^64`` for ``X < 256``, with ``L`` the same word of the tail domain: strictly inside (0, 1), fine where it is small
(a 24-bit u cuts the tail of the noise off: tokens far below the best one are then never drawn). ``E = -log1p(-u)`` is a unit exponential,
``-log(E)`` Gumbel noise: ``argmax_i(z_i - log(E_i))`` draws from ``softmax(z)`` (Gumbel-max).

Every float here is float32, every multiplication and addition rounds by itself (no fused multiply-add), and conversions round to nearest
even, so all implementations agree in every bit. The logarithms are those of ``fixed_math``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fixed_math import log, log_1f, split

DOMAIN_SAMPLE = 0  # words of the draw itself
DOMAIN_COIN = 1  # of the decisions of `verify_block`,
DOMAIN_RESIDUAL = 2  # and of its last draw
DOMAIN_TAIL = 4  # added to a domain: the 32 further bits of its words (of the draws those below TAIL_WORDS)
TAIL_WORDS = 256

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


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


def words(seed: Tensor, position: Tensor, stream: Tensor, vocab_size: int, domain: int = DOMAIN_SAMPLE, first_token: int = 0) -> Tensor:
    """The words of the tokens from ``first_token`` on: int64 ``[R, vocab_size]`` for ``seed``, ``position``, ``stream`` of shape ``[R]``
    (bits of any integer)."""
    seed, position, stream = (t.long()[:, None] for t in (seed, position, stream))
    skipped = first_token % 4
    index = torch.arange(first_token // 4, (first_token + vocab_size + 3) // 4, device=seed.device)[None, :]
    counter = (index, position & _MASK, stream & _MASK, torch.full_like(index[:, :1], domain))
    block = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(torch.broadcast_tensors(*block), dim=-1).flatten(1)[:, skipped : skipped + vocab_size]


def exponential(word: Tensor, low: Tensor) -> Tensor:
    """``E = -log1p(-u)``, float32, for words ``X`` and their tails ``L`` (int64, used where ``X < TAIL_WORDS``).

    Below ``X = 2^30``: ``log1p`` at ``f = -u`` itself, so that a small u keeps all its bits; above: the logarithm of ``1 - u``, exact in
    the integers. Integers pass through float64, which holds them all, so that each is rounded to float32 once.
    """
    tail = ((word << 32 | low) * 2 + 1).double().float() * 2.0**-65
    u = torch.where(word < TAIL_WORDS, tail, (word * 2 + 1).double().float() * 2.0**-33)
    f, exponent = split(((_MASK - word) * 2 + 1).double().float() * 2.0**-33)
    small = word < 1 << 30
    return -log_1f(torch.where(small, -u, f), torch.where(small, 0.0, exponent))


def noise(seed: Tensor, position: Tensor, stream: Tensor, vocab_size: int, domain: int = DOMAIN_SAMPLE, first_token: int = 0) -> Noise:
    """The noise of those tokens in each row; arguments as of ``words``."""
    word = words(seed, position, stream, vocab_size, domain, first_token)
    low = torch.zeros_like(word)
    needs_tail = word < TAIL_WORDS
    rows = needs_tail.any(dim=1).nonzero()[:, 0]
    if len(rows):
        tail = words(seed[rows], position[rows], stream[rows], vocab_size, domain + DOMAIN_TAIL, first_token)
        low[rows] = tail * needs_tail[rows]
    e = exponential(word, low)
    return Noise(word, low, e, log(e))
