"""As a program, under TRITON_INTERPRET=1: ``verify_drafts`` in Triton's interpreter against the oracle; prints one JSON object, group of
cases -> what was run and what went wrong. In a process of its own: see ``triton_cases``."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton_cases
import verify_cases
from torch import Tensor
from verify_cases import call, chain, ints

from engine.kernels import reference
from engine.kernels import triton as backend

LARGEST = 2**31 - 1
SPARE = 200  # rows before and after those of a call, which the kernel may neither follow nor write to


def compare(name: str, given: dict[str, Tensor]) -> list[str]:
    result, expected = backend.verify_drafts(**given), reference.verify_drafts(**given)
    same = torch.equal(result.num_accepted, expected.num_accepted) and torch.equal(result.path, expected.path)
    return [] if same else [f"{name}: {result.num_accepted.tolist()} are accepted, not {expected.num_accepted.tolist()}"]


def trees() -> dict[str, Any]:
    """Every case of the other backends."""
    wrong, rows = [], 0
    for name, given in verify_cases.cases():
        wrong += compare(name, given)
        rows += len(given["tokens"])
    return {"rows": rows, "wrong": wrong}


def full_trees() -> dict[str, Any]:
    """64 rows each, of every shape."""
    rng = random.Random(1)
    wrong = []
    for shape in ("chain", "star", "bush", "deep"):
        wrong += compare(shape, call([verify_cases.random_tree(rng, 64, list(range(4)), shape) for _ in range(20)]))
    return {"rows": 4 * 20 * 64, "wrong": wrong}


def in_the_middle(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The arguments as views of larger tensors, whose other rows would lead the walk on; and those larger tensors."""
    around = {"tokens": 5, "status": 0, "draft": 5, "parent": 0, "start": 1}
    larger = [torch.cat([t.new_full((SPARE,), around[name]), t, t.new_full((SPARE,), around[name])]) for name, t in given.items()]
    return {name: t[SPARE:-SPARE] for name, t in zip(given, larger, strict=True)}, larger


def bad_starts() -> dict[str, Any]:
    """A sequence whose rows are not in the call accepts -1 and writes no path; the others are what they are alone."""
    wrong = []
    trees = [chain([5, 5, 5, 5], [5, 5, 5]), chain([5, 5], [5]), chain([5, 6, 5], [5, 5])]
    for starts, accepted in (
        ([0, 4, 6, 9], [3, 1, 1]),
        ([-1, 4, 6, 9], [-1, 1, 1]),
        ([0, 4, 4, 9], [3, -1, 2]),
        ([0, 6, 4, 9], [3, -1, 2]),
        ([0, 4, 6, 10], [3, 1, -1]),
        ([0, 4, 6, LARGEST], [3, 1, -1]),
        ([-LARGEST - 1, LARGEST, -LARGEST - 1, LARGEST], [-1, -1, -1]),
        ([9, 9, 9, 9], [-1, -1, -1]),
        ([9, 10, 11, 12], [-1, -1, -1]),
    ):
        given, larger = in_the_middle({**call(trees), "start": ints(*starts)})
        before = [t.clone() for t in larger]
        result = backend.verify_drafts(**given)
        if result.num_accepted.tolist() != accepted:
            wrong.append(f"{starts}: {result.num_accepted.tolist()} are accepted")
        if not all(torch.equal(a, b) for a, b in zip(before, larger, strict=True)):
            wrong.append(f"{starts}: an argument was written to")
    long, _ = in_the_middle(call([chain([5] * 64, [5] * 63)]))
    long = {name: torch.cat([t, t[-1:]]) if name != "start" else ints(0, 65) for name, t in long.items()}
    if backend.verify_drafts(**long).num_accepted.tolist() != [-1]:
        wrong.append("65 rows are walked")
    return {"rows": 9 * 9 + 65, "wrong": wrong}


def bad_parents() -> dict[str, Any]:
    """A node whose parent is none before it is nobody's child, whatever lies where it points."""
    wrong = []
    for bad in (-1, -2, -SPARE, -LARGEST - 1, 2, 3, 4, 64, SPARE, LARGEST):
        given, _ = in_the_middle(call([([5] * 4, [0] * 4, [5] * 4, [bad, 0, bad, 1])]))
        result = backend.verify_drafts(**given)
        if result.num_accepted.tolist() != [2] or result.path.tolist() != [0, 1, 3, -1]:
            wrong.append(f"{bad}: the path is {result.path.tolist()}")
    return {"rows": 40, "wrong": wrong}


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "trees": trees,
    "full_trees": full_trees,
    "bad_starts": bad_starts,
    "bad_parents": bad_parents,
}


if __name__ == "__main__":
    triton_cases.patch_once()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
