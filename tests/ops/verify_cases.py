"""Trees of drafts, ordinary and hostile, for the tests of ``verify_drafts``, and the walk over them, written plainly."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels.api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK

MAX_NODES = 64
LARGEST = 2**31 - 1


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(trees: list[tuple[list[int], list[int], list[int], list[int]]]) -> dict[str, Tensor]:
    """The arguments of ``verify_drafts`` for trees given as ``tokens, status, draft, parent``."""
    tokens, status, draft, parent = ([x for tree in trees for x in tree[column]] for column in range(4))
    sizes = [0, *(len(tree[0]) for tree in trees)]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int64),
        "status": ints(*status),
        "draft": ints(*draft),
        "parent": ints(*parent),
        "start": torch.tensor(sizes).cumsum(0).int(),
    }


def chain(drawn: list[int], drafted: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """A chain of ``drafted`` tokens, and what was drawn after the root and after each of them."""
    assert len(drawn) == len(drafted) + 1
    return drawn, [STATUS_OK] * len(drawn), [-7, *drafted], [-7, *range(len(drafted))]


def random_tree(rng: random.Random, nodes: int, alphabet: list[int], shape: str) -> tuple[list[int], list[int], list[int], list[int]]:
    """Nodes whose drafts are often what was drawn: few tokens, duplicate siblings among them, and failures on and off the path."""
    parent = [rng.choice((-1, 0, 99, -LARGEST - 1))]  # not looked at
    for i in range(1, nodes):
        parent.append({"chain": i - 1, "star": 0, "bush": rng.randrange(i), "deep": rng.randrange(max(0, i - 3), i)}[shape])
    tokens = [rng.choice(alphabet) for _ in range(nodes)]
    status = [rng.choice((STATUS_NAN, STATUS_NOTHING_ALLOWED)) if rng.random() < 0.02 else STATUS_OK for _ in range(nodes)]
    tokens = [token if ok == STATUS_OK else -1 for token, ok in zip(tokens, status, strict=True)]
    draft = [rng.choice((*alphabet, -1, LARGEST, -LARGEST - 1)) if rng.random() < 0.15 else tokens[p] for p in [0, *parent[1:]]]
    return tokens, status, draft, parent


def cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """By name: the arguments of a call."""
    ok, nan = STATUS_OK, STATUS_NAN
    yield "no sequence", call([])
    yield "one row", call([([5], [ok], [5], [0])])
    yield "one row that failed", call([([-1], [nan], [-1], [0])])
    yield "all of a chain", call([chain([3, 1, 4, 1], [3, 1, 4])])
    yield "none of a chain, though its rest agrees", call([chain([3, 1, 4, 1], [2, 1, 4])])
    yield "a chain of 64", call([chain(list(range(64)), list(range(63)))])
    yield (
        "a chain of 64 that ends at each place",
        call([chain(list(range(64)), [-1 if i == wrong else i for i in range(63)]) for wrong in range(63)]),
    )
    yield "the first of equal siblings, though the second has children", call([([7, 8, 9, 1], [ok] * 4, [0, 7, 7, 9], [0, 0, 0, 2])])
    yield "equal siblings far apart", call([([7, 8, 8, 1, 2], [ok] * 5, [0, 6, 7, 8, 7], [0, 0, 0, 2, 0])])
    yield "a failure at the root", call([([-1, 8], [nan, ok], [0, -1], [0, 0])])
    yield "a failure on the path", call([([7, -1, 3], [ok, nan, ok], [0, 7, -1], [0, 0, 1])])
    yield "a failure at the end of the path", call([([7, 8, -1], [ok, ok, nan], [0, 7, 8], [0, 0, 1])])
    yield "a failure off the path", call([([7, -1, 8, 9], [ok, nan, ok, ok], [0, 6, 7, 8], [0, 0, 0, 2])])
    yield "ids of 31 bits", call([chain([LARGEST, LARGEST - 1, 0], [LARGEST, LARGEST - 1])])
    # An id that only its lower half of 64 bits has in common with the draft.
    yield "ids above 32 bits", call([chain([2**32 + 5, 1], [5])])
    yield "a star of 64", call([([63, *range(63)], [ok] * 64, list(range(64)), [0] * 64)])
    rng = random.Random(0)
    for sizes in ((1, 2, 3), (64, 1, 64), (5,) * 40, (17, 33, 64, 2, 8, 31, 32, 63)):
        for shape in ("chain", "star", "bush", "deep"):
            for alphabet in ([1], [1, 2], list(range(12))):
                yield f"{shape} {sizes[:4]} of {len(alphabet)}", call([random_tree(rng, n, alphabet, shape) for n in sizes])


def walk(tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> tuple[list[int], list[int]]:
    """``num_accepted`` and ``path``, by looking up the children of one node after the other."""
    accepted, path = [], []
    for first, last in zip(start.tolist(), start.tolist()[1:], strict=False):
        children: dict[int, list[int]] = {node: [] for node in range(last - first)}
        for node in range(1, last - first):
            children[int(parent[first + node])].append(node)
        kept = [0]
        while int(status[first + kept[-1]]) == STATUS_OK:
            drawn = int(tokens[first + kept[-1]])
            same = [child for child in children[kept[-1]] if int(draft[first + child]) == drawn]
            if not same:
                break
            kept.append(same[0])
        accepted.append(len(kept) - 1)
        path += kept + [-1] * (last - first - len(kept))
    return accepted, path
