"""The oracle of ``sample`` in plain PyTorch, any device: the token law written to be read (contract in ``api``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks_sample, fixed_math
from . import noise as noise_law
from .api import GREEDY_BELOW, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, EndTokens, LogitBias, Penalties, SampleResult

_SMALLEST_NORMAL = 2.0**-126  # fixed_math.log takes no smaller number: such a min_p is off
_MAX_ELEMENTS = 1 << 20  # of a group of rows worked on at once: bounds the memory of the noise


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    logprobs: int | None = None,
    workspace: Any = None,
) -> SampleResult:
    """See ``api.sample``."""
    checks_sample.sample(
        logits, temperature, top_k, top_p, min_p, seed, position, stream, penalties, bias, end_tokens, allowed, logprobs
    )  # fmt: skip
    checks_sample.values(logits.shape[1], temperature, top_p, min_p, penalties, bias, end_tokens)
    results = []
    for part, raw, x in parts(logits, position, penalties, bias, end_tokens, allowed):
        drawn_from = distribution(raw, x, temperature[part], top_k[part], top_p[part], min_p[part])
        results.append(_sample(raw, drawn_from, seed[part], position[part], stream[part], logprobs))
    columns = (None if column[0] is None else torch.cat(column) for column in zip(*results, strict=True))
    return SampleResult(*columns)  # type: ignore[arg-type]


def parts(
    logits: Tensor,
    position: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A few rows at a time: which, as given, and after ``adjust``."""
    for part in torch.arange(len(logits), device=logits.device).split(max(1, _MAX_ELEMENTS // logits.shape[1])):
        raw = logits[part].float()
        yield part, raw, adjust(raw, part.tolist(), position, penalties, bias, end_tokens, allowed)


def adjust(
    raw: Tensor,
    rows: list[int],
    position: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
) -> Tensor:
    """Steps 1 and 2 of the contract: ``raw`` (the given rows of the call) after penalties, bias, end tokens and mask."""
    x = raw.clone()
    for i, r in enumerate(rows):
        if penalties is not None:
            ids, (count,) = _entries(penalties.token, penalties.start, r, penalties.counts)
            value, repetition = x[i, ids], penalties.repetition[r]
            value = torch.where(value > 0, value / repetition, value * repetition)
            value = torch.where(count > 0, value - penalties.frequency[r] * count.float(), value)
            x[i, ids] = torch.where(count > 0, value - penalties.presence[r], value)
        if bias is not None:
            ids, (addend,) = _entries(bias.token, bias.start, r, bias.bias)
            x[i, ids] = torch.where(addend == -math.inf, -math.inf, x[i, ids] + addend)
        if end_tokens is not None and bool(position[r] < end_tokens.min_position[r]):
            x[i, _entries(end_tokens.token, end_tokens.start, r)[0]] = -math.inf
    if allowed is not None:
        bit = torch.arange(raw.shape[1], device=raw.device)
        x = torch.where((allowed[rows][:, bit >> 5] >> (bit & 31).int() & 1).bool(), x, -math.inf)
    return x


def _entries(token: Tensor, start: Tensor, row: int, *more: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The ids of a row's list, and what goes with them."""
    mine = slice(int(start[row]), int(start[row + 1]))
    return token[mine].long(), tuple(t[mine] for t in more)


class Distribution(NamedTuple):
    """What some rows are drawn from."""

    z: Tensor  # float32 [R, V]
    largest: Tensor  # float32 [R, 1]: of z
    weight: Tensor  # int64 [R, V]: of z - largest, as if nothing were filtered; 0 in a row without a token or with +inf
    kept: Tensor  # bool [R, V]; in a greedy row all that can be drawn, in one with +inf those
    greedy: Tensor  # bool [R, 1]
    status: Tensor  # int32 [R]


def distribution(raw: Tensor, x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Distribution:
    """Steps 3 to 6 for a few rows: ``raw`` as given, ``x`` after ``adjust``."""
    greedy = (temperature < GREEDY_BELOW)[:, None]
    z = x / torch.where(greedy, 1.0, temperature[:, None])
    status = torch.full_like(top_k, STATUS_OK)
    status[(z == -math.inf).all(dim=1)] = STATUS_NOTHING_ALLOWED
    status[raw.isnan().any(dim=1)] = STATUS_NAN

    largest = z.amax(dim=1, keepdim=True)
    # Where the largest is +inf only such tokens count; rows without a token get any finite number, and are dropped in the end.
    ok = (status == STATUS_OK)[:, None]
    weight = fixed_math.weight(torch.where(ok & (largest < math.inf), z - largest, -math.inf))
    kept = _filter(z, largest, weight, top_k, top_p, min_p) & (z > -math.inf)
    kept = torch.where(greedy, z > -math.inf, kept)
    kept = torch.where(largest == math.inf, z == largest, kept)
    return Distribution(z, largest, weight, kept, greedy, status)


def _sample(raw: Tensor, d: Distribution, seed: Tensor, position: Tensor, stream: Tensor, logprobs: int | None) -> SampleResult:
    """Step 7 for a few rows, and their log-probabilities."""
    z, largest, weight, kept, greedy, status = d
    score = z - noise_law.noise(seed, position, stream, raw.shape[1]).log_exponential
    token = torch.where(greedy, z, score.masked_fill(~kept, -math.inf)).argmax(dim=1)  # the first of several maxima
    ok = status == STATUS_OK
    token = torch.where(ok, token, -1)
    if logprobs is None:
        return SampleResult(token, status)
    processed = torch.where(
        kept, z.double() - largest - ((weight * kept).sum(dim=1, keepdim=True) * 2.0**-fixed_math.WEIGHT_BITS).log(), -math.inf
    )
    processed = torch.where(largest == math.inf, _log_softmax(z), processed)
    chosen: list[Tensor] = []
    tops: list[Tensor] = []
    for values, log_probability in ((raw, _log_softmax(raw)), (z.masked_fill(~kept, -math.inf), processed)):
        chosen.append(torch.where(ok, log_probability.gather(1, token.clamp(min=0)[:, None])[:, 0], math.nan).float())
        tops += _top(values, log_probability, ok, logprobs)
    return SampleResult(token, status, *chosen, *tops)


def _filter(z: Tensor, largest: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens top-k, top-p and min-p keep, bool ``[R, V]``: those with ``z`` at or above the largest of three thresholds."""
    vocab = z.shape[1]
    ordered = z.sort(dim=1, descending=True)
    threshold = torch.full_like(largest, -math.inf)

    by_k = (top_k > 0) & (top_k < vocab)
    kth = ordered.values.gather(1, top_k.clamp(1, vocab).long()[:, None] - 1)
    threshold = torch.where(by_k[:, None], kth, threshold)

    mass = torch.where(ordered.values >= threshold, weight.gather(1, ordered.indices), 0).cumsum(dim=1)
    # The mass of the tokens above each, ties not among them: of equal values the first has it.
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1)
    is_first = torch.cat([torch.ones_like(kth, dtype=torch.bool), ordered.values[:, 1:] < ordered.values[:, :-1]], dim=1)
    above = torch.where(is_first, before, -1).cummax(dim=1).values
    stays = above < fixed_math.mass_needed(mass[:, -1:], top_p[:, None])
    smallest = torch.where(stays, ordered.values, math.inf).amin(dim=1, keepdim=True)
    threshold = torch.where((top_p < 1)[:, None], torch.maximum(threshold, smallest), threshold)

    by_min = (min_p >= _SMALLEST_NORMAL)[:, None]
    log_min_p = fixed_math.log(torch.where(by_min, min_p[:, None], 1.0))
    threshold = torch.where(by_min, torch.maximum(threshold, largest + log_min_p), threshold)
    return z >= threshold


def _log_softmax(x: Tensor) -> Tensor:
    """Natural log-softmax in float64; with +inf entries, those share the probability evenly."""
    infinite = (x == math.inf).sum(dim=1, keepdim=True)
    among_infinite = torch.where(x == math.inf, -infinite.double().log(), -math.inf)
    return torch.where(infinite > 0, among_infinite, x.double().log_softmax(dim=1))


def _top(values: Tensor, log_probability: Tensor, ok: Tensor, n: int) -> list[Tensor]:
    """The ``n`` largest of ``values`` (lowest id first on ties): tokens int64 and log-probabilities float32 ``[R, n]``."""
    if n == 0:
        return []
    ordered = values.sort(dim=1, descending=True, stable=True)
    tokens = ordered.indices[:, :n]
    there = ok[:, None] & (ordered.values[:, :n] > -math.inf)
    return [torch.where(there, tokens, -1), torch.where(there, log_probability.gather(1, tokens), -math.inf).float()]
