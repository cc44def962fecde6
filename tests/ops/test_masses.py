"""``masses``: the C++ kernel of every instruction set gives the oracle's integers, and they are what ``sample`` draws from."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import masses_cases
import pytest
import sample_cases
import torch
from torch import Tensor

from engine.kernels import cpu, fixed_math, reference
from engine.kernels.api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, EndTokens, LogitBias, Penalties

INF, NAN = math.inf, math.nan
WHOLE = 1 << fixed_math.WEIGHT_BITS
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return {"reference": reference, "cpu": cpu}[request.param]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = cpu._cpu.num_threads()
    yield
    cpu._cpu.set_num_threads(before)


def arguments(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, Tensor]:
    return {
        "temperature": torch.full((rows,), float(temperature)),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32),
        "top_p": torch.full((rows,), float(top_p)),
        "min_p": torch.full((rows,), float(min_p)),
        "position": torch.arange(rows, dtype=torch.int32),
    }


# ---- the same integers everywhere ----


@pytest.fixture(scope="module")
def oracle() -> list[tuple[Tensor, Tensor]]:
    return masses_cases.run_all(reference.masses)


def compare_with_oracle(results: list[tuple[Tensor, Tensor]], oracle: list[tuple[Tensor, Tensor]]) -> None:
    for (vocab, logits, given), (digest, status), (expected, expected_status) in zip(masses_cases.cases(), results, oracle, strict=True):
        wrong = ((digest != expected).any(dim=1) | (status != expected_status)).nonzero()[:, 0].tolist()
        first = {name: t[wrong[0]].item() for name, t in given.items() if isinstance(t, Tensor) and t.dim() == 1} if wrong else None
        assert not wrong, f"V={vocab}: {len(wrong)} of {len(logits)} rows differ, first row {wrong[0]} with {first}, {sorted(given)}"


def test_oracle_covers_every_status(oracle: list[tuple[Tensor, Tensor]]) -> None:
    assert set(torch.cat([status for _, status in oracle]).tolist()) == {STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED}


@needs_cpp
def test_cpp_gives_the_oracles_integers(oracle: list[tuple[Tensor, Tensor]]) -> None:
    compare_with_oracle(masses_cases.run_all(cpu.masses), oracle)


@needs_cpp
def test_every_instruction_set_gives_the_oracles_integers(oracle: list[tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    for isa in cpu._cpu.supported_isas():
        if isa == cpu._cpu.isa():
            continue
        command = [sys.executable, masses_cases.__file__, isa, str(tmp_path / isa)]
        subprocess.run(command, check=True, env={**os.environ, "ENGINE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})
        compare_with_oracle(torch.load(tmp_path / isa), oracle)


@needs_cpp
@pytest.mark.usefixtures("restore_threads")
def test_threads_and_batch_make_no_difference() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(7, 70_001, generator=generator) * 3
    given = arguments(7, 0.8, top_p=0.9)
    given["top_k"] = torch.tensor([0, 50, 0, 1, 3000, 60_000, 5], dtype=torch.int32)
    together, _ = cpu.masses(logits, **given)
    for threads in (1, 3):
        cpu._cpu.set_num_threads(threads)
        for order in ([6, 2, 0, 5, 1, 3, 4], [3], [5, 0]):
            mass, _ = cpu.masses(logits[order], **{name: t[order] for name, t in given.items()})
            assert torch.equal(mass, together[order])


# ---- what sample draws from ----


def test_shares_are_the_processed_probabilities_of_sample(backend: Any) -> None:
    """A sampled row has the probabilities that ``sample`` reports, a greedy one is all on the token it takes."""
    compared = 0
    for vocab, logits, given in sample_cases.cases():
        if vocab > 4096:
            break
        mass, status = backend.masses(logits, **{name: v for name, v in given.items() if name not in masses_cases.NOT_OF_MASSES})
        result = backend.sample(logits, **{**given, "logprobs": vocab})
        assert torch.equal(status, result.status)
        ok, greedy = status == STATUS_OK, given["temperature"] < 1e-5
        assert (mass >= 0).all() and not mass[~ok].any()
        chosen = torch.zeros_like(mass).scatter(1, result.tokens.clamp(min=0)[:, None], WHOLE)
        assert torch.equal(mass[greedy & ok], chosen[greedy & ok])
        # In one more column: what is not possible, -1.
        probabilities = torch.zeros(len(logits), vocab + 1).scatter(
            1, result.processed_top_tokens % (vocab + 1), result.processed_top_logprobs.exp()
        )
        sampled = (~greedy & ok).nonzero()[:, 0]
        share = mass[sampled].double() / mass[sampled].sum(dim=1, keepdim=True)
        assert torch.allclose(share, probabilities[sampled, :vocab].double(), rtol=2e-6, atol=1e-11)
        compared += len(sampled)
    assert compared > 1000


def test_masses_of_a_row_by_hand(backend: Any) -> None:
    """``floor(exp(z - max z) 2^40)`` of what each filter keeps, ties included."""
    logits = torch.tensor([[1.0, 3.0, 2.0, -INF, 2.0, -40.0, 0.0]])
    whole = [math.floor(math.exp(x - 3.0) * WHOLE) for x in (1.0, 3.0, 2.0, -INF, 2.0, -40.0, 0.0)]
    assert whole[5] == 0  # kept, and as good as impossible
    for given, kept in (
        ({}, {0, 1, 2, 4, 5, 6}),
        ({"top_k": 2}, {1, 2, 4}),
        ({"top_k": 4}, {0, 1, 2, 4}),
        ({"top_p": 0.6}, {1, 2, 4}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.2}, {1, 2, 4}),
        ({"min_p": 0.1, "top_k": 1}, {1}),
    ):
        mass, status = backend.masses(logits, **arguments(1, **given))
        assert status.tolist() == [STATUS_OK]
        assert {i for i in range(7) if mass[0, i]} == kept - {5}
        expected = torch.tensor([[w if i in kept else 0 for i, w in enumerate(whole)]], dtype=torch.float64)
        assert torch.allclose(mass.double(), expected, rtol=2e-7, atol=1.0)


def test_greedy_and_infinite_rows(backend: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [0.0, INF, INF], [NAN, INF, 0.0], [-INF] * 3])
    greedy, status = backend.masses(logits, **arguments(4, 0.0, top_k=1, top_p=0.1))
    assert greedy.tolist() == [[0, WHOLE, 0], [0, WHOLE, 0], [0, 0, 0], [0, 0, 0]]
    assert status.tolist() == [STATUS_OK, STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED]
    sampled, status = backend.masses(logits, **arguments(4, 0.7, top_k=1))
    assert sampled.tolist() == [[0, WHOLE, WHOLE], [0, WHOLE, WHOLE], [0, 0, 0], [0, 0, 0]]
    assert status.tolist() == [STATUS_OK, STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED]


def test_lists_and_mask_change_the_masses(backend: Any) -> None:
    logits = torch.zeros(1, 5)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    mass, _ = backend.masses(
        logits, **arguments(1),
        penalties=Penalties(torch.ones(1), torch.full((1,), math.log(2)), torch.zeros(1), ints(0), ints(1), ints(0, 1)),
        bias=LogitBias(ints(1), torch.tensor([-INF]), ints(0, 1)), end_tokens=EndTokens(ints(2), ints(1), ints(0, 1)),
        allowed=ints(0b01111)[None],
    )  # fmt: skip
    assert mass.tolist() == [[pytest.approx(WHOLE / 2, rel=1e-6), 0, 0, WHOLE, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must be \\[R, V\\] with V >= 1 and unit stride in V, got shape \\(2, 0\\)"),
        ({"temperature": torch.tensor([1.0, NAN])}, ValueError, "temperature must be finite and >= 0, got nan at 1"),
        ({"top_k": torch.zeros(2)}, TypeError, "top_k must be int32, got torch.float32"),
        ({"top_p": torch.tensor([1.5, 1.0])}, ValueError, "top_p must be in \\[0, 1\\], got 1.5 at 0"),
        ({"min_p": torch.zeros(3)}, ValueError, "min_p must have shape \\[R\\] = \\(2,\\), got \\(3,\\)"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, TypeError, "position must be int32, got torch.int64"),
        ({"allowed": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "allowed must have shape \\[R, ceil\\(V / 32\\)\\] = \\(2, 1\\)"),
    ],
)
def test_bad_input(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        backend.masses(**{"logits": torch.zeros(2, 9), **arguments(2), **change})
