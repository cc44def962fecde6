"""Rows of logits, ordinary and hostile, each with controls drawn at random: what every backend must answer as the oracle does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import EndTokens, LogitBias, Penalties
from .laws import pack

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (position, token) whose word, for seed 7 and stream 1, lies within 128 of 2^32 or of 0; found by search. Where a float32 uniform is made
# of the word by rounding, it becomes 1 there.
LARGE_WORDS = ((226, 31449), (2264, 39205), (3216, 20430))
SMALL_WORDS = ((379, 21310), (487, 2256), (733, 8225), (2532, 37288), (3253, 21957), (3369, 19913))
WORDS_KEY = (7, 1)


def rows(vocab: int, generator: torch.Generator) -> Tensor:
    """Ordinary rows, ties, constants, infinities, NaN, subnormal and huge values: float32 ``[N, vocab]``. The tests of ``sample`` use them
    too."""

    def normal(scale: float) -> Tensor:
        return torch.randn(vocab, generator=generator) * scale

    def some(row: Tensor, value: float, count: int) -> Tensor:
        row[torch.randperm(vocab, generator=generator)[:count]] = value
        return row

    one_block = normal(1.0)
    one_block[vocab // 2 // 128 * 128 :][:128] += 20
    by_rank = -1.8 * torch.arange(1, vocab + 1).float().log()  # as a language model's
    nothing = torch.full((vocab,), -INF)
    return torch.stack(
        [
            normal(3.0),
            normal(0.3),
            normal(3.0).bfloat16().float(),  # many ties
            torch.zeros(vocab),
            torch.where(normal(1.0) > 0, 0.0, -0.0),
            nothing,
            torch.where(torch.rand(vocab, generator=generator).argsort().argsort() < 60, normal(1.0), -INF),  # 60 finite
            some(nothing.clone(), 1.0, 1),
            some(torch.zeros(vocab), 100.0, 1),
            normal(1e-40),  # subnormal
            normal(1e38),  # overflows when divided by a small temperature
            torch.full((vocab,), 3e38),
            some(normal(3.0), INF, 3),
            some(normal(3.0), NAN, 1),
            some(some(normal(3.0), INF, 3), NAN, 1),
            some(normal(3.0), -INF, vocab // 2),
            one_block,
            torch.linspace(-5, 5, vocab),
            torch.linspace(1e4, 1e4 - 1, vocab),
            by_rank,
            by_rank[torch.randperm(vocab, generator=generator)],
            some(normal(0.5), 9.0, min(vocab, 40)),  # a tie of many at the top, with the boundary of the nucleus in it
        ]
    )


def _pick(values: list[Any], rows: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=generator)]


def _lists(rows: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row up to 20 distinct ids, for some rows none: ids and where each row's begin."""
    sizes = _pick([0, 1, 5, 20], rows, generator, torch.int64).clamp(max=vocab)
    ids = [torch.randperm(vocab, generator=generator)[: int(size)] for size in sizes]
    return torch.cat(ids).int(), torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()


def case(vocab: int, times: int, generator: torch.Generator, *, adjusted: bool = True) -> dict[str, Any]:
    """The arguments of one call of ``sample``: each hostile row ``times`` times, with controls drawn at random; on the CPU.

    ``adjusted``: also penalties, bias, end tokens and a mask.
    """
    logits = rows(vocab, generator).repeat(times, 1)
    n = len(logits)
    position = torch.randint(0, 2**31 - 1, (n,), generator=generator, dtype=torch.int32)
    given: dict[str, Any] = {
        "logits": logits,
        "temperature": _pick([0.0, 1e-6, 0.1, 0.7, 1.0, 1.0, 5.0], n, generator, torch.float32),
        "top_k": _pick([0, 0, 1, 2, 50, vocab // 3, vocab - 1, vocab, vocab + 5, -3], n, generator, torch.int32),
        "top_p": _pick([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.999], n, generator, torch.float32),
        "min_p": _pick([0.0, 0.0, 1e-30, 0.01, 0.3, 1.0], n, generator, torch.float32),
        "seed": torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator),
        "position": position,
        "stream": torch.randint(0, 100, (n,), generator=generator, dtype=torch.int32),
    }
    if adjusted:
        token, start = _lists(n, vocab, generator)
        repetition = _pick([1.0, 1.3, 0.5], n, generator, torch.float32)
        presence, frequency = _pick([0.0, 0.7, -2.0], 2 * n, generator, torch.float32).view(2, n).unbind()
        count = torch.randint(0, 4, token.shape, generator=generator, dtype=torch.int32)
        given["penalties"] = Penalties(repetition, presence, frequency, token, count, start)
        token, start = _lists(n, vocab, generator)
        given["bias"] = LogitBias(token, _pick([-INF, -5.0, 0.25, 30.0], len(token), generator, torch.float32), start)
        token, start = _lists(n, vocab, generator)
        given["end_tokens"] = EndTokens(token, position + _pick([0, 1], n, generator, torch.int32), start)
        share = _pick([0.0, 0.01, 0.5, 1.0, 1.0], n, generator, torch.float32)  # of the vocabulary that is allowed
        given["allowed"] = pack(torch.rand(n, vocab, generator=generator) < share[:, None])
    return given


def cases(vocabs: Sequence[int], times: int) -> Iterator[dict[str, Any]]:
    """Each hostile row ``times`` times (once where V >= 1000) with and without adjustments, in every dtype of logits."""
    generator = torch.Generator().manual_seed(0)
    for vocab in vocabs:
        for adjusted in (False, True):
            for dtype in DTYPES if vocab < 1000 else DTYPES[:1]:
                given = case(vocab, times if vocab < 1000 else 1, generator, adjusted=adjusted)
                yield {**given, "logits": given["logits"].to(dtype)}


def move(value: Any, device: torch.device) -> Any:
    """A case, or a part of one, on another device."""
    if isinstance(value, dict):
        return {name: move(part, device) for name, part in value.items()}
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(move(part, device) for part in value))


def take(given: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The rows ``index`` of a case, in that order."""

    def lists(group: Any) -> Any:
        parts = [torch.arange(int(group.start[r]), int(group.start[r + 1])) for r in index.tolist()]
        entries = torch.cat(parts)
        start = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0).int()
        picked = {name: t[entries if name in of_entry else index] for name, t in group._asdict().items() if name != "start"}
        return type(group)(**picked, start=start)

    of_entry = ("token", "counts", "bias")
    return {name: t[index] if isinstance(t, Tensor) else lists(t) for name, t in given.items()}
