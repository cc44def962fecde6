"""Draw one token for every row of a step, all rows in one kernel call."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import STATUS_NAN, STATUS_NOTHING_ALLOWED, EndTokens, LogitBias, Ops, Penalties, SampleResult
from ..request import Drawn, Request
from .controls import forbidding, token_mask

_DTYPES = {"i": torch.int32, "f": torch.float32}


def as_int64(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed (tensors have no dependable uint64)."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample_rows(ops: Ops, logits: Tensor, rows: list[Request]) -> list[Drawn]:
    """Draw for ``rows[r]`` from ``logits[r]`` (float32 ``[R, V]``): the token's position is the request's present length.

    Rows of requests with a ``logits_processor`` are overwritten by what it makes of them.
    """
    num_top = max(request.params.logprobs for request in rows)
    processed = [r for r, request in enumerate(rows) if request.controls.processors]
    own = logits[processed] if processed else None
    errors = {r: error for r in processed if (error := _process(logits[r], rows[r])) is not None}
    result: SampleResult = ops.sample(
        logits,
        *_law(rows),
        penalties=_penalties(rows),
        bias=_bias(rows),
        end_tokens=_end_tokens(rows),
        allowed=_allowed(rows, logits.shape[1]),
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
            drawn[r] = Drawn(-1, math.nan, math.nan, error=errors.get(r) or _failure(status, rows[r]))
    return drawn


def _law(rows: list[Request]) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seed, position and stream of each row."""
    controls = [request.controls for request in rows]
    temperature, top_p, min_p = torch.tensor(
        [[c.temperature for c in controls], [c.top_p for c in controls], [c.min_p for c in controls]], dtype=torch.float32
    )
    top_k, position, stream = torch.tensor(
        [[c.top_k for c in controls], [len(request.tokens) for request in rows], [request.stream for request in rows]], dtype=torch.int32
    )
    seed = torch.tensor([as_int64(request.seed) for request in rows], dtype=torch.int64)
    return temperature, top_k, top_p, min_p, seed, position, stream


def _tensor(column: array[int] | array[float]) -> Tensor:
    """Its memory as a tensor."""
    dtype = _DTYPES[column.typecode]
    return torch.frombuffer(column, dtype=dtype) if len(column) else torch.empty(0, dtype=dtype)


def _lists(rows: Sequence[tuple[array, ...]]) -> list[Tensor]:
    """The columns of lists that rows own, end to end, and last where each row's begin: int32 ``[R + 1]``."""
    columns = [array(column.typecode) for column in rows[0]]
    start = array("i", [0])
    for row in rows:
        for whole, part in zip(columns, row, strict=True):
            whole.extend(part)
        start.append(len(columns[0]))
    return [_tensor(column) for column in (*columns, start)]


_NO_IDS, _NO_NUMBERS = array("i"), array("f")


def _penalties(rows: list[Request]) -> Penalties | None:
    if all(request.history is None for request in rows):
        return None
    controls = [request.controls for request in rows]
    return Penalties(
        torch.tensor([c.repetition for c in controls], dtype=torch.float32),
        torch.tensor([c.presence for c in controls], dtype=torch.float32),
        torch.tensor([c.frequency for c in controls], dtype=torch.float32),
        *_lists([(_NO_IDS, _NO_IDS) if request.history is None else (request.history.tokens, request.history.counts) for request in rows]),
    )


def _bias(rows: list[Request]) -> LogitBias | None:
    lists = [request.controls.bias(request.tokens) for request in rows]
    return LogitBias(*_lists(lists)) if any(len(tokens) for tokens, _ in lists) else None


def _end_tokens(rows: list[Request]) -> EndTokens | None:
    """Only of requests that are still too short."""
    short = [len(request.tokens) < request.controls.min_position for request in rows]
    if not any(short):
        return None
    token, start = _lists([(request.controls.end_tokens if early else _NO_IDS,) for request, early in zip(rows, short, strict=True)])
    return EndTokens(token, torch.tensor([request.controls.min_position for request in rows], dtype=torch.int32), start)


def _allowed(rows: list[Request], vocab_size: int) -> Tensor | None:
    """The bits of the tokens that may be drawn, int32 ``[R, ceil(V / 32)]``; None where no row is restricted."""
    if all(request.matcher is None and request.controls.allowed is None for request in rows):
        return None
    allowed = torch.full((len(rows), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for row, request in zip(allowed, rows, strict=True):
        if request.controls.allowed is not None:
            row &= request.controls.allowed
        if request.matcher is not None:
            row &= request.matcher.mask
    return allowed


def _process(row: Tensor, request: Request) -> str | None:
    """Overwrite ``row`` by what the request's processors make of it; a sentence if they fail."""
    if bool(row.isnan().any()):
        return None  # the kernel will say so
    position = len(request.tokens)
    logits = row.clone()
    for processor in request.controls.processors:
        try:
            logits = processor(list(request.tokens), logits)
        except Exception as error:
            return f"logits_processor raised {type(error).__name__} at position {position}: {' '.join(str(error).split())}"
        if not isinstance(logits, Tensor):
            return f"logits_processor returned a {type(logits).__name__} at position {position}; it must return a tensor"
        if logits.dtype != torch.float32 or logits.shape != row.shape or logits.device != row.device:
            return (
                f"logits_processor returned {logits.dtype} {list(logits.shape)} on {logits.device} at position {position}; it must return "
                f"torch.float32 {list(row.shape)} on {row.device}"
            )
    if bool(logits.isnan().any()):
        return f"logits_processor returned NaN at position {position}"
    row.copy_(logits.detach())
    return None


def _restore_raw(ops: Ops, own: Tensor, processed: list[int], rows: list[Request], result: SampleResult, num_top: int) -> None:
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
    raw = ops.sample(own, *_law([rows[r] for r in processed]), allowed=allowed, logprobs=num_top)
    result.logprobs[processed] = torch.where(possible, raw.logprobs, -math.inf)
    if result.top_tokens is not None and result.top_logprobs is not None:
        result.top_tokens[processed] = raw.top_tokens
        result.top_logprobs[processed] = raw.top_logprobs


def _add_top(drawn: list[Drawn], rows: list[Request], result: SampleResult) -> None:
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


def _failure(status: int, request: Request) -> str:
    """Why a row gave no token, as one sentence."""
    position = len(request.tokens)
    if status == STATUS_NAN:
        return f"the model's logits for position {position} hold NaN"
    if status != STATUS_NOTHING_ALLOWED:
        return f"no token can be drawn at position {position}: the kernel refuses a parameter of the request (status {status})"
    names = forbidding(request)
    why = f"{' and '.join(names)} leave{'s' if len(names) == 1 else ''} none with a logit above -inf" if names else "every logit is -inf"
    return f"no token can be drawn at position {position}: {why}"
