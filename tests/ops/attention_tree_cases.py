"""Trees of drafts for ``paged_attention``, and what every row of one must be: its path as a plain sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attention_cases import Batch, page
from torch import Tensor


def masks(parents: Sequence[int]) -> list[int]:
    """The ancestors of each node, itself included, as bits; -1 is the parent of what follows the committed tokens."""
    result: list[int] = []
    for node, parent in enumerate(parents):
        result.append(1 << node | (result[parent] if parent >= 0 else 0))
    return result


def tree(shape: str, size: int, seed: int = 0) -> list[int]:
    """The nodes' ancestors of some tree, in the order of their depth."""
    if shape == "chain":
        return masks(range(-1, size - 1))
    if shape == "star":
        return masks([-1] + [0] * (size - 1))
    generator = torch.Generator().manual_seed(seed)
    parents: list[int] = [-1]
    for node in range(1, size):
        lowest = {"wide": 0, "deep": max(0, node - 3), "forest": -1}[shape]
        parents.append(int(torch.randint(lowest, node, (1,), generator=generator)))
    depth = [mask.bit_count() for mask in masks(parents)]
    order = sorted(range(size), key=depth.__getitem__)
    return masks([-1 if parents[node] < 0 else order.index(parents[node]) for node in order])


def assert_equals_paths(module: Any, batch: Batch, out: Tensor) -> None:
    """Each row has the bits that it gets where its path stands in consecutive slots of a sequence of its own."""
    dtype, block_size = batch.key_cache.dtype, batch.block_size
    for s, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        rows, path = batch.rows(s), batch.path(s)
        first_query = len(keys) - len(path)
        covered = torch.zeros(len(path), dtype=torch.bool)
        for row in reversed(range(len(path))):  # leaves before what is above them
            if covered[row]:
                continue
            tokens = path[row].nonzero()[:, 0]
            queries = tokens[tokens >= first_query] - first_query
            q = batch.q[rows][queries]
            plain = page(q, [len(q)], [keys[tokens]], [values[tokens]], dtype=dtype, block_size=block_size, window=batch.window, seed=s + 1)
            assert torch.equal(plain.run(module), out[rows][queries]), f"sequence {s}, path {tokens[batch.tree(s) :].tolist()}"
            covered[queries] = True
