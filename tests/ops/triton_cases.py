"""As a program, under TRITON_INTERPRET=1: the Triton kernels of ``sample`` in Triton's interpreter against the oracle; prints one JSON
object, group of cases -> what was run and what went wrong. In a process of its own, because the interpreter must be chosen before the
kernels are decorated. ``group`` names what to run (all by default)."""

from __future__ import annotations

import inspect
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import sample_cases
import torch
import triton.language as tl
import triton_arithmetic
from torch import Tensor
from triton.runtime import interpreter

from engine.kernels import (
    STATUS_BAD_PARAMETER,
    EndTokens,
    LogitBias,
    Penalties,
    SampleResult,
    fixed_math,
    noise,
    reference,
    reference_sample,
)
from engine.kernels import triton as backend
from engine.kernels.triton import sample_search

INF, NAN = float("inf"), float("nan")
Case = tuple[str, Tensor, dict[str, Any]]


def patch_once() -> None:
    """The interpreter patches ``triton.language`` anew at every call of a device function, which is most of its time; once a launch is
    enough."""
    patch = interpreter._patch_lang

    def patch_if_needed(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_if_needed


def arguments(count: int, **given: Any) -> dict[str, Any]:
    """Arguments of ``count`` rows: a value for all, or a list of one per row."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": list(range(11, 11 + count)), "position": 7, "stream": 2}
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "position": torch.int32, "stream": torch.int32}
    per_row = {
        name: torch.tensor(given.pop(name, value), dtype=dtypes.get(name, torch.float32)).expand(count).contiguous()
        for name, value in defaults.items()
    }
    return {**per_row, **given}


def take(arguments: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The arguments of some of the rows, in that order."""
    taken = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            taken[name] = value[rows]
        elif isinstance(value, tuple):
            first, end = value.start[rows], value.start[rows + 1]  # type: ignore[attr-defined]
            entries = torch.cat([torch.arange(a, b) for a, b in zip(first.tolist(), end.tolist(), strict=True)])
            start = torch.cat([torch.zeros(1), (end - first).cumsum(0)]).int()
            parts = {
                field: t[entries] if field in ("token", "counts", "bias") else t[rows]
                for field, t in value._asdict().items()  # type: ignore[attr-defined]
                if field != "start"
            }
            taken[name] = type(value)(**parts, start=start)
        else:
            taken[name] = value
    return taken


# ---- groups of cases ----


def controls() -> Iterator[Case]:
    """Every control alone and some together, at its edges; greedy, unfiltered and filtered rows in one call."""
    generator = torch.Generator().manual_seed(1)
    for vocab in (1, 7, 127, 128, 129, 4096, 5000):
        row = torch.randn(vocab, generator=generator) * 3
        masked = row.clone()
        masked[torch.randperm(vocab, generator=generator)[: vocab // 3]] = -INF
        finite = int(masked.isfinite().sum())
        settings: list[dict[str, float]] = [{}, {"temperature": 0.0}, {"temperature": 0.3}]
        settings += [{"top_k": k} for k in (1, 2, 50, finite - 1, finite, vocab, vocab - 1)]
        settings += [{"top_p": p} for p in (0.0, 1e-9, 0.5, 0.9, 1 - 2.0**-24)]
        settings += [{"min_p": p} for p in (1e-40, 1e-4, 0.1, 1.0)]
        settings += [
            {"top_k": 50, "top_p": 0.8, "min_p": 0.05},
            {"top_k": 300, "top_p": 0.95},
            {"top_p": 0.99, "min_p": 1e-3, "temperature": 2.0},
        ]
        if vocab in (127, 4096):  # their neighbours have the rest
            settings = settings[::3]
        columns = {name: [s.get(name, d) for s in settings] for name, d in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))}
        top_k = [int(s.get("top_k", 0)) for s in settings]
        logits = torch.stack([row if i % 2 else masked for i in range(len(settings))])
        yield f"V={vocab}", logits, arguments(len(settings), top_k=top_k, **columns)


def crossing() -> Iterator[Case]:
    """The mass above the threshold is exactly what top-p asks for: -1e-8 is another value than 0 with the same weight."""
    row = torch.full((300,), -INF)
    row[100:200] = -1e-8
    row[200:] = 0.0
    yield "V=300", row.expand(8, -1), arguments(8, top_p=[0.5] * 7 + [0.5 + 2.0**-24])


def hostile() -> Iterator[Case]:
    """A few rows of each of the cases that all backends share, small vocabularies."""
    for i, (vocab, logits, given) in enumerate(sample_cases.cases()):
        if vocab > 5000:
            return
        rows = torch.randperm(len(logits), generator=torch.Generator().manual_seed(i))[: 4 if vocab > 1000 else 6]
        yield f"case {i}, V={vocab}", logits[rows], take(given, rows)


def search() -> Iterator[Case]:
    """Rows that the few candidates of the third kernel do not settle."""
    generator = torch.Generator().manual_seed(2)
    vocab = 20000
    normal = torch.randn(vocab, generator=generator) * 3
    ties = (torch.randn(vocab, generator=generator) * 8).round() / 8
    two = torch.where(torch.arange(vocab) % 3 == 0, 1.0, 1.0 + 2.0**-23)
    sparse = torch.full((vocab,), -INF)
    sparse[1234:4321] = normal[1234:4321]
    block = normal.clone()
    block[640:3200] += 30  # thousands of large logits side by side
    rows = [
        (normal, {"top_p": 0.9}),
        (normal, {"top_p": 0.999, "min_p": 1e-6, "temperature": 3.0}),
        (normal, {"top_k": 1000}),
        (normal, {"top_k": 3000, "top_p": 0.7}),
        (normal, {"top_k": 9000, "top_p": 0.99, "temperature": 4.0}),  # both thresholds, too many candidates: the last resort
        (ties, {"top_k": 10000}),
        (ties, {"top_p": 0.5}),
        (torch.zeros(vocab), {"top_k": 3, "top_p": 0.5}),  # all tie
        (torch.zeros(vocab), {"top_p": 1e-9}),
        (two, {"top_p": 0.5}),
        (two, {"top_k": 6000}),
        (torch.where(torch.arange(vocab) % 2 == 0, 0.0, -1e-8), {"top_p": 0.5}),  # the mass above is exactly what is asked for
        (sparse, {"top_k": 4000, "top_p": 0.9}),
        (block, {"top_k": 40}),  # overflows the candidates
        (block, {"min_p": 1e-7}),
        (torch.full((vocab,), 1e9), {}),  # so large that the noise is lost: every score ties, and no bound tells tokens apart
        (torch.linspace(1e4, 1e4 - 1, vocab), {"top_p": 0.3}),
        (torch.linspace(-1, 1, vocab), {"top_k": 19000}),
    ]
    columns = {name: [s.get(name, d) for _, s in rows] for name, d in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))}
    top_k = [int(s.get("top_k", 0)) for _, s in rows]
    yield "V=20000", torch.stack([row for row, _ in rows]), arguments(len(rows), top_k=top_k, **columns)


def hard_row(vocab: int) -> Tensor:
    """A row with more tokens in one bracket than fit. The sample that chooses the pivots sees none of the tokens that matter, and one
    token far from the others leaves them between two of the pivots that are spread evenly."""
    row = torch.linspace(0, 1e-3, vocab)
    row[torch.arange(1024) * vocab // 1024] = -5.0
    row[1] = 8.0
    return row


def boundaries(row: Tensor, settings: list[dict[str, float]], temperature: float) -> Iterator[Case]:
    """The token with the largest noise is, by its logit, the last one kept, or the first one dropped: in rows as flat as these it is drawn
    or not as the filter is right or wrong by one token."""
    vocab = len(row)
    for setting in settings:
        given = arguments(1, temperature=temperature, **setting)
        z = (row / temperature)[None]
        weight = fixed_math.weight(z - z.max())
        kept = reference_sample._filter(z, z.amax(dim=1, keepdim=True), weight, given["top_k"], given["top_p"], given["min_p"])
        loudest = noise.noise(given["seed"], given["position"], given["stream"], vocab).log_exponential[0].argmin()
        for rank in (int(kept.sum()) - 1, int(kept.sum())):
            swapped = row.clone()
            there = row.argsort(descending=True)[rank]
            swapped[loudest], swapped[there] = row[there], row[loudest]
            drawn = reference.sample(swapped[None], **given).tokens[0] == loudest
            assert drawn == (rank < int(kept.sum())), "the case does not show what it should"
            yield f"{setting}, rank {rank}", swapped[None], given


def flat_boundaries() -> Iterator[Case]:
    row = torch.linspace(0, 1e-2, 5000)[torch.randperm(5000, generator=torch.Generator().manual_seed(7))]
    settings: list[dict[str, float]] = [{"top_k": k} for k in (50, 256, 257, 3000, 4999)]
    settings += [
        {"top_p": 0.5},
        {"top_k": 200, "top_p": 0.5},
        {"top_k": 2000, "top_p": 0.5},
        {"min_p": 0.995},
        {"top_k": 2000, "min_p": 0.999},
    ]
    yield from boundaries(row, settings, 1.0)


def hard_boundaries() -> Iterator[Case]:
    yield from boundaries(hard_row(20000), [{"top_k": 5000}, {"top_p": 0.5}, {"top_k": 12000, "top_p": 0.7}], 20.0)


def large() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(3)
    for vocab, settings in (
        (32000, [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}]),
        (128256, [{}, {"temperature": 0.0}, {"top_k": 50}, {"min_p": 0.02}, {"top_p": 0.9}]),
        (262144, [{"temperature": 0.7}, {"top_k": 200, "top_p": 0.95}]),
    ):
        logits = torch.randn(len(settings), vocab, generator=generator) * 3
        columns = {name: [s.get(name, d) for s in settings] for name, d in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))}
        given = arguments(len(settings), top_k=[int(s.get("top_k", 0)) for s in settings], **columns)
        yield f"V={vocab}", logits.bfloat16() if vocab == 262144 else logits, given


def many_draws() -> Iterator[Case]:
    """Unfiltered rows that few tokens share, whose winner the bounds must not lose; and rows whose winner has a word with a tail, settled
    by its bounds or (with log-probabilities) in the race of all tokens."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.cat([torch.randn(60, 300, generator=generator), torch.full((60, 300), -1e4)])
    logits[60:, 7] = 1.0
    logits[60:, 130] = 2.0
    yield "V=300", logits, arguments(120, position=list(range(120)), seed=list(range(-60, 60)))

    rare = torch.tensor([(14677, 1659), (16242, 722), (26827, 612)])  # position, token: words below 256 of seed 2024 and stream 0
    logits = torch.zeros(3, 4096)
    logits[torch.arange(3), rare[:, 1]] = -6.0
    for logprobs in (None, 0):
        given = arguments(3, seed=2024, stream=0, position=rare[:, 0].tolist(), logprobs=logprobs)
        assert torch.equal(reference.sample(logits, **given).tokens, rare[:, 1]), "the case does not show what it should"
        yield f"tails, logprobs={logprobs}", logits, given


def bad_parameters() -> Iterator[tuple[str, dict[str, Any], list[bool]]]:
    """Arguments of rows of 40 logits, and which of them have a value that is out of range."""
    for name, values, bad in (
        ("temperature", [0.0, 1.0, -1e-9, INF, NAN, -INF], [0, 0, 1, 1, 1, 1]),
        ("top_p", [0.0, 1.0, -1e-9, 1.0 + 2.0**-23, NAN], [0, 0, 1, 1, 1]),
        ("min_p", [0.0, 1.0, -1e-9, 1.0 + 2.0**-23, NAN], [0, 0, 1, 1, 1]),
    ):
        yield name, arguments(len(values), **{name: values}), [bool(b) for b in bad]

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def penalties(rows: int, **given: Any) -> dict[str, Any]:
        whole = {"repetition": torch.full((rows,), 1.5), "presence": torch.zeros(rows), "frequency": torch.ones(rows)}
        whole |= {"token": torch.arange(rows).int(), "counts": torch.ones(rows).int(), "start": torch.arange(rows + 1).int()}
        return arguments(rows, penalties=Penalties(**{**whole, **given}))

    yield "repetition", penalties(5, repetition=torch.tensor([0.5, 0.0, -1.0, INF, NAN])), [False, True, True, True, True]
    yield "presence", penalties(4, presence=torch.tensor([1e30, -1.1e30, INF, NAN])), [False, True, True, True]
    yield "frequency", penalties(4, frequency=torch.tensor([-1e30, 1.1e30, -INF, NAN])), [False, True, True, True]
    yield "counts", penalties(4, counts=ints(0, 1 << 24, (1 << 24) + 1, -1)), [False, False, True, True]
    yield "token", penalties(5, token=ints(0, 39, 40, -1, 2**31 - 1)), [False, False, True, True, True]
    yield "start", penalties(5, start=ints(0, 1, -3, 2, 6, 5)), [False, True, True, True, True]
    yield "repeated token", penalties(2, token=ints(5, 5), start=ints(0, 2, 2)), [True, False]
    for name, values, bad in (
        ("bias", [1e30, -1e30, -INF, INF, 1.1e30, NAN], [0, 0, 0, 1, 1, 1]),
        ("token", [0, 39, 40, -1], [0, 0, 1, 1]),
    ):
        count = len(values)
        whole = {"token": torch.arange(count).int(), "bias": torch.zeros(count), "start": torch.arange(count + 1).int()}
        whole[name] = torch.tensor(values).to(whole[name].dtype)
        yield f"bias.{name}", arguments(count, bias=LogitBias(**whole)), [bool(b) for b in bad]
    yield "repeated bias", arguments(2, bias=LogitBias(ints(3, 9, 3), torch.ones(3), ints(0, 3, 3))), [True, False]
    ends = EndTokens(ints(0, 40, 7, 7, -1), ints(99, 99, 99, 99), ints(0, 1, 2, 4, 5))
    yield "end_tokens.token", arguments(4, end_tokens=ends), [False, True, False, True]


# ---- comparison ----


def compare(case: Case, result: SampleResult, expected: SampleResult) -> list[str]:
    """What is different."""
    wrong = []
    for field, got, want in zip(SampleResult._fields, result, expected, strict=True):
        if (got is None) != (want is None):
            wrong.append(f"{field} is {'absent' if got is None else 'there'}")
        elif got is not None:
            same = torch.isclose(got, want, rtol=2e-6, atol=4e-6, equal_nan=True) if got.is_floating_point() else got == want
            for row in (~same).reshape(len(same), -1).any(dim=1).nonzero()[:2, 0].tolist():
                wrong.append(f"{case[0]} row {row}: {field} is {got[row].tolist()}, the oracle's {want[row].tolist()}")
    return wrong


def run(cases: Iterator[Case], sample: Callable[..., SampleResult] = backend.sample) -> dict[str, Any]:
    started, count, wrong, statuses = time.perf_counter(), 0, [], Counter[int]()
    for case in cases:
        _, logits, given = case
        result = sample(logits, **given)
        wrong += compare(case, result, reference.sample(logits, **given))
        count += len(logits)
        statuses.update(result.status.tolist())
    return {"rows": count, "wrong": wrong, "statuses": sorted(statuses), "seconds": round(time.perf_counter() - started, 1)}


def paths(group: Callable[[], Iterator[Case]]) -> dict[str, Any]:
    """Run a group and count the ways its thresholds were found in the search."""
    calls = Counter[str]()

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(sample_search, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    names = ("kth_largest", "mass_threshold", "race_candidates", "_last_resort")
    originals = {name: getattr(sample_search, name) for name in names}
    for name in names:
        setattr(sample_search, name, counted(name))
    outcome = run(group())
    for name in names:
        setattr(sample_search, name, originals[name])
    return {**outcome, "calls": dict(calls)}


def batch_positions() -> dict[str, Any]:
    """Rows in another order, with others around them, and alone give the same tokens."""
    wrong = []
    _, logits, given = next(case for case in controls() if case[0] == "V=129")
    together = backend.sample(logits, **given)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    shuffled = backend.sample(logits[order], **take(given, order))
    if not torch.equal(shuffled.tokens, together.tokens[order]):
        wrong.append("shuffled rows")
    for row in range(0, len(logits), 5):
        one = torch.tensor([row])
        if backend.sample(logits[one], **take(given, one)).tokens[0] != together.tokens[row]:
            wrong.append(f"row {row} alone")
    # Rows apart in memory, unaligned, and all the same row.
    wide = torch.full((len(logits), 135), NAN)
    wide[:, 3:132] = logits
    if not torch.equal(backend.sample(wide[:, 3:132], **given).tokens, together.tokens):
        wrong.append("row stride 135")
    expanded = logits[:1].expand(5, -1)
    if not torch.equal(backend.sample(expanded, **arguments(5)).tokens, reference.sample(expanded, **arguments(5)).tokens):
        wrong.append("row stride 0")
    return {"rows": 2 * len(logits), "wrong": wrong}


def statuses_of_bad_parameters() -> dict[str, Any]:
    """Rows with a bad value have that status and no token; the others have what they would have without them."""
    wrong, count = [], 0
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(5))
    for name, given, bad in bad_parameters():
        rows = logits.expand(len(bad), -1)
        for logprobs in (None, 2):
            result = backend.sample(rows, **given, logprobs=logprobs)
            if [s == STATUS_BAD_PARAMETER for s in result.status.tolist()] != bad or [t == -1 for t in result.tokens.tolist()] != bad:
                wrong.append(f"{name}: status is {result.status.tolist()}, tokens are {result.tokens.tolist()}")
            if logprobs and (result.top_tokens[torch.tensor(bad)] != -1).any():
                wrong.append(f"{name}: tokens of a bad row")
        good = torch.tensor([i for i, b in enumerate(bad) if not b])
        if len(good):
            kept = take(given, good)
            wrong += compare((name, rows, given), backend.sample(rows[good], **kept), reference.sample(rows[good], **kept))
        count += len(bad)
    return {"rows": count, "wrong": wrong}


def workspaces() -> dict[str, Any]:
    """A workspace is used again and again, by calls of fewer rows too, and its results are views of it."""
    wrong = []
    generator = torch.Generator().manual_seed(6)
    workspace = backend.Workspace(5, 300, "cpu", max_logprobs=4)
    for count, logprobs, top_k in ((5, 4, 3), (2, None, 0), (3, 2, 7), (5, 0, 0), (0, None, 0)):
        logits = torch.randn(count, 300, generator=generator)
        given = arguments(count, top_k=top_k, **sample_cases.lists(count, 300, generator)) if count else arguments(0)
        result = backend.sample(logits, **given, logprobs=logprobs, workspace=workspace)
        wrong += compare((f"{count} rows", logits, given), result, reference.sample(logits, **given, logprobs=logprobs)) if count else []
        if result.tokens.shape != (count,) or result.tokens.data_ptr() not in (0, workspace.tokens.data_ptr()):
            wrong.append(f"{count} rows: the tokens are no view of the workspace")
    return {"rows": 15, "wrong": wrong}


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "arithmetic": triton_arithmetic.check,
    "controls": lambda: run(controls()),
    "crossing": lambda: run(crossing()),
    "hostile": lambda: run(hostile()),
    "search": lambda: paths(search),
    "flat_boundaries": lambda: run(flat_boundaries()),
    "hard_boundaries": lambda: paths(hard_boundaries),
    "large": lambda: run(large()),
    "many_draws": lambda: run(many_draws()),
    "batch_positions": batch_positions,
    "bad_parameters": statuses_of_bad_parameters,
    "workspaces": workspaces,
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's about -inf and NaN
    patch_once()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
