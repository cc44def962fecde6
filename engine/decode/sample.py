"""Draw one token for every row of a step, all rows in one kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import STATUS_NAN, Ops, SampleResult
from ..request import Request


def as_int64(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed (tensors have no dependable uint64)."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample_rows(ops: Ops, logits: Tensor, rows: list[Request]) -> SampleResult:
    """Draw for ``rows[r]`` from ``logits[r]``: the token's position is the request's present length."""
    penalties = history = history_start = None
    if any(request.history is not None for request in rows):
        ids: list[int] = []
        starts = [0]
        for request in rows:
            ids += request.history or ()
            starts.append(len(ids))
        penalties = torch.tensor([request.params.repetition_penalty for request in rows], dtype=torch.float32)
        history = torch.tensor(ids, dtype=torch.int32)
        history_start = torch.tensor(starts, dtype=torch.int32)
    result: SampleResult = ops.sample(
        logits,
        torch.tensor([request.params.draw_temperature for request in rows], dtype=torch.float32),
        torch.tensor([request.params.draw_top_k for request in rows], dtype=torch.int32),
        torch.tensor([as_int64(request.seed) for request in rows], dtype=torch.int64),
        torch.tensor([len(request.tokens) for request in rows], dtype=torch.int32),
        torch.tensor([request.stream for request in rows], dtype=torch.int32),
        repetition_penalty=penalties,
        history=history,
        history_start=history_start,
    )
    return result


def failure(status: int, position: int) -> str:
    """Why a row gave no token, as one sentence."""
    if status == STATUS_NAN:
        return f"the model's logits for position {position} hold NaN"
    return f"no token can be drawn at position {position}: every logit is -inf"
