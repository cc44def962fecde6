"""Calls of ``sample_head``, ordinary and hostile, for the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.kernels import HeadDraw, SampleResult, merge_draws, reference
from engine.kernels.reference_head import draw
from engine.verify import hostile

TEMPERATURES = (0.0, 9e-6, 1.1e-5, 0.1, 1.0, 1.0, 5.0)
SHARDS = (1, 2, 3, 7)
Case = tuple[str, Tensor, Any, dict[str, Tensor]]  # name, x, head, the other arguments


def parameters(temperatures: Sequence[float], generator: torch.Generator) -> dict[str, Tensor]:
    """Of a row for each temperature."""
    count = len(temperatures)
    return {
        "temperature": torch.tensor(temperatures),
        "seed": torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        "position": torch.randint(0, 2**31 - 1, (count,), generator=generator, dtype=torch.int32),
        "stream": torch.randint(0, 100, (count,), generator=generator, dtype=torch.int32),
    }


def hostile_cases(vocabs: Sequence[int]) -> Iterator[Case]:
    """Any row of logits is a product: of 1 with a head of one column."""
    generator = torch.Generator().manual_seed(0)
    for vocab in vocabs:
        for i, logits in enumerate(hostile.rows(vocab, generator)):
            yield f"V={vocab}, row {i}", torch.ones(len(TEMPERATURES), 1), logits[:, None], parameters(TEMPERATURES, generator)


def products(sizes: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """``(R, K, V)``: random activations and heads whose logits have a spread of about 3."""
    generator = torch.Generator().manual_seed(1)
    for rows, depth, vocab in sizes:
        for dtype in dtypes:
            x = torch.randn(rows, depth, generator=generator).to(dtype)
            head = (torch.randn(vocab, depth, generator=generator) * 3 / depth**0.5).to(dtype)
            temperatures = [(0.0, 1.0, 0.7)[i % 3] for i in range(rows)]
            yield f"R={rows}, K={depth}, V={vocab}, {dtype}", x, head, parameters(temperatures, generator)


def shards(op: Callable[..., HeadDraw], case: Case, pieces: int) -> list[HeadDraw]:
    """The draws of a head that is cut into so many pieces."""
    _, x, head, given = case
    draws, first = [], 0
    for piece in head.tensor_split(pieces):
        draws.append(op(x, piece.contiguous(), **given, first_token=first))
        first += len(piece)
    return draws


def sampled(logits: Tensor, given: dict[str, Tensor], sample: Callable[..., SampleResult] = reference.sample) -> SampleResult:
    """What ``sample`` draws from the logits with its filters off."""
    rows = len(logits)
    off = (torch.zeros(rows, dtype=torch.int32), torch.ones(rows), torch.zeros(rows))
    top_k, top_p, min_p = (t.to(logits.device) for t in off)
    return sample(
        logits, given["temperature"], top_k, top_p, min_p, given["seed"], given["position"], given["stream"], logprobs=0
    )  # fmt: skip


def differences(name: str, got: SampleResult, want: SampleResult) -> list[str]:
    """Tokens and statuses are the same, log-probabilities close."""
    wrong = []
    for field in ("tokens", "status", "logprobs", "processed_logprobs"):
        a, b = getattr(got, field).cpu(), getattr(want, field).cpu()
        same = torch.isclose(a, b, rtol=2e-6, atol=4e-6, equal_nan=True) if a.is_floating_point() else a == b
        if a.dtype != b.dtype or a.shape != b.shape or not bool(same.all()):
            wrong.append(f"{name}: {field} is {a.tolist()[:8]}, must be {b.tolist()[:8]}")
    return wrong


def against_sample(op: Callable[..., HeadDraw], case: Case, linear: Callable[..., Any], cuts: Sequence[int] = SHARDS) -> list[str]:
    """The draws of 1, 2, 3 and 7 shards, merged in another order than theirs, against ``sample`` of the same backend's logits; undivided
    the scores are those logits' to the bit."""
    name, x, head, given = case
    logits = linear(x, [head], out=torch.empty(len(x), head.shape[0], device=x.device))
    want = sampled(logits, given)
    wrong = []
    for pieces in cuts:
        if pieces <= head.shape[0]:
            draws = shards(op, case, pieces) if pieces > 1 else [op(x, head, **given)]
            wrong += differences(f"{name}, {pieces} shards", merge_draws(draws[1:] + draws[:1]), want)
            if pieces == 1 and not torch.equal(draws[0].scores, draw(logits, **given, first_token=0).scores):
                wrong.append(f"{name}: the scores have other bits than those of the logits")
    return wrong
