"""The rows of a step in the kernels' form: what the options of each ask for, in lists that rows own; custom processors."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..columns import tensor_of
from ..kernels import STATUS_NAN, STATUS_NOTHING_ALLOWED, EndTokens, LogitBias, Penalties
from ..request import TokenSequence
from .controls import forbidding


def as_int64(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed (tensors have no dependable uint64)."""
    return seed - 2**64 if seed >= 2**63 else seed


def _join(rows: Sequence[tuple[array, ...]]) -> list[Tensor]:
    """The columns of lists that rows own, end to end, and last where each row's begin: int32 ``[R + 1]``."""
    columns = [array(column.typecode) for column in rows[0]]
    start = array("i", [0])
    for row in rows:
        for whole, part in zip(columns, row, strict=True):
            whole.extend(part)
        start.append(len(columns[0]))
    return [tensor_of(column) for column in (*columns, start)]


_NO_IDS = array("i")


def lists(rows: Sequence[TokenSequence], vocab_size: int, penalised: Sequence[Mapping[int, float]] | None = None) -> dict[str, Any]:
    """``penalties``, ``bias``, ``end_tokens`` and ``allowed`` of the rows, as keyword arguments of ``sample`` and ``beam_select``.

    ``penalised``: for each row, what is subtracted from tokens besides.
    """
    if not penalised and all([row.controls.is_bare(row) for row in rows]):
        return {}
    return {
        "penalties": _penalties(rows),
        "bias": _bias(rows, penalised or [{}] * len(rows)),
        "end_tokens": _end_tokens(rows),
        "allowed": _allowed(rows, vocab_size),
    }


def _penalties(rows: Sequence[TokenSequence]) -> Penalties | None:
    if all(row.history is None for row in rows):
        return None
    controls = [row.controls for row in rows]
    return Penalties(
        torch.tensor([c.repetition for c in controls], dtype=torch.float32),
        torch.tensor([c.presence for c in controls], dtype=torch.float32),
        torch.tensor([c.frequency for c in controls], dtype=torch.float32),
        *_join([(_NO_IDS, _NO_IDS) if row.history is None else (row.history.tokens, row.history.counts) for row in rows]),
    )


def _bias(rows: Sequence[TokenSequence], penalised: Sequence[Mapping[int, float]]) -> LogitBias | None:
    columns = [row.controls.bias(row, penalties) for row, penalties in zip(rows, penalised, strict=True)]
    return LogitBias(*_join(columns)) if any(len(tokens) for tokens, _ in columns) else None


def _end_tokens(rows: Sequence[TokenSequence]) -> EndTokens | None:
    """Only of requests that are still too short."""
    short = [row.num_tokens < row.controls.min_position for row in rows]
    if not any(short):
        return None
    token, start = _join([(row.controls.end_tokens if early else _NO_IDS,) for row, early in zip(rows, short, strict=True)])
    return EndTokens(token, torch.tensor([row.controls.min_position for row in rows], dtype=torch.int32), start)


def _allowed(rows: Sequence[TokenSequence], vocab_size: int) -> Tensor | None:
    """The bits of the tokens that may be drawn, int32 ``[R, ceil(V / 32)]``; None where no row is restricted."""
    masks = [[row.controls.allowed_next(row.num_new_tokens), None if row.matcher is None else row.matcher.mask] for row in rows]
    if all(mask is None for both in masks for mask in both):
        return None
    allowed = torch.full((len(rows), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for words, both in zip(allowed, masks, strict=True):
        for mask in both:
            if mask is not None:
                words &= mask
    return allowed


def process(row: Tensor, request: TokenSequence) -> str | None:
    """Overwrite ``row`` by what the request's processors make of it; a sentence if they fail."""
    if bool(row.isnan().any()):
        return None  # the kernel will say so
    position = request.num_tokens
    try:
        logits = row.clone()
        for processor in request.controls.processors:
            logits = processor(list(request.tokens), logits)
            if not isinstance(logits, Tensor):
                return f"logits_processor returned a {type(logits).__name__} at position {position}; it must return a tensor"
            if logits.layout != row.layout:
                return f"logits_processor returned a {logits.layout} tensor at position {position}; it must be a dense one"
            if logits.dtype != torch.float32 or logits.shape != row.shape or logits.device != row.device:
                return (
                    f"logits_processor returned {logits.dtype} {list(logits.shape)} on {logits.device} at position {position}; it must "
                    f"return torch.float32 {list(row.shape)} on {row.device}"
                )
        if bool(logits.isnan().any()):
            return f"logits_processor returned NaN at position {position}"
        row.copy_(logits.detach())
    except (Exception, SystemExit) as error:  # exit() in a processor is its request's end and nobody else's
        return f"logits_processor raised {type(error).__name__} at position {position}: {said(error)}"
    return None


def said(error: BaseException) -> str:
    """An error's message on one line, cut to a bearable length; it is somebody else's object and may fail at that too."""
    try:
        return " ".join(str(error).split())[:300]
    except Exception:
        return "(without a message)"


def failure(status: int, request: TokenSequence) -> str:
    """Why a row gave no token, as one sentence."""
    position = request.num_tokens
    if status == STATUS_NAN:
        return f"the model's logits for position {position} hold NaN"
    if status != STATUS_NOTHING_ALLOWED:
        return f"no token can be drawn at position {position}: the kernel refuses a parameter of the request (status {status})"
    names = forbidding(request)
    why = f"{' and '.join(names)} leave{'s' if len(names) == 1 else ''} none with a logit above -inf" if names else "every logit is -inf"
    return f"no token can be drawn at position {position}: {why}"
