"""As a program, under TRITON_INTERPRET=1: ``verify_drafts``, ``masses`` and ``verify_block`` in Triton's interpreter against the oracle;
prints one JSON object, group of cases -> what was run and what went wrong. In a process of its own: see ``triton_cases``."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import block_cases
import masses_cases
import torch
import triton_cases
import verify_cases
from torch import Tensor
from verify_cases import call, chain, ints

from engine.kernels import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_OK, VerifyResult, reference
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


def masses() -> dict[str, Any]:
    """A few rows of each of the cases of small vocabularies, and rows whose threshold must be searched for."""
    wrong, rows = [], 0
    search = [(f"search {i}", logits, given) for i, (_, logits, given) in enumerate(triton_cases.search())]
    for name, logits, given in (*((f"V={vocab}", logits, given) for vocab, logits, given in masses_cases.cases()), *search):
        if 5000 < logits.shape[1] != 20000:
            continue
        few = torch.randperm(len(logits), generator=torch.Generator().manual_seed(rows))[: 1 if logits.shape[1] == 20000 else 2]
        few_given = {field: t for field, t in triton_cases.take(given, few).items() if field not in masses_cases.NOT_OF_MASSES}
        mass, status = backend.masses(logits[few], **few_given)
        expected, expected_status = reference.masses(logits[few], **few_given)
        bad = (status != expected_status) | (mass != expected).any(dim=1)
        wrong += [f"{name}, row {int(few[i])}" for i in bad.nonzero()[:, 0]]
        rows += len(few)
    return {"rows": rows, "wrong": wrong}


def masses_of_bad_parameters() -> dict[str, Any]:
    """Their rows have none, and the others what they have without them."""
    given = {"temperature": torch.tensor([1.0, -1.0, 1.0]), "top_p": torch.tensor([0.5, 0.5, 2.0]), "min_p": torch.zeros(3)}
    given |= {"top_k": torch.zeros(3, dtype=torch.int32), "position": torch.zeros(3, dtype=torch.int32)}
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(5)).expand(3, -1)
    mass, status = backend.masses(logits, **given)
    expected, _ = reference.masses(logits[:1], **{name: t[:1] for name, t in given.items()})
    right = status.tolist() == [STATUS_OK, STATUS_BAD_PARAMETER, STATUS_BAD_PARAMETER]
    right = right and torch.equal(mass, torch.cat([expected, torch.zeros(2, 40, dtype=torch.int64)]))
    return {"rows": 3, "wrong": [] if right else [f"status is {status.tolist()}"]}


def same_block(result: VerifyResult, expected: VerifyResult) -> bool:
    return all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def blocks() -> dict[str, Any]:
    """A few chains of many cases, a whole one among them, and one of several chunks."""
    wrong, rows = [], 0
    for name, given in block_cases.cases():
        if not name.endswith(("V=3, failures", "V=129")) and name not in ("near, V=1", "near, V=2", "near, V=127", "sparse, V=5000"):
            continue
        given = first_chains(given, 12 if name == "near, V=2" else 1 if name.endswith("V=5000") else 2)
        if not same_block(backend.verify_block(**given), reference.verify_block(**given)):
            wrong.append(name)
        rows += len(given["draft"])
    # A draft that the target would draw more often than its proposal, before one that it would less often: a weight is 1 at most.
    target, proposal = torch.tensor([[8, 1, 1], [3, 3, 4], [1, 1, 1]]), torch.tensor([[1, 1, 1], [2, 4, 4], [8, 1, 1]])
    count = 12
    capped = {"target": target.repeat(count, 1), "proposal": proposal.repeat(count, 1), "start": torch.arange(count + 1).int() * 3}
    capped |= {name: torch.zeros(3 * count, dtype=torch.int32) for name in ("status", "draft")}
    capped |= block_cases.keys(count, torch.Generator().manual_seed(1))
    if not same_block(backend.verify_block(**capped), reference.verify_block(**capped)):
        wrong.append("weights")
    return {"rows": rows + 3 * count, "wrong": wrong}


def first_chains(given: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    start = given["start"][: count + 1]
    rows = int(start[-1])
    of_sequences = ("seed", "position", "stream")
    return {name: start if name == "start" else t[:count] if name in of_sequences else t[:rows] for name, t in given.items()}


def block_ranges() -> dict[str, Any]:
    """Sequences whose rows are not in the call have none, and drafts outside the vocabulary are not kept; the others are what they are."""
    wrong = []
    given = block_cases.chains([4, 2, 3], "equal", 50, False, torch.Generator().manual_seed(3))
    alone = backend.verify_block(**given)
    for starts, bad in (([0, 4, 6, 10], 2), ([0, 4, 6, LARGEST], 2), ([-1, 4, 6, 9], 0), ([4, 4, 6, 9], 0), ([-LARGEST - 1, 4, 6, 9], 0)):
        result = backend.verify_block(**{**given, "start": ints(*starts)})
        good = [s for s in range(3) if s != bad]
        assert result.tokens is not None and result.status is not None and alone.tokens is not None and alone.status is not None
        if (result.num_accepted[bad], result.tokens[bad], result.status[bad]) != (-1, -1, STATUS_BAD_PARAMETER):
            wrong.append(f"{starts}: a sequence that cannot be has a result")
        pairs = ((result.num_accepted, alone.num_accepted), (result.tokens, alone.tokens), (result.status, alone.status))
        if not all(torch.equal(a[good], b[good]) for a, b in pairs):
            wrong.append(f"{starts}: another sequence has another result")
    failed = {**given, "status": given["status"].clone()}
    failed["status"][2] = STATUS_NAN
    if not same_block(backend.verify_block(**failed), reference.verify_block(**failed)):
        wrong.append("a row that failed is passed")
    for bad in (-1, 50, LARGEST, -LARGEST - 1):
        drafts = {**given, "draft": given["draft"].clone()}
        drafts["draft"][2] = bad
        result = backend.verify_block(**drafts)
        if result.num_accepted.tolist() != [1, *alone.num_accepted.tolist()[1:]]:
            wrong.append(f"draft {bad}: {result.num_accepted.tolist()} are accepted")
    return {"rows": 9 * 9, "wrong": wrong}


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "trees": trees,
    "full_trees": full_trees,
    "bad_starts": bad_starts,
    "bad_parents": bad_parents,
    "masses": masses,
    "masses_of_bad_parameters": masses_of_bad_parameters,
    "blocks": blocks,
    "block_ranges": block_ranges,
}


if __name__ == "__main__":
    triton_cases.patch_once()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
