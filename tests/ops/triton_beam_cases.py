"""As a program, under TRITON_INTERPRET=1: the Triton kernels of ``beam_select`` in Triton's interpreter against the oracle, to the bit;
prints one JSON object, group of cases -> what was run and what went wrong. ``group`` names what to run (all by default)."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import beam_cases
import sample_cases
import torch
import triton_cases
from torch import Tensor

from engine.kernels import STATUS_BAD_PARAMETER, BeamResult, reference
from engine.kernels import triton as backend
from engine.kernels.triton import beam_groups

INF, NAN = math.inf, math.nan
Case = tuple[str, Tensor, dict[str, Any]]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(widths: list[int], num_candidates: int, *, noise: bool = False, **given: Any) -> dict[str, Any]:
    """Arguments of groups of these widths: a value for all rows, or a list of one per row."""
    count = sum(widths)
    defaults = {"scores": [-0.25 * (i % 5) for i in range(count)], "temperature": 1.0, "top_k": 0, "position": 7}
    if noise:
        defaults |= {"seed": list(range(11, 11 + count)), "stream": 2}
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "position": torch.int32, "stream": torch.int32}
    per_row = {
        name: torch.tensor(given.pop(name, value), dtype=dtypes.get(name, torch.float32)).expand(count).contiguous()
        for name, value in defaults.items()
    }
    return {"group_start": torch.tensor([0, *widths]).cumsum(0).int(), "num_candidates": num_candidates, **per_row, **given}


# ---- groups of cases ----


def shared() -> Iterator[Case]:
    """A part of the cases that all backends share: every kind at some size, the first groups."""
    for i, (logits, given) in enumerate(beam_cases.cases()):
        if i % 17 == 6:
            start = given["group_start"][:3]
            rows = torch.arange(int(start[-1]))
            per_row = {name: value for name, value in given.items() if name not in ("group_start", "num_candidates")}
            part = {**triton_cases.take(per_row, rows), "group_start": start, "num_candidates": given["num_candidates"]}
            yield f"case {i}, V={logits.shape[1]}", logits[rows], part


def wide() -> Iterator[Case]:
    """Groups from none to 64 beams, 256 candidates; lists, a mask and noise."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(66, 300, generator=generator) * 3
    yield "plain", logits, arguments([0, 64, 2], 256)
    every = sample_cases.lists(20, 300, generator)
    yield "everything", logits[:20].half(), arguments([1, 0, 17, 2], 60, noise=True, top_k=[0, 40] * 10, **every)


def ties() -> Iterator[Case]:
    """Equal scores everywhere, so that only rows and tokens decide; more of them than are ranked at once."""
    flat = torch.zeros(3, 5000)
    steps = (torch.arange(5000) % 3 == 0).float().expand(3, -1).clone()
    steps[1] -= 1
    for name, logits in (("flat", flat), ("steps", steps)):
        for num_candidates in (1, 200):
            yield f"{name}, C={num_candidates}", logits, arguments([2, 1], num_candidates, scores=-1.0)
    mask = torch.zeros(3, 157, dtype=torch.int32)
    mask[0, 100:] = -1
    mask[1] = 0x10101010
    yield "mask", flat, arguments([3], 30, scores=[-1.0, -1.0, -1.5], allowed=mask)
    generator = torch.Generator().manual_seed(2)
    coarse = (torch.randn(4, 9000, generator=generator) * 3).bfloat16()
    yield "bfloat16", coarse, arguments([4], 16, scores=-2.0)
    yield "all of it", flat[:, :900], arguments([3], 3000, scores=[-1.0, -1.0, -1.5])


def bounds() -> Iterator[Case]:
    """The bisections end at one sub-block, or one continuation, too few if they ask for one too few."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(3, 5000, generator=generator)
    yield "exactly 600", logits[:1], arguments([1], 600)
    logits[[0, 1, 2], [4999, 0, 2500]] = 30.0
    for num_candidates in (1, 2):
        yield f"one far above the others, C={num_candidates}", logits, arguments([1, 1, 1], num_candidates)
    lifted = triton_cases.LogitBias(ints(4000, 4001, 77), torch.tensor([60.0, 59.0, 61.0]), ints(0, 2, 2, 3))
    yield "lifted by a bias", logits, arguments([2, 1], 2, bias=lifted)


def top_k() -> Iterator[Case]:
    """Every kind of k, with ties at the k-th, over more tokens than are looked at in one go."""
    generator = torch.Generator().manual_seed(3)
    coarse = (torch.randn(9000, generator=generator) * 8).round() / 8
    few = torch.full((9000,), -INF)
    few[4000:4040] = coarse[:40]
    ks = [1, 2, 50, 139, 700, 4500, 8999, 9000]
    yield "coarse", coarse.expand(len(ks), -1), arguments([3, 5], 12, top_k=ks)
    yield "few", few.expand(4, -1), arguments([1] * 4, 50, top_k=[39, 40, 41, 3000])
    fine = torch.linspace(0, 1e-3, 5000)[torch.randperm(5000, generator=generator)]
    yield "fine", fine.expand(3, -1), arguments([3], 5, top_k=[256, 3000, 4999], temperature=[1.0, 20.0, 0.01], scores=[0.0, 0.2, -7.0])


def edges() -> Iterator[Case]:
    """Infinities, zeros of either sign, temperatures that overflow, sums that vanish."""
    logits = torch.tensor(
        [
            [0.0, INF, 3.0, -INF],
            [INF, 0.0, INF, INF],
            [-0.0, -INF, -INF, -INF],
            [-0.0, 0.0, -1e-40, 1e-40],
            [3e38, -3e38, 3e38, 0.0],
            [1.0, 2.0, 3.0, -1.0],
        ]
    )
    for heat in (1.0, 1e-6, 1e-40, 3e38):
        for scores in ([0.0] * 6, [-0.0, -0.0, -0.0, 1e30, -1e30, -0.0]):
            yield f"T={heat}, scores {scores}", logits, arguments([3, 3], 7, temperature=heat, scores=scores, top_k=[0, 2, 1, 2, 1, 3])
    spoiled = logits[[5, 5, 5]].clone()
    spoiled[:2, 1] = NAN
    yield "NaN, beams that are out", spoiled, arguments([3], 5, scores=[-INF, 0.0, -INF])
    # A log-probability that a penalty makes -0.0, and biases that cancel.
    lists = {
        "penalties": triton_cases.Penalties(
            torch.full((6,), 1e-45), torch.zeros(6), torch.zeros(6), ints(*range(4)).repeat(6), ints(*[0] * 24), ints(*range(0, 28, 4))
        ),
        "bias": triton_cases.LogitBias(ints(*range(6)) % 4, torch.tensor([-0.0, 0.0, 1e30, -1e30, -INF, 2.0]), ints(*range(7))),
    }
    for score in (0.0, -0.0, -1e30):
        yield f"lists, score {score}", logits, arguments([3, 3], 30, scores=score, **lists)


# ---- comparison ----


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32) if t.is_floating_point() else t


def compare(name: str, result: BeamResult, expected: BeamResult) -> list[str]:
    """What is different, by a bit."""
    wrong = []
    for field, got, want in zip(BeamResult._fields, result, expected, strict=True):
        if got.dtype != want.dtype or got.shape != want.shape:
            wrong.append(f"{name}: {field} is {got.dtype} {tuple(got.shape)}, the oracle's {want.dtype} {tuple(want.shape)}")
        elif not torch.equal(bits(got), bits(want)):
            at = tuple((bits(got) != bits(want)).nonzero()[0].tolist())
            wrong.append(f"{name}: {field} is {got[at].item()} at {at}, the oracle's {want[at].item()}")
    return wrong


def run(cases: Iterator[Case], beam_select: Callable[..., BeamResult] = backend.beam_select) -> dict[str, Any]:
    """Run cases, and count the bounds that were sought, and the keys' counts that took."""
    calls = Counter[str]()
    originals = {name: getattr(beam_groups, name) for name in ("_bound", "_count")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return originals[name](*args)

        return call

    for name in originals:
        setattr(beam_groups, name, counted(name))
    started, rows, groups, wrong, statuses = time.perf_counter(), 0, 0, [], Counter[int]()
    for name, logits, given in cases:
        result = beam_select(logits, **given)
        wrong += compare(name, result, reference.beam_select(logits, **given))
        rows += len(logits)
        groups += len(result.scores)
        statuses.update(result.status.tolist())
    for name, original in originals.items():
        setattr(beam_groups, name, original)
    seconds = round(time.perf_counter() - started, 1)
    return {"rows": rows, "wrong": wrong, "statuses": sorted(statuses), "groups": groups, "calls": dict(calls), "seconds": seconds}


def group_positions() -> dict[str, Any]:
    """Groups alone, among others and from rows apart in memory give the same continuations."""
    wrong = []
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 129, generator=generator)
    given = arguments([1, 3, 2], 10, noise=True, top_k=[0, 9, 0, 40, 0, 0])
    together = backend.beam_select(logits, **given)
    for g, (first, last) in enumerate(((0, 1), (1, 4), (4, 6))):
        mine = {name: value[first:last] if isinstance(value, Tensor) else value for name, value in given.items()}
        alone = backend.beam_select(logits[first:last], **{**mine, "group_start": ints(0, last - first)})
        moved = BeamResult(alone[0], alone[1], alone[2] + first, alone[3], alone[4])
        wrong += compare(f"group {g} alone", moved, BeamResult(*(t[g : g + 1] for t in together[:4]), together.status[first:last]))
    apart = torch.full((6, 135), NAN)
    apart[:, 3:132] = logits
    wrong += compare("row stride 135", backend.beam_select(apart[:, 3:132], **given), together)
    expanded = logits[:1].expand(6, -1)
    wrong += compare("row stride 0", backend.beam_select(expanded, **given), reference.beam_select(expanded, **given))
    return {"rows": 18, "wrong": wrong}


def bad_rows() -> Iterator[tuple[str, dict[str, Any], list[bool]]]:
    """Arguments of one group of rows of 40 logits, and which rows have a value that is out of range."""
    for name, values, bad in (
        ("temperature", [1e-45, 1.0, 0.0, -1.0, INF, NAN, -INF], [0, 0, 1, 1, 1, 1, 1]),
        ("scores", [0.0, -1e30, 1.1e30, -1.1e30, INF, NAN, 0.0], [0, 0, 1, 1, 1, 1, 0]),
    ):
        yield name, arguments([len(bad)], 9, **{name: values}), [bool(b) for b in bad]
    for name, given, bad in triton_cases.bad_parameters():
        lists = {key: value for key, value in given.items() if isinstance(value, tuple)}
        if lists:
            yield name, arguments([len(bad)], 9, **lists), bad


def bad_parameters() -> dict[str, Any]:
    """Rows with a bad value have that status and no continuations; the others what they would have without them."""
    wrong, count = [], 0
    base = torch.randn(9, 40, generator=torch.Generator().manual_seed(5))
    base[8, 3] = NAN
    for name, given, bad in bad_rows():
        logits = base[: len(bad)]
        result = backend.beam_select(logits, **given)
        if [s == STATUS_BAD_PARAMETER for s in result.status.tolist()] != bad:
            wrong.append(f"{name}: status is {result.status.tolist()}")
        good = torch.tensor([i for i, b in enumerate(bad) if not b])
        starts = {"group_start": ints(0, len(good)), "num_candidates": 9}
        kept = triton_cases.take({key: value for key, value in given.items() if key not in starts}, good)
        expected = reference.beam_select(logits[good], **kept, **starts)
        moved = expected._replace(parents=good[expected.parents.long()].int().where(expected.parents >= 0, -1))
        wrong += compare(name, result._replace(status=result.status[good]), moved)
        count += len(bad)
    given = arguments([3, 2, 4], 5)
    given["temperature"][3] = 0.0
    if backend.beam_select(base, **given).status.tolist() != [0, 0, 0, 3, 0, 0, 0, 0, 1]:
        wrong.append("NaN and a bad temperature")
    for starts in ([0, 3, 5, 8], [1, 3, 5, 9], [0, 5, 3, 9], [0, 3, 12, 9], [-2, 3, 5, 9], [0, -5, 2**31 - 1, 9], [0, 9, 9, 7], [0]):
        result = backend.beam_select(base, **{**given, "group_start": ints(*starts)})
        if set(result.status.tolist()) != {STATUS_BAD_PARAMETER} or (result.parents != -1).any() or (result.scores != -INF).any():
            wrong.append(f"group_start {starts}: status is {result.status.tolist()}, parents are {result.parents.tolist()}")
        count += len(base)
    return {"rows": count, "wrong": wrong}


def workspaces() -> dict[str, Any]:
    """A workspace is used again and again, whatever is in it, by smaller calls too, and its results are views of it."""
    wrong = []
    generator = torch.Generator().manual_seed(6)
    workspace = backend.BeamWorkspace(5, 300, 3, 12, "cpu")
    for widths, num_candidates, noise, with_lists in (
        ([3, 2], 12, True, True), ([1, 0, 1], 4, False, True), ([5], 7, False, False), ([0, 0], 3, True, False), ([], 1, False, False),
    ):  # fmt: skip
        for t in vars(workspace).values():
            if isinstance(t, Tensor):
                t.fill_(NAN if t.is_floating_point() else 2**31 - 1)
        count = sum(widths)
        logits = torch.randn(count, 300, generator=generator)
        lists = sample_cases.lists(count, 300, generator) if with_lists else {}
        given = arguments(widths, num_candidates, noise=noise, **lists)
        result = backend.beam_select(logits, **given, workspace=workspace)
        if result.scores.shape != (len(widths), num_candidates) or result.status.shape != (count,):
            wrong.append(f"{widths}: shapes are {tuple(result.scores.shape)} and {tuple(result.status.shape)}")
        if count:
            wrong += compare(f"{widths}", result, reference.beam_select(logits, **given))
        elif (result.scores != -INF).any() or (result.tokens != -1).any() or (result.parents != -1).any():
            wrong.append(f"{widths}: there is something")
        if widths and result.tokens.data_ptr() != workspace.tokens.data_ptr():
            wrong.append(f"{widths}: the tokens are no view of the workspace")
    return {"rows": 12, "wrong": wrong}


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "shared": lambda: run(shared()),
    "wide": lambda: run(wide()),
    "ties": lambda: run(ties()),
    "bounds": lambda: run(bounds()),
    "top_k": lambda: run(top_k()),
    "edges": lambda: run(edges()),
    "group_positions": group_positions,
    "bad_parameters": bad_parameters,
    "workspaces": workspaces,
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's about -inf and NaN
    triton_cases.patch_once()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
