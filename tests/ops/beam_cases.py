"""Groups of beams over ordinary and hostile rows, for the tests of ``beam_select``. As a program: run them all and save the results (other
instruction sets are asked in a process of their own)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from sample_cases import lists, rows
from torch import Tensor

from engine.kernels.api import BeamResult

INF = float("inf")
VOCABS = (1, 2, 7, 127, 128, 129, 4096, 32000, 128256)


def cases() -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """``logits, arguments``: groups of 0 to 7 beams, any number of candidates, with and without noise, lists and top-k, in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def choice(values: Any, n: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]

    for vocab in VOCABS:
        base = rows(vocab, generator)
        for dtype, names, noise in (
            (torch.float32, (), False),
            (torch.float32, (), True),
            (torch.float32, ("penalties", "bias", "end_tokens", "allowed"), False),
            (torch.float32, ("penalties", "allowed"), True),
            (torch.bfloat16, (), False),
            (torch.float16, ("allowed",), False),
        ):
            for num_candidates in (1, 8, 40, 300):
                widths = torch.tensor([1, 4, 0, 2, 7, 1, 5] if vocab < 10_000 else [3, 1])
                n = int(widths.sum())
                index = torch.randint(len(base), (n,), generator=generator)
                k = choice((-1, 0, 1, 2, 50, vocab // 3, vocab), n).int()
                arguments: dict[str, Any] = {
                    "scores": choice((0.0, -1.5, -1.5, -200.0, -1e9, -INF, 3.25), n),
                    "group_start": torch.cat([torch.zeros(1), widths.cumsum(0)]).int(),
                    "num_candidates": num_candidates,
                    "temperature": choice((1.0, 1.0, 0.1, 5.0), n),
                    "top_k": torch.where(choice((True, False), n), k, 0),
                    "position": torch.randint(0, 2**31 - 1, (n,), generator=generator, dtype=torch.int32),
                }
                if noise:
                    arguments["seed"] = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
                    arguments["stream"] = torch.randint(0, 2**31 - 1, (n,), generator=generator, dtype=torch.int32)
                every = lists(n, vocab, generator)
                yield base[index].to(dtype), {**arguments, **{name: every[name] for name in names}}


def run_all(beam_select: Any) -> list[BeamResult]:
    return [beam_select(logits, **arguments) for logits, arguments in cases()]


if __name__ == "__main__":
    from engine.kernels import cpu

    assert cpu._cpu.isa() == sys.argv[1]
    torch.save([tuple(result) for result in run_all(cpu.beam_select)], sys.argv[2])
