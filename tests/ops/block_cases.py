"""Chains of drafts, ordinary and hostile, for the tests of ``verify_block``. As a program: run them all and save the results (other
instruction sets are asked in a process of their own)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.kernels.api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK

LARGEST = 1 << 62  # of all masses of a proposal
WHOLE = 1 << 40  # largest mass of a target's token
KINDS = ("apart", "near", "equal", "in proportion", "sparse", "certain", "huge")


def keys(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``seed``, ``position`` and ``stream`` of ``count`` sequences."""
    return {
        "seed": torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        "position": torch.randint(0, 2**31 - 1, (count,), generator=generator, dtype=torch.int32),
        "stream": torch.randint(0, 100, (count,), generator=generator, dtype=torch.int32),
    }


def masses(rows: int, vocab: int, sharpness: float, generator: torch.Generator) -> Tensor:
    z = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * sharpness
    return ((z - z.amax(dim=1, keepdim=True)).exp() * WHOLE).long()


def pair(kind: str, rows: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Target and proposal: row i of the one is what row i of the other should be like."""
    target = masses(rows, vocab, 2.0, generator)
    if kind == "apart":
        return target, masses(rows, vocab, 2.0, generator)
    if kind == "near":
        blur = 1 + 0.2 * torch.rand(rows, vocab, generator=generator, dtype=torch.float64)
        return target, (target.double() * blur).long()
    if kind == "equal":
        return target, target.clone()
    if kind == "in proportion":  # equal shares, but for their rounding
        return target // 8, target // 8 * torch.tensor([3, 5, 7, 1]).repeat(rows)[:rows, None]
    if kind == "sparse":
        mine, theirs = ((torch.rand(rows, vocab, generator=generator) < 0.3) | (torch.arange(vocab) == vocab // 2) for _ in range(2))
        return target * mine + (torch.arange(vocab) == vocab // 2), masses(rows, vocab, 1.0, generator) * theirs + (
            torch.arange(vocab) == 0
        )
    if kind == "certain":
        one = torch.randint(0, vocab, (2, rows), generator=generator)
        sure = torch.zeros(2, rows, vocab, dtype=torch.int64).scatter(2, one[:, :, None], WHOLE)
        return torch.where(torch.arange(rows)[:, None] % 3 == 0, sure[0], target), torch.where(
            torch.arange(rows)[:, None] % 2 == 0, sure[1], torch.where(torch.arange(rows)[:, None] % 3 == 0, sure[0], target)
        )
    assert kind == "huge"
    lengths = torch.randint(0, 62, (rows, vocab), generator=generator)
    proposal = (torch.ones((), dtype=torch.int64) << lengths) // vocab
    proposal[:, vocab // 3] = LARGEST // vocab
    return torch.where(torch.rand(rows, vocab, generator=generator) < 0.5, 1, target), proposal


def drawn_from(proposal: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row, int32."""
    return torch.multinomial(proposal.double(), 1, generator=generator)[:, 0].int()


def chains(sizes: list[int], kind: str, vocab: int, failures: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """The arguments of a call with chains of ``sizes`` rows."""
    rows = sum(sizes)
    target, proposal = pair(kind, rows, vocab, generator)
    proposal = proposal.roll(1, dims=0)  # row i + 1 of the proposal proposes what follows row i
    draft = drawn_from(proposal, generator)
    start = torch.tensor([0, *sizes]).cumsum(0).int()
    status = torch.full((rows,), STATUS_OK, dtype=torch.int32)
    if failures:
        status[torch.rand(rows, generator=generator) < 0.2] = STATUS_NAN
        status[torch.rand(rows, generator=generator) < 0.1] = STATUS_NOTHING_ALLOWED
        target[status != STATUS_OK] = 0
    proposal[start[:-1].long()] = torch.randint(-(2**63), 2**63 - 1, (len(sizes), vocab), generator=generator)  # not looked at
    draft[start[:-1].long()] = -7
    return {"target": target, "status": status, "proposal": proposal, "draft": draft, "start": start, **keys(len(sizes), generator)}


def cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """By name: the arguments of a call."""
    generator = torch.Generator().manual_seed(0)
    for kind in KINDS:
        for vocab, sizes in (
            (1, [3, 1, 2]),
            (2, [5] * 60),
            (3, [4, 1, 2, 3] * 20),
            (127, [64, 1, 8, 9]),
            (128, [6] * 8),
            (129, [2, 7] * 8),
        ):
            yield f"{kind}, V={vocab}", chains(sizes, kind, vocab, False, generator)
            yield f"{kind}, V={vocab}, failures", chains(sizes, kind, vocab, True, generator)
        yield f"{kind}, V=5000", chains([5, 1, 6, 4], kind, 5000, False, generator)
    yield "V=70001", chains([4, 2], "near", 70_001, False, generator)
    yield "no sequence", chains([], "near", 9, False, generator)


def run_all(verify_block: Any) -> list[Any]:
    return [tuple(verify_block(**given)) for _, given in cases()]


if __name__ == "__main__":
    from engine.kernels import cpu

    assert cpu._cpu.isa() == sys.argv[1]
    torch.save(run_all(cpu.verify_block), sys.argv[2])
