"""Planted wrong samplers: what the checks must find. Each is the law written plainly with one mistake, such as engines have made.

``plain`` is the law without a mistake, over the specified noise and the float64 filters of ``laws``: it must pass whatever the wrong fail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..kernels import fixed_math, noise
from .laws import Law

SUB_BLOCK = 128
GROUP = 1 << 21  # words worked on at once


def from_scores(
    law: Law,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    log_exponential: Callable[[Tensor, Tensor], Tensor] = lambda word, low: fixed_math.log(noise.exponential(word, low)),
    score: Callable[[Tensor, Tensor], Tensor] = torch.sub,  # of z and log(E)
    shared: int = 1,  # so many neighbours get one word
    processed: Callable[[Law], Tensor] = lambda law: law.processed(torch.float32),
    kept: Callable[[Law, Tensor], Tensor] = Law.kept,
    best: Callable[[Tensor], Tensor] = lambda score: score.argmax(dim=1),
) -> Tensor:
    """The law with a place for one mistake; nothing wrong by default."""
    vocab = len(law.logits)
    z = processed(law)
    tokens = []
    for part in torch.arange(len(seed)).split(max(1, GROUP // vocab)):
        keep = kept(law, law.processed(torch.float64))
        row = noise.noise(seed[part], position[part], stream[part], vocab)
        word, low = (t[:, torch.arange(vocab) // shared * shared] for t in row[:2]) if shared > 1 else row[:2]
        tokens.append(best(score(z, log_exponential(word, low)).masked_fill(~keep, -math.inf)))
    return torch.cat(tokens)


def plain(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """The law."""
    return from_scores(law, seed, position, stream)


# ---- wrong noise ----


def exponential_noise(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Exponential noise is added where Gumbel noise belongs."""
    return from_scores(law, seed, position, stream, score=lambda z, log_e: z + log_e.exp())


def noise_shared_by_four(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """The four tokens of a Philox block get one word."""
    return from_scores(law, seed, position, stream, shared=4)


def half_the_positions(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Two neighbouring positions, seeds or streams share their noise; each draw by itself is fine."""
    return plain(law, seed // 2, position // 2, stream // 2)


def _bounded(law: Law, seed: Tensor, position: Tensor, stream: Tensor, log_e: Callable[[Tensor, Tensor], Tensor], largest: float) -> Tensor:
    """``from_scores`` with noise that never passes ``largest``: rows the first token wins, whatever the others get, are skipped."""
    z = law.processed(torch.float32)
    first = noise.noise(seed, position, stream, 1)
    undecided = z[0] - log_e(first.word, first.low)[:, 0] <= z[1:].max() + largest
    tokens = torch.zeros_like(seed)
    if bool(undecided.any()):
        rows = (t[undecided] for t in (seed, position, stream))
        tokens[undecided] = from_scores(law, *rows, log_exponential=log_e)
    return tokens


def uniforms_of_24_bits(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """The words are cut to 24 bits, as a uniform made by the usual conversion to float32 is: no noise above 17.4."""

    def log_e(word: Tensor, low: Tensor) -> Tensor:
        return (-torch.log1p(-((word >> 8).double() + 0.5) * 2.0**-24)).log().float()

    return _bounded(law, seed, position, stream, log_e, 17.4)


def uniforms_plus_epsilon(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """An epsilon guards the logarithm: no noise above 16.2."""

    def log_e(word: Tensor, low: Tensor) -> Tensor:
        return (-torch.log1p(-(word.double() + 0.5) * 2.0**-32) + 1e-7).log().float()

    return _bounded(law, seed, position, stream, log_e, 16.2)


def one_uniform_is_1(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """``-log(-log(u))`` of a float32 u that rounds to 1 once in 2^25 words: infinite noise, and the token wins whatever its logit."""

    def log_e(word: Tensor, low: Tensor) -> Tensor:
        u = ((2**32 - 1 - word).double() + 0.5).float() * 2.0**-32
        return (-u.log()).log()

    return from_scores(law, seed, position, stream, log_exponential=log_e)


def one_exponential_is_infinite(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """``-log1p(-u)`` of a float32 u that rounds to 1: the token loses whatever its logit."""

    def log_e(word: Tensor, low: Tensor) -> Tensor:
        return (-torch.log1p(-((word.double() + 0.5).float() * 2.0**-32))).log()

    return from_scores(law, seed, position, stream, log_exponential=log_e)


# ---- wrong filters and reductions ----


def temperature_ignored(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Drawn at temperature 1."""
    return plain(dataclasses.replace(law, temperature=1.0), seed, position, stream)


def maxima_in_bfloat16(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """The best score of each sub-block is stored in bfloat16 before the sub-blocks are compared."""

    def best(score: Tensor) -> Tensor:
        blocks = torch.nn.functional.pad(score, (0, -score.shape[1] % SUB_BLOCK), value=-math.inf).unflatten(1, (-1, SUB_BLOCK))
        values, index = blocks.max(dim=2)
        block = values.bfloat16().float().argmax(dim=1, keepdim=True)
        return (block * SUB_BLOCK + index.gather(1, block))[:, 0]

    return from_scores(law, seed, position, stream, best=best)


def exactly_k(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Top-k keeps k tokens, and not those tied with the last of them."""

    def kept(law: Law, z: Tensor) -> Tensor:
        return torch.zeros(len(z), dtype=torch.bool).index_fill(0, z.topk(law.top_k).indices, True)

    return from_scores(law, seed, position, stream, kept=kept)


def crossing_token_dropped(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Top-p keeps what fits into its mass, and not the token that crosses it."""

    def kept(law: Law, z: Tensor) -> Tensor:
        mass = z.softmax(dim=0)
        return torch.stack([mass[z >= value].sum() for value in z]) <= law.top_p

    return from_scores(law, seed, position, stream, kept=kept)


def top_p_before_top_k(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Top-p is measured on the whole row, not on what top-k kept."""

    def kept(law: Law, z: Tensor) -> Tensor:
        return dataclasses.replace(law, top_k=0).kept(z) & dataclasses.replace(law, top_p=1.0).kept(z)

    return from_scores(law, seed, position, stream, kept=kept)


def mass_in_float32(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Top-p's masses of the sub-blocks are added in float32 as they come, by atomics: what is kept changes from one run to the next."""

    def kept(law: Law, z: Tensor) -> Tensor:
        mass = (z - z.max()).exp().numpy()
        blocks = np.add.reduceat(mass.astype(np.float32), np.arange(0, len(mass), SUB_BLOCK))
        total = np.add.accumulate(order.permutation(blocks))[-1]  # one float32 addition after the other
        return dataclasses.replace(law, top_p=law.top_p * float(total) / float(mass.sum())).kept(z)

    order = np.random.default_rng(int(position[0]))
    return from_scores(law, seed, position, stream, kept=kept)


def negative_logits_divided(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """The repetition penalty divides negative logits too, which makes them likelier."""

    def processed(law: Law) -> Tensor:
        x = law.logits.clone()
        x[list(law.counts)] /= law.repetition
        return x / law.temperature

    return from_scores(law, seed, position, stream, processed=processed)


def prompt_counts_as_output(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    """Presence is held against tokens that occur in the prompt only."""
    return plain(dataclasses.replace(law, counts={token: max(count, 1) for token, count in law.counts.items()}), seed, position, stream)
