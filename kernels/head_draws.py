"""The draws of ``sample_head`` from the shards of a vocabulary made one: argmax and sums decompose, so the result is exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from . import fixed_math
from .api import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, HeadDraw, SampleResult

_NO_TOKEN = torch.iinfo(torch.int64).max  # behind every token


def merge_draws(draws: Sequence[HeadDraw]) -> SampleResult:
    """The token of each row from what every shard of the vocabulary says of it, in any order, on one device; with log-probabilities, as
    ``sample`` gives them with ``logprobs=0``.

    The best score wins, the lowest token on ties. A row in which a shard met NaN or a bad parameter has that status; one in which no shard
    has a token has STATUS_NOTHING_ALLOWED. Nothing is read on the host, and a row's result does not depend on the others. The result of a
    single shard shares its memory.
    """
    if not draws:
        raise ValueError("draws must hold those of at least one shard, got none")
    if len(draws) == 1:
        return SampleResult(draws[0].tokens, draws[0].status, *draws[0].logprobs)
    statuses = torch.stack([draw.status for draw in draws])
    status = torch.where((statuses == STATUS_OK).any(dim=0), STATUS_OK, STATUS_NOTHING_ALLOWED)
    for worse in (STATUS_NAN, STATUS_BAD_PARAMETER):
        status = torch.where((statuses == worse).any(dim=0), worse, status)
    ok = status == STATUS_OK

    scores = torch.stack([draw.scores for draw in draws])
    tokens = torch.stack([draw.tokens for draw in draws])
    candidate = (scores == scores.amax(dim=0)) & (tokens >= 0)
    winner = torch.where(candidate, tokens, _NO_TOKEN).min(dim=0)

    # To the shard's own log-probability comes the shard's share. The fixed exponential and logarithm, one shard after the other: PyTorch's
    # own may round by the place of a row.
    largest = torch.stack([draw.largest for draw in draws])  # [shards, 2, R]
    share = fixed_math.weight(below(largest, largest.amax(dim=0))).float() * 2.0**-fixed_math.WEIGHT_BITS
    mass = torch.stack([draw.mass for draw in draws])
    total = reduce(torch.add, mass * share)
    of_winner = winner.indices.expand(1, 2, -1)
    own, own_largest, own_mass = (t.gather(0, of_winner)[0] for t in (torch.stack([d.logprobs for d in draws]), largest, mass))
    log_share = below(own_largest, largest.amax(dim=0)) + (_log(own_mass) - _log(total))
    logprobs = torch.where(ok, own + log_share, torch.nan)
    return SampleResult(torch.where(ok, winner.values, -1), status.to(torch.int32), *logprobs)


def below(x: Tensor, largest: Tensor) -> Tensor:
    """``x - largest`` for ``x <= largest``, 0 where they are equal (also where both are infinite)."""
    return torch.where(x == largest, 0.0, x - largest)


def _log(mass: Tensor) -> Tensor:
    """Its logarithm; of the zeros of shards without a token, anything finite."""
    return fixed_math.log(mass.clamp(min=1.0))
