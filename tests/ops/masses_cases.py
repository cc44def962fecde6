"""The rows of ``sample_cases`` for the tests of ``masses``. As a program: digest the masses of all of them and save that (other instruction
sets are asked in a process of their own)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import sample_cases
import torch
from torch import Tensor

NOT_OF_MASSES = ("seed", "stream", "logprobs")


def cases() -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """``vocab, logits, arguments``."""
    for vocab, logits, arguments in sample_cases.cases():
        yield vocab, logits, {name: value for name, value in arguments.items() if name not in NOT_OF_MASSES}


def digest(mass: Tensor) -> Tensor:
    """Two numbers for each row, which change with any of its masses: the sum, and one with an odd factor for each token (modulo 2^64)."""
    factor = torch.arange(mass.shape[1]) * 0x9E3779B97F4A7C16 + 1
    return torch.stack([mass.sum(dim=1), (mass * factor).sum(dim=1)], dim=1)


def run_all(masses: Any) -> list[tuple[Tensor, Tensor]]:
    """Digest and status of every case."""
    return [(digest(mass), status) for mass, status in (masses(logits, **given) for _, logits, given in cases())]


if __name__ == "__main__":
    from engine.kernels import cpu

    assert cpu._cpu.isa() == sys.argv[1]
    torch.save(run_all(cpu.masses), sys.argv[2])
