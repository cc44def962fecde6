"""``beam_select``: the C++ of every instruction set finds the oracle's continuations, to the bit; semantics against plain PyTorch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beam_cases
import pytest
import torch
from torch import Tensor

from engine.kernels import cpu, reference
from engine.kernels.api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, BeamResult, EndTokens, LogitBias, Penalties

INF, NAN = math.inf, math.nan
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(params=["reference", "cpu"])
def beam_select(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return {"reference": reference, "cpu": cpu}[request.param].beam_select


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = cpu._cpu.num_threads()
    yield
    cpu._cpu.set_num_threads(before)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(scores: list[float], group_start: list[int], num_candidates: int) -> dict[str, Any]:
    n = len(scores)
    return {
        "scores": torch.tensor(scores),
        "group_start": ints(*group_start),
        "num_candidates": num_candidates,
        "temperature": torch.ones(n),
        "top_k": torch.zeros(n, dtype=torch.int32),
        "position": torch.full((n,), 9, dtype=torch.int32),
    }


def same(a: Any, b: Any) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.view(torch.int32) if t.is_floating_point() else t

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def oracle() -> list[BeamResult]:
    return beam_cases.run_all(reference.beam_select)


def compare_with_oracle(results: Any, oracle: list[BeamResult]) -> None:
    for (logits, given), result, expected in zip(beam_cases.cases(), results, oracle, strict=True):
        for name, mine, theirs in zip(BeamResult._fields, result, expected, strict=True):
            if not same([mine], [theirs]):
                at = (mine != theirs).nonzero()[0].tolist()
                raise AssertionError(f"{name} differs at {at}: V={logits.shape[1]}, C={given['num_candidates']}, {sorted(given)}")


@needs_cpp
def test_cpp_finds_the_oracles_continuations(oracle: list[BeamResult]) -> None:
    compare_with_oracle(beam_cases.run_all(cpu.beam_select), oracle)


@needs_cpp
def test_every_instruction_set_finds_the_oracles_continuations(oracle: list[BeamResult], tmp_path: Path) -> None:
    for isa in cpu._cpu.supported_isas():
        if isa == cpu._cpu.isa():
            continue
        command = [sys.executable, beam_cases.__file__, isa, str(tmp_path / isa)]
        subprocess.run(command, check=True, env={**os.environ, "ENGINE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})
        compare_with_oracle(torch.load(tmp_path / isa), oracle)


@needs_cpp
@pytest.mark.usefixtures("restore_threads")
def test_threads_and_other_groups_make_no_difference() -> None:
    generator = torch.Generator().manual_seed(5)
    for vocab in (129, 5000, 70_001):
        logits = torch.randn(6, vocab, generator=generator) * 3
        given = arguments([0.0, -1.0, -1.0, -2.5, -3.0, -0.5], [0, 1, 4, 6], 10)
        cpu._cpu.set_num_threads(1)
        expected = cpu.beam_select(logits, **given)
        for threads in (2, 3, 9):
            cpu._cpu.set_num_threads(threads)
            assert same(cpu.beam_select(logits, **given), expected)
        for g, (first, last) in enumerate(((0, 1), (1, 4), (4, 6))):
            alone = cpu.beam_select(logits[first:last], **arguments(given["scores"][first:last].tolist(), [0, last - first], 10))
            assert same(alone[:2], [t[g : g + 1] for t in expected[:2]]) and same([alone.logprobs], [expected.logprobs[g : g + 1]])
            assert torch.equal(alone.parents + first, expected.parents[g : g + 1])


def test_it_is_the_log_softmax_and_its_largest_sums(beam_select: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for vocab, scale in ((7, 1.0), (1000, 3.0), (40_000, 0.5)):
        logits = torch.randn(5, vocab, generator=generator) * scale
        result = beam_select(logits, **arguments([0.0, -1.0, -1.5, 0.0, -0.25], [0, 3, 5], 12))
        law = logits.double().log_softmax(dim=1)
        for g, (first, last) in enumerate(((0, 3), (3, 5))):
            total = (law + torch.tensor([0.0, -1.0, -1.5, 0.0, -0.25]).double()[:, None])[first:last].flatten()
            best = total.topk(12)
            assert torch.allclose(result.scores[g].double(), best.values, rtol=0, atol=2e-6)
            assert torch.equal(result.tokens[g], best.indices % vocab)
            assert torch.equal(result.parents[g].long(), first + best.indices // vocab)
            chosen = law[result.parents[g].long(), result.tokens[g]]
            assert torch.allclose(result.logprobs[g].double(), chosen, rtol=0, atol=2e-6)
        assert result.status.tolist() == [STATUS_OK] * 5


def test_ties_go_to_the_lower_row_and_the_lower_token(beam_select: Any) -> None:
    for vocab in (3, 500):
        result = beam_select(torch.zeros(2, vocab), **arguments([-1.0, -1.0], [0, 2], vocab + 2))
        assert result.tokens[0].tolist() == [*range(vocab), 0, 1]
        assert result.parents[0].tolist() == [0] * vocab + [1, 1]


def test_fewer_continuations_than_asked_for(beam_select: Any) -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [0.0, 0.0, NAN], [-INF] * 3, [5.0, 1.0, 2.0]])
    result = beam_select(logits, **arguments([0.0, 0.0, 0.0, -INF], [0, 4], 5))
    assert result.tokens[0].tolist() == [2, 0, -1, -1, -1] and result.parents[0].tolist() == [0, 0, -1, -1, -1]
    assert result.scores[0, 2:].tolist() == result.logprobs[0, 2:].tolist() == [-INF] * 3
    assert result.status.tolist() == [STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_NOTHING_ALLOWED]


def test_infinite_logits_share(beam_select: Any) -> None:
    result = beam_select(torch.tensor([[0.0, INF, 3.0, INF]]), **arguments([-2.0], [0, 1], 4))
    assert result.tokens[0].tolist() == [1, 3, -1, -1]
    assert result.logprobs[0, :2].tolist() == pytest.approx([-math.log(2)] * 2)


def test_temperature_and_top_k_renormalise_and_lists_do_not(beam_select: Any) -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 0.0, -1.0]])
    given = {**arguments([0.0], [0, 1], 5), "temperature": torch.tensor([0.5]), "top_k": ints(2)}
    law = (logits[0, :3].double() / 0.5).log_softmax(dim=0).tolist()
    plain = beam_select(logits, **given)
    assert plain.tokens[0].tolist() == [0, 1, 2, -1, -1]
    assert plain.logprobs[0, :3].tolist() == pytest.approx(law, abs=1e-6)
    changed = beam_select(
        logits, **given,
        penalties=Penalties(torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([0.5]), ints(1), ints(1), ints(0, 1)),
        bias=LogitBias(ints(2), torch.tensor([-0.125]), ints(0, 1)),
        end_tokens=EndTokens(ints(0), ints(10), ints(0, 1)),
    )  # fmt: skip
    assert changed.tokens[0].tolist() == [2, 1, -1, -1, -1]
    assert changed.logprobs[0, :2].tolist() == pytest.approx([law[2] - 0.125, law[1] * 2.0 - 0.5 - 0.25], abs=1e-6)
    masked = beam_select(logits, **given, allowed=ints(0b10110)[None])
    assert masked.tokens[0].tolist() == [1, 2, -1, -1, -1]
    assert masked.logprobs[0, :2].tolist() == pytest.approx(law[1:], abs=1e-6)


def test_noise_draws_without_replacement(beam_select: Any) -> None:
    """The first of a perturbed row is what ``sample`` draws; the first two come as often as by drawing one after the other."""
    from scipy import stats

    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    n = 20_000
    given = {
        **arguments([0.0] * n, list(range(n + 1)), 2),
        "seed": torch.arange(n),
        "stream": torch.full((n,), 7, dtype=torch.int32),
    }
    logits = p.log().repeat(n, 1)
    result = beam_select(logits, **given)
    drawn = reference.sample(
        logits, given["temperature"], given["top_k"], torch.ones(n), torch.zeros(n), given["seed"], given["position"], given["stream"]
    )
    # Subtracting the logarithm of the sum may round a near tie the other way.
    assert int((result.tokens[:, 0] != drawn.tokens).sum()) <= 2
    observed = (result.tokens[:, 0] * 4 + result.tokens[:, 1]).bincount(minlength=16)
    expected = torch.tensor([[0.0 if i == j else float(p[i] * p[j] / (1 - p[i])) for j in range(4)] for i in range(4)]).flatten() * n
    assert not observed[expected == 0].any()
    possible = expected > 0
    scaled = expected[possible].double() * n / expected.double().sum()
    assert stats.chisquare(observed[possible].numpy(), scaled.numpy()).pvalue > 1e-6


# ---- refusals ----

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(3, 4).double()}, TypeError, "logits must be float32, bfloat16 or float16"),
    ({"scores": torch.zeros(2)}, ValueError, "scores must have shape"),
    ({"scores": torch.tensor([0.0, NAN, 0.0])}, ValueError, "scores must be within -1e30 and 1e30, or -inf, got nan at 1"),
    ({"scores": torch.tensor([0.0, 0.0, INF])}, ValueError, "scores must be within -1e30 and 1e30, or -inf, got inf at 2"),
    ({"group_start": ints(0, 2)}, ValueError, r"group_start must rise from 0 to 3, the number of rows, got \[0, 2\]"),
    ({"group_start": ints(0, 2, 1, 3)}, ValueError, "group_start must rise from 0 to 3"),
    ({"group_start": ints(1, 3)}, ValueError, "group_start must rise from 0 to 3"),
    ({"group_start": torch.zeros(0, dtype=torch.int32)}, ValueError, r"group_start must have shape \[G \+ 1\]"),
    ({"group_start": torch.zeros(2)}, TypeError, "group_start must be int32"),
    ({"num_candidates": 0}, ValueError, "num_candidates must be at least 1, got 0"),
    ({"num_candidates": 2.0}, TypeError, "num_candidates must be an integer, got 2.0"),
    ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "temperature must be finite and > 0, got 0.* at 1"),
    ({"top_k": torch.zeros(3)}, TypeError, "top_k must be int32"),
    ({"position": ints(1)}, ValueError, "position must have shape"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed and stream must be given together, got None for stream"),
    ({"stream": ints(0, 0, 0)}, ValueError, "seed and stream must be given together, got None for seed"),
    ({"allowed": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "allowed must have shape"),
    ({"bias": LogitBias(ints(0, 0), torch.zeros(2), ints(0, 2, 2, 2))}, ValueError, "bias.token must be distinct in each row, got 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(beam_select: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(3, 4), **arguments([0.0, -1.0, 0.0], [0, 2, 3], 5)}
    beam_select(**good)
    with pytest.raises(error, match=message):
        beam_select(**{**good, **change})
