"""The oracle of ``beam_select`` in plain PyTorch, any device, written to be read (contract in ``api``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks_sample, fixed_math
from . import noise as noise_law
from .api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, BeamResult, EndTokens, LogitBias, Penalties
from .reference_sample import adjust


def beam_select(
    logits: Tensor,
    scores: Tensor,
    group_start: Tensor,
    num_candidates: int,
    temperature: Tensor,
    top_k: Tensor,
    position: Tensor,
    *,
    seed: Tensor | None = None,
    stream: Tensor | None = None,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    workspace: Any = None,
) -> BeamResult:
    """See ``api.beam_select``."""
    checks_sample.beam_select(
        logits, scores, group_start, num_candidates, temperature, top_k, position, seed, stream, penalties, bias, end_tokens, allowed
    )  # fmt: skip
    rows, vocab = logits.shape
    checks_sample.beam_values(vocab, scores, group_start, temperature, penalties, bias, end_tokens)
    log_probability, status = _log_softmax(logits.float(), temperature, top_k)
    log_probability = adjust(log_probability, list(range(rows)), position, penalties, bias, end_tokens, allowed)
    total = log_probability + scores[:, None]
    if seed is not None and stream is not None:
        total = total - noise_law.noise(seed, position, stream, vocab).log_exponential
    total[status != STATUS_OK] = -math.inf
    status[(status == STATUS_OK) & (total == -math.inf).all(dim=1) | (scores == -math.inf)] = STATUS_NOTHING_ALLOWED

    starts = group_start.tolist()
    shape = (len(starts) - 1, num_candidates)
    best = torch.full(shape, -math.inf, device=logits.device)
    tokens = torch.full(shape, -1, dtype=torch.int64, device=logits.device)
    parents = torch.full(shape, -1, dtype=torch.int32, device=logits.device)
    logprobs = torch.full(shape, -math.inf, device=logits.device)
    for g, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        ordered = total[first:last].flatten().sort(descending=True, stable=True)  # stable: ties by flat index
        n = min(num_candidates, int((ordered.values > -math.inf).sum()))
        flat = ordered.indices[:n]
        best[g, :n] = ordered.values[:n]
        tokens[g, :n] = flat % vocab
        parents[g, :n] = (first + flat // vocab).int()
        logprobs[g, :n] = log_probability[first:last].flatten()[flat]
    return BeamResult(best, tokens, parents, logprobs, status)


def _log_softmax(x: Tensor, temperature: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2 of the contract, float32 ``[R, V]``, and the status of each row."""
    vocab = x.shape[1]
    z = x / temperature[:, None]
    status = torch.full_like(top_k, STATUS_OK)
    status[(z == -math.inf).all(dim=1)] = STATUS_NOTHING_ALLOWED
    status[x.isnan().any(dim=1)] = STATUS_NAN
    ok = (status == STATUS_OK)[:, None]
    largest = z.amax(dim=1, keepdim=True)
    by_k = ((top_k > 0) & (top_k < vocab))[:, None]
    kth = z.sort(dim=1, descending=True).values.gather(1, top_k.clamp(1, vocab).long()[:, None] - 1)
    kept = ok & (z >= torch.where(by_k, kth, -math.inf)) & (z > -math.inf)
    weight = fixed_math.weight(torch.where(kept & (largest < math.inf), z - largest, -math.inf))
    mass = weight.sum(dim=1, keepdim=True).float() * 2.0**-fixed_math.WEIGHT_BITS
    log_mass = fixed_math.log(torch.where(mass > 0, mass, 1.0))
    infinite = (z == math.inf).sum(dim=1, keepdim=True)
    among_infinite = torch.where(z == math.inf, -fixed_math.log(infinite.clamp(min=1).float()), -math.inf)
    plain = torch.where(kept, (z - largest) - log_mass, -math.inf)
    return torch.where(infinite > 0, among_infinite, plain), status
