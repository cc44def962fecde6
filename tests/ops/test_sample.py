"""``sample``: the C++ kernel of every instruction set draws the oracle's token on every row; semantics against plain loops."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_cases
import torch
from torch import Tensor

from engine.kernels import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, cpu, noise, reference

INF, NAN = math.inf, math.nan
BACKENDS = ["reference", "cpu"]
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(params=BACKENDS)
def sample(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return {"reference": reference, "cpu": cpu}[request.param].sample


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = cpu._cpu.num_threads()
    yield
    cpu._cpu.set_num_threads(before)


def arguments(rows: int, temperature: float = 1.0, top_k: int = 0, first_position: int = 0) -> dict[str, Tensor]:
    return {
        "temperature": torch.full((rows,), temperature),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32),
        "seed": torch.full((rows,), 1234),
        "position": torch.arange(first_position, first_position + rows, dtype=torch.int32),
        "stream": torch.zeros(rows, dtype=torch.int32),
    }


def same(a: Any, b: Any) -> bool:
    """The same bits in tokens, logprobs and status."""
    return torch.equal(a[0], b[0]) and torch.equal(a[1].view(torch.int32), b[1].view(torch.int32)) and torch.equal(a[2], b[2])


# ---- the same token everywhere ----


@pytest.fixture(scope="module")
def oracle() -> list[tuple[Tensor, Tensor, Tensor]]:
    return sample_cases.run_all(reference.sample)


def compare_with_oracle(results: Any, oracle: Any) -> None:
    for (vocab, logits, given), result, expected in zip(sample_cases.cases(), results, oracle, strict=True):
        wrong = ((result[0] != expected[0]) | (result[2] != expected[2])).nonzero()[:, 0].tolist()
        first = {name: t[wrong[0]].item() for name, t in given.items()} if wrong else None
        assert not wrong, f"V={vocab}: {len(wrong)} of {len(logits)} rows differ, first row {wrong[0]} with {first}"
        assert torch.allclose(result[1], expected[1], rtol=1e-6, atol=2e-6, equal_nan=True)


def test_oracle_covers_every_status(oracle: Any) -> None:
    status = torch.cat([result[2] for result in oracle])
    assert set(status.tolist()) == {STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED}


@needs_cpp
def test_cpp_draws_the_oracles_tokens(oracle: Any) -> None:
    compare_with_oracle(sample_cases.run_all(cpu.sample), oracle)


@needs_cpp
def test_every_instruction_set_draws_the_oracles_tokens(oracle: Any, tmp_path: Path) -> None:
    for isa in cpu._cpu.supported_isas():
        if isa == cpu._cpu.isa():
            continue
        command = [sys.executable, sample_cases.__file__, isa, str(tmp_path / isa)]
        subprocess.run(command, check=True, env={**os.environ, "ENGINE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})
        compare_with_oracle(torch.load(tmp_path / isa), oracle)


@needs_cpp
@pytest.mark.usefixtures("restore_threads")
def test_threads_and_batch_make_no_difference() -> None:
    """A row alone, in every place of a shuffled batch, and split over any number of threads: the same bits."""
    generator = torch.Generator().manual_seed(5)
    for vocab in (129, 5000, 70_001):  # the last is split over threads
        logits = torch.randn(7, vocab, generator=generator) * 3
        given = arguments(7)
        given["top_k"] = torch.tensor([0, 50, 0, 1, 3000, 0, 200], dtype=torch.int32)
        given["temperature"] = torch.tensor([1.0, 1.0, 0.3, 1.0, 2.0, 0.0, 0.7])
        cpu._cpu.set_num_threads(1)
        expected = cpu.sample(logits, **given)
        for threads in (1, 2, 3, 9):
            cpu._cpu.set_num_threads(threads)
            for _ in range(3):
                order = torch.randperm(7, generator=generator)
                shuffled = cpu.sample(logits[order], **{name: t[order] for name, t in given.items()})
                assert same(shuffled, [t[order] for t in expected])
            for row in range(7):
                alone = cpu.sample(logits[row : row + 1], **{name: t[row : row + 1] for name, t in given.items()})
                assert same(alone, [t[row : row + 1] for t in expected])


@needs_cpp
@pytest.mark.parametrize(("position", "token"), [(487, 2256), (379, 21310), (529, 33467)])
def test_tokens_with_a_tail_win(position: int, token: int) -> None:
    """A word below 256 (one in 2^24; see test_noise) is noise above 16.6: on a flat row, and even 10 below the rest, it wins."""
    given = {name: t[:1] for name, t in arguments(1, first_position=position).items()} | {
        "seed": torch.tensor([7]),
        "stream": torch.tensor([1], dtype=torch.int32),
    }
    flat = torch.zeros(1, token + 50)
    assert cpu.sample(flat, **given).tokens.item() == reference.sample(flat, **given).tokens.item() == token
    flat[0, :30] = 3.0
    flat[0, token] = -0.5
    assert cpu.sample(flat, **given).tokens.item() == reference.sample(flat, **given).tokens.item() == token


# ---- semantics ----


def test_greedy_takes_the_lowest_id_of_the_largest(sample: Any) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-0.0, 0.0, -1.0, 0.0], [-INF, -3.0, -3.0, -INF]])
    for temperature in (0.0, 9e-6):
        assert sample(logits, **arguments(3, temperature)).tokens.tolist() == [1, 0, 1]


def test_score_is_the_one_of_the_law(sample: Any) -> None:
    """Against Python floats and integers for a handful of tokens."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0]]).repeat(200, 1)
    given = arguments(200, temperature=0.7)
    log_e = noise.noise(given["seed"], given["position"], given["stream"], 5).log_exponential
    expected = (logits.double() / 0.7 - log_e.double()).argmax(dim=1)
    assert torch.equal(sample(logits, **given).tokens, expected)


def test_top_k_keeps_all_ties_and_nothing_else(sample: Any) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0, 2.0, -1.0]]).repeat(500, 1)
    for top_k, kept in ((1, {0}), (2, {0, 2, 3, 5}), (4, {0, 2, 3, 5}), (5, {0, 1, 2, 3, 5}), (7, set(range(7))), (-1, set(range(7)))):
        assert set(sample(logits, **arguments(500, 2.0, top_k)).tokens.tolist()) == kept


def test_top_k_ties_are_those_of_the_divided_logits(sample: Any) -> None:
    """Two neighbouring floats can have one quotient: they tie."""
    low = torch.tensor(1.9)
    high = torch.nextafter(low, torch.tensor(2.0))
    temperature = next(float(t) for t in torch.linspace(1.2, 1.8, 1000) if low / t == high / t)
    logits = torch.stack([low, high, torch.tensor(-50.0)]).repeat(100, 1)
    assert set(sample(logits, **arguments(100, temperature, 1)).tokens.tolist()) == {0, 1}


def test_minus_infinity_is_never_drawn(sample: Any) -> None:
    logits = torch.full((300, 200), -INF)
    logits[:, 150:153] = torch.tensor([0.0, -40.0, -80.0])
    for top_k in (0, 2, 3, 4, 199, 200):
        assert set(sample(logits, **arguments(300, 50.0, top_k)).tokens.tolist()) <= {150, 151, 152}


def test_infinity_and_nan(sample: Any) -> None:
    logits = torch.tensor([[0.0, INF, 1.0, INF], [0.0, NAN, INF, 1.0], [-INF] * 4, [INF, -INF, 0.0, 0.0]])
    for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 1), (1.0, 3)):
        tokens, logprobs, status = sample(logits, **arguments(4, temperature, top_k))
        assert tokens.tolist() == [1, -1, -1, 0]
        assert status.tolist() == [STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK]
        assert torch.allclose(logprobs, torch.tensor([-math.log(2), NAN, NAN, 0.0]), equal_nan=True)


def test_logprob_is_the_raw_one(sample: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for vocab, scale, offset in ((5, 1.0, 0.0), (4097, 5.0, 100.0), (40_000, 0.5, -1e4), (9000, 30.0, 0.0), (300, 1e37, 0.0)):
        logits = torch.randn(4, vocab, generator=generator) * scale + offset
        tokens, logprobs, _ = sample(logits, **arguments(4, temperature=2.0, top_k=vocab // 2))
        exact = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(logprobs.double(), exact, rtol=2e-7, atol=1e-6)


def penalise_plainly(logits: Tensor, penalty: Tensor, history: Tensor, start: Tensor) -> Tensor:
    out = logits.clone()
    for row in range(len(logits)):
        for token in set(history[start[row] : start[row + 1]].tolist()):
            value = logits[row, token]
            out[row, token] = value / penalty[row] if value > 0 else value * penalty[row]
    return out


@pytest.mark.parametrize("vocab", [10, 1000, 70_000])
def test_repetition_penalty(sample: Any, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator) * 3
    logits[4, :5] = torch.tensor([0.0, -INF, -0.0, 2.0, -2.0])
    start = torch.tensor([0, 0, 5, 40, 100, 101, 300], dtype=torch.int32)
    history = torch.randint(0, vocab, (310,), generator=generator, dtype=torch.int32)
    history[40:60] = logits[3].topk(min(20, vocab)).indices.repeat(2)[:20].int()  # what would be drawn, some of it twice
    penalty = torch.tensor([1.5, 1.3, 1.0, 5.0, 0.5, 100.0])
    given = {"repetition_penalty": penalty, "history": history, "history_start": start}
    before = logits.clone()
    penalised = penalise_plainly(logits, penalty, history, start)
    for temperature, top_k in ((0.0, 0), (1.0, 0), (0.8, 3)):
        row = arguments(6, temperature, top_k)
        tokens, logprobs, _ = sample(logits, **row, **given)
        assert torch.equal(tokens, sample(penalised, **row).tokens)
        raw = before.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(logprobs.double(), raw, rtol=2e-7, atol=1e-6)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))


def test_rows_of_any_stride(sample: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    wide = torch.randn(12, 1000, generator=generator)
    before = wide.clone()
    for view in (wide[::3, 5:505], wide[2:3, :77].expand(6, 77), wide[1::2, 999:], wide[:0], wide[:, 3:4]):
        given = arguments(len(view), 0.9, 20)
        assert same(sample(view, **given), sample(view.contiguous(), **given))
    assert torch.equal(wide, before)


def test_seed_position_and_stream_all_matter(sample: Any) -> None:
    logits = torch.zeros(64, 300)
    first = arguments(64)
    base = sample(logits, **first).tokens
    assert len(set(base.tolist())) > 45
    for changed in ("seed", "position", "stream"):
        other = sample(logits, **{**first, changed: first[changed] + 1000}).tokens
        assert int((other == base).sum()) < 5
    high = sample(logits, **{**first, "seed": first["seed"] + (1 << 40)}).tokens
    assert int((high == base).sum()) < 5


# ---- refusals ----

PENALTY = {
    "repetition_penalty": torch.ones(2),
    "history": torch.tensor([0, 1, 2], dtype=torch.int32),
    "history_start": torch.tensor([0, 1, 3], dtype=torch.int32),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(2, 4).double()}, TypeError, "logits must be float32"),
    ({"logits": [[0.0]]}, TypeError, "logits must be a tensor"),
    ({"logits": torch.zeros(4)}, ValueError, "logits must be"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "logits must be"),
    ({"logits": torch.zeros(4, 2).T}, ValueError, "logits must be.*unit stride"),
    ({"temperature": 1.0}, TypeError, "temperature must be a tensor"),
    ({"temperature": torch.ones(2).double()}, TypeError, "temperature must be float32"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature must have shape"),
    ({"temperature": torch.tensor([1.0, -0.5])}, ValueError, "temperature must be finite and >= 0, got -0.5.* at 1"),
    ({"temperature": torch.tensor([NAN, 1.0])}, ValueError, "temperature must be finite.*nan at 0"),
    ({"temperature": torch.tensor([1.0, INF])}, ValueError, "temperature must be finite.*inf at 1"),
    ({"top_k": torch.zeros(2)}, TypeError, "top_k must be int32"),
    ({"top_k": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError, "top_k must be contiguous"),
    ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "seed must be int64"),
    ({"position": torch.zeros(2)}, TypeError, "position must be int32"),
    ({"position": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "position must have shape"),
    ({"stream": torch.zeros(1, dtype=torch.int32)}, ValueError, "stream must have shape"),
    ({"repetition_penalty": torch.ones(2)}, ValueError, "together, got None for history and history_start"),
    ({**PENALTY, "repetition_penalty": torch.zeros(2)}, ValueError, "repetition_penalty must be finite and > 0"),
    ({**PENALTY, "repetition_penalty": torch.tensor([1.0, NAN])}, ValueError, "repetition_penalty must be.*nan at 1"),
    ({**PENALTY, "history": torch.zeros(3)}, TypeError, "history must be int32"),
    ({**PENALTY, "history": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, "history must have shape"),
    ({**PENALTY, "history": torch.tensor([0, 1, 4], dtype=torch.int32)}, ValueError, r"history must be in \[0, 4\), got 4 at 2"),
    ({**PENALTY, "history": torch.tensor([0, -1, 3], dtype=torch.int32)}, ValueError, r"history must be in \[0, 4\), got -1 at 1"),
    ({**PENALTY, "history_start": torch.zeros(2, dtype=torch.int32)}, ValueError, "history_start must have shape"),
    ({**PENALTY, "history_start": torch.tensor([0, 2, 1], dtype=torch.int32)}, ValueError, "history_start must rise"),
    ({**PENALTY, "history_start": torch.tensor([-1, 2, 3], dtype=torch.int32)}, ValueError, "history_start must rise"),
    ({**PENALTY, "history_start": torch.tensor([0, 2, 4], dtype=torch.int32)}, ValueError, "history_start must rise"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(sample: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(2, 4), **arguments(2)}
    sample(**good)
    sample(**good, **PENALTY)
    with pytest.raises(error, match=message):
        sample(**{**good, **change})
