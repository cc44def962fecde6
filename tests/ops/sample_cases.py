"""Rows of logits, ordinary and hostile, with every control, for the tests of ``sample``. As a program: run them all and save the results
(other instruction sets are asked in a process of their own)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.kernels.api import EndTokens, LogitBias, Penalties, SampleResult
from engine.verify.hostile import rows

INF = float("inf")
VOCABS = (1, 2, 7, 127, 128, 129, 4096, 32000, 128256, 151936, 262144)
TEMPERATURES = (0.0, 1e-6, 0.1, 1.0, 1.0, 5.0)
TOP_PS = (1.0, 1.0, 0.0, 1e-9, 0.1, 0.5, 0.9, 0.99999, 1 - 2.0**-24)
MIN_PS = (0.0, 0.0, 0.0, 1e-40, 1e-9, 0.05, 0.5, 1.0)
LOGPROBS = (None, 0, 1, 5)


def lists(count: int, vocab: int, generator: torch.Generator) -> dict[str, Any]:
    """Penalties, bias, end tokens and a mask for ``count`` rows, some of them empty."""

    def ragged(most: int) -> tuple[Tensor, Tensor]:
        sizes = [min(vocab, most) if i % 3 else 0 for i in range(count)]
        ids = [torch.randperm(vocab, generator=generator)[:size] for size in sizes]
        return torch.cat(ids).int(), torch.tensor([0, *sizes]).cumsum(0).int()

    def choice(values: tuple[float, ...], n: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]

    token, start = ragged(300)
    penalties = Penalties(
        choice((1.0, 1.3, 0.7, 100.0), count), choice((0.0, 0.5, -2.0, 1e30), count), choice((0.0, 0.3, -1e-3), count),
        token, torch.randint(0, 4, token.shape, generator=generator, dtype=torch.int32), start,
    )  # fmt: skip
    bias_token, bias_start = ragged(40)
    end_token, end_start = ragged(3)
    words = torch.randint(-(2**31), 2**31 - 1, (count, (vocab + 31) // 32), generator=generator, dtype=torch.int32)
    words[::4] = -1
    words[1::4, : words.shape[1] // 2] = 0
    return {
        "penalties": penalties,
        "bias": LogitBias(bias_token, choice((1.0, -3.0, 100.0, -INF, -1e30), len(bias_token)), bias_start),
        "end_tokens": EndTokens(end_token, choice((0, 2**30, 2**31 - 1), count).int(), end_start),
        "allowed": words,
    }


def cases() -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """``vocab, logits, arguments``: hostile rows under combinations of all parameters, in every dtype, with and without lists."""
    generator = torch.Generator().manual_seed(0)
    for vocab in VOCABS:
        base = rows(vocab, generator)
        finite = base.isfinite().sum(dim=1)
        for dtype, names in (
            (torch.float32, ()),
            (torch.float32, ("penalties", "bias", "end_tokens", "allowed")),
            (torch.bfloat16, ()),
            (torch.bfloat16, ("allowed",)),
            (torch.float16, ("bias",)),
            (torch.float32, ("penalties",)),
            (torch.float32, ("end_tokens",)),
        ):
            n = min(1000, max(1_200_000 // vocab // (1 if not names else 3), 6))
            index = torch.randperm(n, generator=generator) % len(base)

            def choice(values: Any, n: int = n) -> Tensor:
                return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]

            top_k = torch.stack([torch.zeros(n), choice((-3, 0, 1, 2, 50, 2000, vocab // 3, vocab - 1, vocab, vocab + 5)).float()])
            top_k = torch.cat([top_k, finite[index][None] - torch.tensor([[1.0], [0.0]])])
            arguments: dict[str, Any] = {
                "temperature": choice(TEMPERATURES),
                "top_k": top_k.gather(0, torch.randint(0, 4, (1, n), generator=generator))[0].int(),
                "top_p": choice(TOP_PS),
                "min_p": choice(MIN_PS),
                "seed": torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator),
                "position": torch.randint(0, 2**31 - 1, (n,), generator=generator, dtype=torch.int32),
                "stream": torch.randint(0, 100, (n,), generator=generator, dtype=torch.int32),
                "logprobs": LOGPROBS[int(torch.randint(len(LOGPROBS), (), generator=generator))],
            }
            if arguments["logprobs"]:
                arguments["logprobs"] = min(arguments["logprobs"], vocab)
            every = lists(n, vocab, generator)
            yield vocab, base[index].to(dtype), {**arguments, **{name: every[name] for name in names}}


def run_all(sample: Any) -> list[SampleResult]:
    return [sample(logits, **arguments) for _, logits, arguments in cases()]


if __name__ == "__main__":
    from engine.kernels import cpu

    assert cpu._cpu.isa() == sys.argv[1]
    torch.save([tuple(result) for result in run_all(cpu.sample)], sys.argv[2])
