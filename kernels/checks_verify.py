"""Argument checks of ``verify_drafts`` and ``verify_block``, shared by the backends.

As in ``checks_sample``: the functions named like an op look at types, shapes, strides and devices; the others read what is in the tensors,
which on a GPU would wait for the device. Masses are the caller's promise: looking at all of them would cost what the op costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks_sample import Expected, expect, length

MAX_NODES = 64  # rows of a sequence

_I32, _I64 = torch.int32, torch.int64


def verify_drafts(tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> None:
    """Check everything that can be seen from outside the tensors."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
    each = length(tokens)
    expected = [
        Expected("tokens", tokens, _I64, each, "[R]"),
        Expected("status", status, _I32, each, "[R]"),
        Expected("draft", draft, _I32, each, "[R]"),
        Expected("parent", parent, _I32, each, "[R]"),
        Expected("start", start, _I32, length(start), "[S + 1]"),
    ]
    expect(expected, tokens.device, "tokens")
    _has_a_start(start)


def verify_block(
    target: Tensor, status: Tensor, proposal: Tensor, draft: Tensor, start: Tensor, seed: Tensor, position: Tensor, stream: Tensor
) -> None:
    """Check everything that can be seen from outside the tensors."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dim() != 2 or target.shape[1] < 1:
        raise ValueError(f"target must have shape [R, V] with V >= 1, got {tuple(target.shape)}")
    rows, vocab = target.shape
    sequences = (len(start) - 1,) if isinstance(start, Tensor) and start.dim() == 1 else (0,)
    expected = [
        Expected("target", target, _I64, (rows, vocab), "[R, V]"),
        Expected("status", status, _I32, (rows,), "[R]"),
        Expected("proposal", proposal, _I64, (rows, vocab), "[R, V]"),
        Expected("draft", draft, _I32, (rows,), "[R]"),
        Expected("start", start, _I32, length(start), "[S + 1]"),
    ]
    expect(expected, target.device, "target")
    _has_a_start(start)
    expected = [
        Expected("seed", seed, _I64, sequences, "[S]"),
        Expected("position", position, _I32, sequences, "[S]"),
        Expected("stream", stream, _I32, sequences, "[S]"),
    ]
    expect(expected, target.device, "target")


def _has_a_start(start: Tensor) -> None:
    if len(start) == 0:
        raise ValueError("start must have shape [S + 1] with S >= 0, got (0,)")


def starts(start: list[int], rows: int) -> None:
    """Each sequence has 1 to 64 of the rows, one after the other."""
    if start[0] != 0 or start[-1] != rows:
        raise ValueError(f"start must run from 0 to {rows}, the number of rows, got {start[0]} to {start[-1]}")
    for s, (first, last) in enumerate(zip(start, start[1:], strict=False)):
        if not 1 <= last - first <= MAX_NODES:
            raise ValueError(f"start must give each sequence 1 to {MAX_NODES} rows, got {last - first} at {s}")


def parents(parent: list[int], start: list[int]) -> None:
    """Each node but the roots has its parent before it."""
    for first, last in zip(start, start[1:], strict=False):
        for r in range(first + 1, last):
            if not 0 <= parent[r] < r - first:
                raise ValueError(f"parent must be a node before its own, here in [0, {r - first}), got {parent[r]} at {r}")


def drafts(draft: list[int], vocab: int, first_row: int) -> None:
    """The tokens of a chain, whose drafts begin at ``first_row`` of the call, are of the vocabulary."""
    for i, token in enumerate(draft):
        if not 0 <= token < vocab:
            raise ValueError(f"draft must be in [0, {vocab}), got {token} at {first_row + i}")
