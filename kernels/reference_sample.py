"""The oracle of ``sample`` in plain PyTorch, any device: the token law written to be read (contract in ``api``)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks_sample
from . import noise as noise_law
from .api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, SampleResult

GREEDY_BELOW = 1e-5  # temperatures below this are greedy
_MAX_ELEMENTS = 1 << 20  # of a group of rows worked on at once: bounds the memory of the noise


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    repetition_penalty: Tensor | None = None,
    history: Tensor | None = None,
    history_start: Tensor | None = None,
) -> SampleResult:
    """See ``api.sample``. Logprobs are NaN where there is no token; +inf logits share the probability of the raw row evenly."""
    checks_sample.sample(logits, temperature, top_k, seed, position, stream, repetition_penalty, history, history_start)
    _check_rows("temperature", temperature, (temperature >= 0) & temperature.isfinite(), "finite and >= 0")
    z = logits
    if repetition_penalty is not None and history is not None and history_start is not None:
        z = _penalise(logits, repetition_penalty, history, history_start)
    results = []
    rows = max(1, _MAX_ELEMENTS // logits.shape[1])
    for part in torch.arange(len(logits), device=logits.device).split(rows):
        per_row = (t[part] for t in (temperature, top_k, seed, position, stream))
        results.append(_sample(logits[part], z[part], *per_row))
    return SampleResult(*(torch.cat(column) for column in zip(*results, strict=True)))


def _sample(
    logits: Tensor, penalised: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor, position: Tensor, stream: Tensor
) -> SampleResult:
    vocab = logits.shape[1]
    greedy = (temperature < GREEDY_BELOW)[:, None]
    z = penalised / torch.where(greedy, 1.0, temperature[:, None])

    filtered = (top_k > 0) & (top_k < vocab)
    threshold = torch.full_like(z[:, :1], -math.inf)
    if bool(filtered.any()):
        descending = z[filtered].sort(dim=1, descending=True).values
        threshold[filtered] = descending.gather(1, top_k[filtered].long()[:, None] - 1)
    kept = (z >= threshold) & (z > -math.inf)

    score = z - noise_law.noise(seed, position, stream, vocab).log_exponential
    token = torch.where(greedy, z, score.masked_fill(~kept, -math.inf)).argmax(dim=1)  # the first of several maxima

    status = torch.full_like(top_k, STATUS_OK)
    status[(z == -math.inf).all(dim=1)] = STATUS_NOTHING_ALLOWED
    status[logits.isnan().any(dim=1)] = STATUS_NAN
    ok = status == STATUS_OK
    return SampleResult(torch.where(ok, token, -1), torch.where(ok, _logprob(logits, token), math.nan), status)


def _logprob(logits: Tensor, token: Tensor) -> Tensor:
    """Natural log-softmax of raw rows at ``token``, float32 ``[R]``; with +inf entries, those share the probability evenly."""
    chosen = logits.gather(1, token[:, None])[:, 0]
    plain = logits.double().log_softmax(dim=1).gather(1, token[:, None])[:, 0]
    infinite = (logits == math.inf).sum(dim=1)
    among_infinite = torch.where(chosen == math.inf, -infinite.double().log(), -math.inf)
    return torch.where(infinite > 0, among_infinite, plain).float()


def _penalise(logits: Tensor, penalty: Tensor, history: Tensor, history_start: Tensor) -> Tensor:
    """A copy of ``logits`` with the distinct ids of each row's history divided (if positive) or multiplied by the row's penalty."""
    _check_rows("repetition_penalty", penalty, (penalty > 0) & penalty.isfinite(), "finite and > 0")
    start, size = history_start.tolist(), len(history)
    if start[0] < 0 or start[-1] > size or any(a > b for a, b in zip(start, start[1:], strict=False)):
        raise ValueError(f"history_start must rise from >= 0 to <= {size}, the length of history, got {start}")
    used = history[start[0] : start[-1]]
    _check_rows("history", used, (used >= 0) & (used < logits.shape[1]), f"in [0, {logits.shape[1]})")
    out = logits.clone()
    for row, (first, last) in enumerate(zip(start, start[1:], strict=False)):
        ids = history[first:last].long().unique()
        value, p = out[row, ids], penalty[row]
        out[row, ids] = torch.where(value > 0, value / p, value * p)
    return out


def _check_rows(name: str, values: Tensor, good: Tensor, meaning: str) -> None:
    """Raise ``ValueError`` unless all of ``good``."""
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise ValueError(f"{name} must be {meaning}, got {values[at].item()} at {at}")
