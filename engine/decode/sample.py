"""Draw one token for every row of a step, all rows in one kernel call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Ops, SampleResult
from ..request import Drawn, Lookahead, Request
from .controls import token_mask
from .rows import as_int64, failure, lists, process


def sample_rows(ops: Ops, logits: Tensor, rows: Sequence[Request | Lookahead]) -> list[Drawn]:
    """Draw for ``rows[r]`` from ``logits[r]`` (float32 ``[R, V]``): the token's position is the request's present length.

    Rows of requests with a ``logits_processor`` are overwritten by what it makes of them.
    """
    num_top = max(request.params.logprobs for request in rows)
    processed = [r for r, request in enumerate(rows) if request.controls.processors]
    own = logits[processed] if processed else None
    errors = {r: error for r in processed if (error := process(logits[r], rows[r])) is not None}
    result: SampleResult = ops.sample(
        logits,
        *law(rows),
        **lists(rows, logits.shape[1]),
        logprobs=num_top,
    )
    if own is not None:
        _restore_raw(ops, own, processed, rows, result, num_top)
    assert result.logprobs is not None and result.processed_logprobs is not None
    drawn = [
        Drawn(token, raw, after)
        for token, raw, after in zip(result.tokens.tolist(), result.logprobs.tolist(), result.processed_logprobs.tolist(), strict=True)
    ]
    if num_top:
        _add_top(drawn, rows, result)
    for r, status in enumerate(result.status.tolist()):
        if status or r in errors:
            drawn[r] = Drawn(-1, math.nan, math.nan, error=errors.get(r) or failure(status, rows[r]))
    return drawn


def law(rows: Sequence[Request | Lookahead]) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seed, position and stream of each row."""
    controls = [request.controls for request in rows]
    temperature, top_p, min_p = torch.tensor(
        [[c.temperature for c in controls], [c.top_p for c in controls], [c.min_p for c in controls]], dtype=torch.float32
    )
    top_k, position, stream = torch.tensor(
        [[c.top_k for c in controls], [request.num_tokens for request in rows], [request.stream for request in rows]], dtype=torch.int32
    )
    seed = torch.tensor([as_int64(request.seed) for request in rows], dtype=torch.int64)
    return temperature, top_k, top_p, min_p, seed, position, stream


def _restore_raw(
    ops: Ops, own: Tensor, processed: list[int], rows: Sequence[Request | Lookahead], result: SampleResult, num_top: int
) -> None:
    """Raw log-probabilities of rows that processors changed, from the model's ``own`` rows, into ``result``.

    The kernel takes them from the rows that it is given. So it is given the model's rows, with the token already drawn as the only one
    allowed; one that the model rules out has -inf.
    """
    assert result.logprobs is not None
    tokens = result.tokens[processed]
    possible = (tokens >= 0) & (own.gather(1, tokens.clamp(min=0)[:, None])[:, 0] > -math.inf)
    allowed = torch.full((len(processed), -(-own.shape[1] // 32)), -1, dtype=torch.int32)
    for row, token, one in zip(allowed, tokens.tolist(), possible.tolist(), strict=True):
        if one:
            row.copy_(token_mask([token], own.shape[1]))
    raw = ops.sample(own, *law([rows[r] for r in processed]), allowed=allowed, logprobs=num_top)
    result.logprobs[processed] = torch.where(possible, raw.logprobs, -math.inf)
    if result.top_tokens is not None and result.top_logprobs is not None:
        result.top_tokens[processed] = raw.top_tokens
        result.top_logprobs[processed] = raw.top_logprobs


def _add_top(drawn: list[Drawn], rows: Sequence[Request | Lookahead], result: SampleResult) -> None:
    assert result.top_tokens is not None and result.top_logprobs is not None
    assert result.processed_top_tokens is not None and result.processed_top_logprobs is not None
    lists = (result.top_tokens, result.top_logprobs, result.processed_top_tokens, result.processed_top_logprobs)
    for r, (tokens, values, processed_tokens, processed_values) in enumerate(zip(*(t.tolist() for t in lists), strict=True)):
        n = rows[r].params.logprobs
        if n:
            drawn[r] = drawn[r]._replace(top=_ranked(tokens[:n], values), processed_top=_ranked(processed_tokens[:n], processed_values))


def _ranked(tokens: list[int], logprobs: list[float]) -> dict[int, float]:
    """Token to log-probability, best first; -1 is no token."""
    return {token: logprob for token, logprob in zip(tokens, logprobs, strict=False) if token >= 0}
