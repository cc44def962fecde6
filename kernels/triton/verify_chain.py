"""The kernels of ``verify_block``, in the order they run (the algorithm, its identities and the law of its draws: ``api.verify_block``).

    chain_totals     rows x chunks       mass of each row of the target and of the proposal
    chain_weights    sequences           how far the chain goes, and w_i of its rows
    chain_residuals  rows x chunks       Z_i of rows that a draft follows
    chain_accept     sequences           the coins, tau, the path; what the last token is drawn from
    chain_draw       sequences x chunks  the best score of a chunk
    chain_tokens     sequences           its token

Shares are float64 quotients of integers, and each further operation on them is rounded by itself, as the oracle does; residuals are
integers, so that no order of summation changes a decision; the best score is a maximum of keys, ties to the lower token. Target and
proposal are read twice, and the row that is drawn from once more: 32 bytes a token and row in all.

A sequence whose rows do not lie in the call, or are not 1 to 64, has -1 drafts accepted, no token and STATUS_BAD_PARAMETER; a draft outside
the vocabulary, or of a proposal without any mass, is not kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import checks_verify
from .. import noise as noise_law
from ..api import STATUS_BAD_PARAMETER, STATUS_OK
from ..reference_verify import SHARE_BITS
from .fixed_math import KEY_MIN, key_token, log, make_key, ordered
from .noise import log_exponential, log_exponential_tailed, needs_tail, quad_words, token_words
from .sample_row import kernel

_NODES = tl.constexpr(checks_verify.MAX_NODES)
_OK = tl.constexpr(STATUS_OK)
_BAD = tl.constexpr(STATUS_BAD_PARAMETER)
_ONE = tl.constexpr(2.0**SHARE_BITS)
_ONE_INTEGER = tl.constexpr(1 << SHARE_BITS)
_UNIT = tl.constexpr(2.0**-SHARE_BITS)
_COIN = tl.constexpr(noise_law.DOMAIN_COIN)
_COIN_TAIL = tl.constexpr(noise_law.DOMAIN_COIN + noise_law.DOMAIN_TAIL)
_RESIDUAL = tl.constexpr(noise_law.DOMAIN_RESIDUAL)
_RESIDUAL_TAIL = tl.constexpr(noise_law.DOMAIN_RESIDUAL + noise_law.DOMAIN_TAIL)


@triton.jit
def _rows(start, sequence, rows):
    """First row and number of rows of a sequence; 0 of one that cannot be."""
    first = tl.load(start + sequence).to(tl.int64)
    size = tl.load(start + sequence + 1).to(tl.int64) - first
    fits = (first >= 0) & (size >= 1) & (size <= _NODES) & (first + size <= rows)
    return first, tl.where(fits, size, 0).to(tl.int32)


@triton.jit
def _shares(mass, total):
    """``mass / total``, float64; 0 of a total that is none."""
    return tl.where(total > 0, mass.to(tl.float64) / tl.where(total > 0, total, 1).to(tl.float64), 0.0)


@triton.jit
def _residual(w, p, q):
    """``max(w p - q, 0)`` in units of 2^-62."""
    return (tl.maximum(w * p - q, 0.0) * _ONE).to(tl.int64)


@kernel
def chain_totals(target, proposal, totals, vocab, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    at = row * vocab + ids
    tl.atomic_add(totals + row * 2, tl.sum(tl.load(target + at, mask=ids < vocab, other=0), axis=0), sem="relaxed")
    tl.atomic_add(totals + row * 2 + 1, tl.sum(tl.load(proposal + at, mask=ids < vocab, other=0), axis=0), sem="relaxed")


@kernel
def chain_weights(target, status, proposal, draft, start, totals, weights, ends, lengths, rows, vocab):
    """``weights`` of rows that a draft follows (others stay negative), and of the last in ``ends``."""
    sequence = tl.program_id(0)
    first, size = _rows(start, sequence, rows)
    node = tl.arange(0, _NODES)
    there = node < size
    failed = there & (tl.load(status + first + node, mask=there, other=_OK) != _OK)
    n = tl.minimum(size - 1, tl.min(tl.where(failed, node, _NODES), axis=0))
    follows = node < n
    x = tl.load(draft + first + node + 1, mask=follows, other=-1)
    known = follows & (x >= 0) & (x < vocab)
    row = first + node
    p_mass = tl.load(target + row * vocab + x, mask=known, other=0)
    q_mass = tl.load(proposal + (row + 1) * vocab + x, mask=known, other=0)
    p = _shares(p_mass, tl.load(totals + row * 2, mask=follows, other=1))
    q = _shares(q_mass, tl.load(totals + (row + 1) * 2 + 1, mask=follows, other=1))
    w = tl.full([], 1.0, tl.float64)
    i = 0
    while i < n:
        tl.store(weights + first + i, w)
        of_target = tl.sum(tl.where(node == i, p, 0.0), axis=0)
        given = tl.sum(tl.where(node == i, q, 0.0), axis=0)
        w = tl.where(given > 0.0, tl.minimum(w * of_target / tl.where(given > 0.0, given, 1.0), 1.0), 0.0)
        i += 1
    tl.store(ends + sequence, w)
    tl.store(lengths + sequence, n)


@kernel
def chain_residuals(target, proposal, totals, weights, residuals, vocab, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weights + row)
    if w > 0.0:  # else nothing is left
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        at = row * vocab + ids
        p = _shares(tl.load(target + at, mask=ids < vocab, other=0), tl.load(totals + row * 2))
        q = _shares(tl.load(proposal + vocab + at, mask=ids < vocab, other=0), tl.load(totals + row * 2 + 3))
        tl.atomic_add(residuals + row, tl.sum(_residual(w, p, q), axis=0), sem="relaxed")


@kernel
def chain_accept(
    status, start, seed, position, stream, weights, ends, lengths, residuals, num_accepted, path, tokens, outcome, drawn_row, drawn_weight,
    best, rows,
):  # fmt: skip
    sequence = tl.program_id(0)
    first, size = _rows(start, sequence, rows)
    tl.store(tokens + sequence, -1)
    tl.store(best + sequence, KEY_MIN)
    if size > 0:
        node = tl.arange(0, _NODES)
        n = tl.load(lengths + sequence)
        follows = node < n
        w = tl.load(weights + first + node, mask=follows, other=0.0)
        left = tl.load(residuals + first + node, mask=follows, other=0)
        z = left.to(tl.float64) * _UNIT
        rest = z + (1.0 - w)  # 1 - w first: it is exact near 1, and h is exactly 1 for w = 1
        h = tl.where(rest > 0.0, z / tl.where(rest > 0.0, rest, 1.0), 1.0)
        h = tl.where(node == n, tl.load(ends + sequence), h)
        row_seed = tl.load(seed + sequence)
        row_position = tl.load(position + sequence)
        row_stream = tl.load(stream + sequence)
        high = token_words(node, _COIN, row_seed, row_position, row_stream).to(tl.float64)
        low = token_words(node, _COIN_TAIL, row_seed, row_position, row_stream).to(tl.float64)
        u = (high * 2.0**32 + low + 0.5) * 2.0**-64
        tau = tl.max(tl.where((node >= 1) & (node <= n) & (u <= h), node, 0), axis=0)
        tl.store(path + first + node, tl.where(node <= tau, node, -1), mask=node < size)
        tl.store(num_accepted + sequence, tau)
        found = tl.load(status + first + tau)
        tl.store(outcome + sequence, found)
        tl.store(drawn_row + sequence, tl.where(found == _OK, first + tau, -1))
        # From the residual; else, where the weight is negative, from the row itself.
        is_left = (tau < n) & (tl.sum(tl.where(node == tau, left, 0), axis=0) > 0)
        tl.store(drawn_weight + sequence, tl.where(is_left, tl.sum(tl.where(node == tau, w, 0.0), axis=0), -1.0))
    else:
        tl.store(num_accepted + sequence, -1)
        tl.store(outcome + sequence, _BAD)
        tl.store(drawn_row + sequence, -1)


@kernel
def chain_draw(
    target, proposal, totals, seed, position, stream, drawn_row, drawn_weight, best, vocab, CHUNK: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0)
    row = tl.load(drawn_row + sequence)
    if row >= 0:
        chunk = tl.program_id(1)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        at = row * vocab + ids
        p = _shares(tl.load(target + at, mask=ids < vocab, other=0), tl.load(totals + row * 2))
        w = tl.load(drawn_weight + sequence)
        mass = _residual(1.0, p, 0.0)
        if w >= 0.0:
            q = _shares(tl.load(proposal + vocab + at, mask=ids < vocab, other=0), tl.load(totals + row * 2 + 3))
            mass = _residual(w, p, q)
        row_seed = tl.load(seed + sequence)
        row_position = tl.load(position + sequence)
        row_stream = tl.load(stream + sequence)
        quads = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
        words = quad_words(quads, _RESIDUAL, row_seed, row_position, row_stream)
        if needs_tail(words):
            noise = log_exponential_tailed(words, quad_words(quads, _RESIDUAL_TAIL, row_seed, row_position, row_stream))
        else:
            noise = log_exponential(words)
        share = tl.where(mass > 0, mass, _ONE_INTEGER).to(tl.float64).to(tl.float32) * _UNIT
        key = tl.where(mass > 0, make_key(ordered(log(share) - noise), ids), KEY_MIN)
        tl.atomic_max(best + sequence, tl.max(key, axis=0), sem="relaxed")


@kernel
def chain_tokens(best, tokens):
    sequence = tl.program_id(0)
    key = tl.load(best + sequence)
    if key != KEY_MIN:
        tl.store(tokens + sequence, key_token(key).to(tl.int64))
