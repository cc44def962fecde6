"""Rows of logits, ordinary and hostile, for the tests of ``sample``. As a program: run them all and save the results (other
instruction sets are asked in a process of their own)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
VOCABS = (1, 2, 7, 127, 128, 129, 4096, 32000, 128256)
TEMPERATURES = (0.0, 1e-6, 0.1, 1.0, 5.0)


def rows(vocab: int, generator: torch.Generator) -> Tensor:
    """``[N, vocab]`` float32."""

    def normal(scale: float) -> Tensor:
        return torch.randn(vocab, generator=generator) * scale

    def some(row: Tensor, value: float, count: int) -> Tensor:
        row[torch.randperm(vocab, generator=generator)[:count]] = value
        return row

    one_block = normal(1.0)
    one_block[vocab // 2 // 128 * 128 :][:128] += 20
    signed_zero = torch.where(normal(1.0) > 0, 0.0, -0.0)
    few_finite = torch.full((vocab,), -INF)
    few_finite[torch.randperm(vocab, generator=generator)[:60]] = normal(1.0)[:60]
    return torch.stack(
        [
            normal(3.0),
            normal(0.3),
            normal(3.0).bfloat16().float(),  # many ties
            torch.zeros(vocab),
            signed_zero,
            torch.full((vocab,), -INF),
            few_finite,
            some(torch.full((vocab,), -INF), 1.0, 1),
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
        ]
    )


def cases() -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """``vocab, logits, per-row arguments``: every hostile row with every temperature and top-k, a part of those for large vocabularies."""
    generator = torch.Generator().manual_seed(0)
    for vocab in VOCABS:
        base = rows(vocab, generator)
        finite = base.isfinite().sum(dim=1).tolist()
        combinations = []
        for row in range(len(base)):
            top_ks = {0, 1, 2, 50, finite[row] - 1, finite[row], vocab // 3, vocab - 1, vocab, vocab + 5, -3}
            combinations += [(row, t, k) for t in TEMPERATURES for k in sorted(top_ks)]
        if vocab > 129:
            keep = torch.randperm(len(combinations), generator=generator)[: max(1_500_000 // vocab, 30)]
            combinations = [combinations[i] for i in keep]
        index, temperature, top_k = zip(*combinations, strict=True)
        n = len(combinations)
        yield (
            vocab,
            base[list(index)],
            {
                "temperature": torch.tensor(temperature),
                "top_k": torch.tensor(top_k, dtype=torch.int32),
                "seed": torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator),
                "position": torch.randint(0, 2**31 - 1, (n,), generator=generator, dtype=torch.int32),
                "stream": torch.randint(0, 100, (n,), generator=generator, dtype=torch.int32),
            },
        )


def run_all(sample: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tuple(sample(logits, **arguments)) for _, logits, arguments in cases()]


if __name__ == "__main__":
    from engine.kernels import cpu

    assert cpu._cpu.isa() == sys.argv[1]
    torch.save(run_all(cpu.sample), sys.argv[2])
