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

from engine.kernels import cpu, fixed_math, noise, reference
from engine.kernels.api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, EndTokens, LogitBias, Penalties, SampleResult

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


def arguments(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, first_position: int = 0
) -> dict[str, Tensor]:
    return {
        "temperature": torch.full((rows,), float(temperature)),
        "top_k": torch.full((rows,), top_k, dtype=torch.int32),
        "top_p": torch.full((rows,), float(top_p)),
        "min_p": torch.full((rows,), float(min_p)),
        "seed": torch.full((rows,), 1234),
        "position": torch.arange(first_position, first_position + rows, dtype=torch.int32),
        "stream": torch.zeros(rows, dtype=torch.int32),
    }


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(a: SampleResult, b: SampleResult) -> bool:
    """The same bits in every field."""

    def bits(t: Tensor) -> Tensor:
        return t.view(torch.int32) if t.is_floating_point() else t

    return all((x is None) is (y is None) and (x is None or y is None or torch.equal(bits(x), bits(y))) for x, y in zip(a, b, strict=True))


def pick(result: SampleResult, rows: Any) -> SampleResult:
    return SampleResult(*(None if t is None else t[rows] for t in result))


# ---- the same token everywhere ----


@pytest.fixture(scope="module")
def oracle() -> list[SampleResult]:
    return sample_cases.run_all(reference.sample)


def compare_with_oracle(results: Any, oracle: list[SampleResult]) -> None:
    for (vocab, logits, given), result, expected in zip(sample_cases.cases(), results, oracle, strict=True):
        result = SampleResult(*result)
        wrong = ((result.tokens != expected.tokens) | (result.status != expected.status)).nonzero()[:, 0].tolist()
        first = {name: t[wrong[0]].item() for name, t in given.items() if isinstance(t, Tensor) and t.dim() == 1} if wrong else None
        assert not wrong, f"V={vocab}: {len(wrong)} of {len(logits)} rows differ, first row {wrong[0]} with {first}, {sorted(given)}"
        for name, mine, theirs in zip(result._fields[2:], result[2:], expected[2:], strict=True):
            assert (mine is None) is (theirs is None)
            if mine is None or theirs is None:
                continue
            if mine.dtype == torch.int64:
                assert torch.equal(mine, theirs), f"V={vocab}: {name}"
            else:
                assert torch.allclose(mine, theirs, rtol=1e-6, atol=3e-6, equal_nan=True), f"V={vocab}: {name}"


def test_oracle_covers_every_status(oracle: list[SampleResult]) -> None:
    status = torch.cat([result.status for result in oracle])
    assert set(status.tolist()) == {STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED}


@needs_cpp
def test_cpp_draws_the_oracles_tokens(oracle: list[SampleResult]) -> None:
    compare_with_oracle(sample_cases.run_all(cpu.sample), oracle)


@needs_cpp
def test_every_instruction_set_draws_the_oracles_tokens(oracle: list[SampleResult], tmp_path: Path) -> None:
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
    n = 12
    for vocab in (129, 5000, 70_001):  # the last is split over threads
        logits = torch.randn(n, vocab, generator=generator) * 3
        given = arguments(n)
        given["top_k"] = ints(0, 50, 0, 1, 3000, 0, 200, 0, 0, 0, 40, 60_000)
        given["temperature"] = torch.tensor([1.0, 1.0, 0.3, 1.0, 2.0, 0.0, 0.7, 1.0, 1.0, 1.5, 0.9, 1.0])
        given["top_p"] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.8, 0.9, 1.0, 0.9, 0.4, 0.99, 0.9, 0.95])
        given["min_p"] = torch.tensor([0.0] * 8 + [0.01, 0.0, 0.1, 1e-4])
        masks = torch.randint(-(2**31), 2**31 - 1, (n, (vocab + 31) // 32), generator=generator, dtype=torch.int32)
        masks[::2] = -1

        def run(rows: Any, logits: Tensor = logits, given: dict = given, masks: Tensor = masks) -> SampleResult:
            picked = {name: t[rows] for name, t in given.items()}
            return cpu.sample(logits[rows], **picked, allowed=masks[rows], logprobs=3)

        cpu._cpu.set_num_threads(1)
        expected = run(slice(None))
        for threads in (1, 2, 3, 9):
            cpu._cpu.set_num_threads(threads)
            for _ in range(3):
                order = torch.randperm(n, generator=generator)
                assert same(run(order), pick(expected, order))
            for row in range(n):
                assert same(run([row]), pick(expected, [row]))


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


@needs_cpp
def test_what_other_rows_need_makes_no_difference() -> None:
    """Lists and masks that are there for other rows: empty, or allowing everything."""
    generator = torch.Generator().manual_seed(6)
    for vocab in (129, 5000, 70_001):
        logits = torch.randn(8, vocab, generator=generator) * 3
        given = {**arguments(8), "temperature": torch.tensor([0.0, 1.0, 0.5, 1.0] * 2), "top_k": ints(0, 0, 0, 40, 0, 0, 40, 0)}
        alone = cpu.sample(logits, **given, logprobs=3)
        nothing = ints(*[0] * 9)
        among_others = cpu.sample(
            logits, **given, logprobs=3, allowed=torch.full((8, -(-vocab // 32)), -1, dtype=torch.int32),
            penalties=Penalties(torch.ones(8), torch.zeros(8), torch.zeros(8), ints(5), ints(1), nothing),
            bias=LogitBias(ints(5), torch.ones(1), nothing), end_tokens=EndTokens(ints(5), ints(*[0] * 8), nothing),
        )  # fmt: skip
        assert same(alone, among_others)


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
    for temperature, top_k, top_p, min_p in (
        (0.0, 0, 1, 0),
        (1.0, 0, 1, 0),
        (1.0, 1, 1, 0),
        (1.0, 3, 1, 0),
        (1, 0, 0.5, 0),
        (1, 3, 0.5, 0.1),
    ):
        result = sample(logits, **arguments(4, temperature, top_k, top_p, min_p), logprobs=0)
        tokens, status, logprobs = result[:3]
        assert tokens.tolist() == [1, -1, -1, 0]
        assert status.tolist() == [STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK]
        assert torch.allclose(logprobs, torch.tensor([-math.log(2), NAN, NAN, 0.0]), equal_nan=True)


def test_logprob_is_the_raw_one(sample: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for vocab, scale, offset in ((5, 1.0, 0.0), (4097, 5.0, 100.0), (40_000, 0.5, -1e4), (9000, 30.0, 0.0), (300, 1e37, 0.0)):
        logits = torch.randn(4, vocab, generator=generator) * scale + offset
        result = sample(logits, **arguments(4, temperature=2.0, top_k=vocab // 2), logprobs=3)
        exact = logits.double().log_softmax(dim=1)
        chosen = exact.gather(1, result.tokens[:, None])[:, 0]
        assert torch.allclose(result.logprobs.double(), chosen, rtol=2e-7, atol=1e-6)
        best = exact.topk(3)
        assert torch.equal(result.top_tokens, best.indices)
        assert torch.allclose(result.top_logprobs.double(), best.values, rtol=2e-7, atol=1e-6)


def test_processed_logprobs_are_those_of_what_is_drawn_from(sample: Any) -> None:
    """After temperature and all filters; of a greedy row without them."""
    logits = torch.tensor([[4.0, 3.0, 3.0, 1.0, 0.0, -2.0, -INF, 2.0]])
    for options, kept, temperature in (
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5, 7], 0.5),
        ({"temperature": 2.0, "top_k": 2}, [0, 1, 2], 2.0),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 1, 2], 1.0),
        ({"temperature": 1.0, "min_p": 0.1}, [0, 1, 2, 7], 1.0),
        ({"temperature": 0.0, "top_k": 1, "top_p": 0.1}, [0, 1, 2, 3, 4, 5, 7], 1.0),
    ):
        result = sample(logits, **arguments(1, **options), logprobs=8)
        law = (logits[0, kept].double() / temperature).log_softmax(dim=0)
        order = sorted(range(len(kept)), key=lambda i: (-float(law[i]), kept[i]))
        assert result.processed_top_tokens[0].tolist() == [kept[i] for i in order] + [-1] * (8 - len(kept))
        assert torch.allclose(result.processed_top_logprobs[0, : len(kept)].double(), law[order], rtol=2e-7, atol=1e-6)
        assert result.processed_top_logprobs[0, len(kept) :].tolist() == [-INF] * (8 - len(kept))
        chosen = law[kept.index(int(result.tokens))]
        assert float(result.processed_logprobs) == pytest.approx(float(chosen), rel=2e-7, abs=1e-6)
        assert result.top_tokens[0].tolist() == [0, 1, 2, 7, 3, 4, 5, -1]


def test_without_a_request_there_are_no_logprobs(sample: Any) -> None:
    assert all(field is None for field in sample(torch.zeros(2, 9), **arguments(2))[2:])
    result = sample(torch.zeros(2, 9), **arguments(2), logprobs=0)
    assert result.logprobs is not None and result.top_tokens is None


def test_top_p_keeps_the_crossing_token_and_its_ties(sample: Any) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    logits = probabilities.log().repeat(3000, 1)
    for top_p, kept in ((0.0, {0}), (0.39, {0}), (0.41, {0, 1}), (0.69, {0, 1}), (0.71, {0, 1, 2, 3, 4}), (1.0, {0, 1, 2, 3, 4})):
        assert set(sample(logits, **arguments(3000, 1.0, 0, top_p)).tokens.tolist()) == kept
    # Of what top-k left: 0.4 of 0.7 is 0.57.
    for top_p, kept in ((0.56, {0}), (0.58, {0, 1})):
        assert set(sample(logits, **arguments(3000, 1.0, 2, top_p)).tokens.tolist()) == kept
    # After the temperature: 0.4 ** 2 is 0.57 of the sum of squares.
    for top_p, kept in ((0.56, {0}), (0.58, {0, 1})):
        assert set(sample(logits, **arguments(3000, 0.5, 0, top_p)).tokens.tolist()) == kept


def test_min_p_is_a_share_of_the_largest(sample: Any) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(3000, 1)
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.09, {0, 1, 2, 3}), (0.11, {0, 1, 2}), (0.29, {0, 1, 2}), (0.31, {0, 1}), (1.0, {0})):
        assert set(sample(logits, **arguments(3000, 1.0, 0, 1.0, min_p)).tokens.tolist()) == kept


def test_the_mass_is_summed_exactly(sample: Any) -> None:
    """The nucleus is that of Python's integers, where the boundary lies within float32's rounding of a sum."""
    generator = torch.Generator().manual_seed(12)
    for vocab in (1000, 40_000):
        logits = torch.randn(1, vocab, generator=generator)
        weights = fixed_math.weight(logits[0] - logits.max()).tolist()
        order = sorted(range(vocab), key=lambda i: -float(logits[0, i]))
        cumulative = [0]
        for i in order:
            cumulative.append(cumulative[-1] + weights[i])
        for rank in (3, vocab // 7, vocab // 2):
            share = (cumulative[rank] / cumulative[-1]) * 2**31
            for numerator in (int(share) - 1, int(share), int(share) + 1, int(share) + 2):
                top_p = torch.tensor([numerator / 2**31])
                needed = -(-int(top_p.double().item() * 2**31) * cumulative[-1] // 2**31)
                kept = next(n for n in range(vocab + 1) if cumulative[n] >= needed)
                result = sample(logits, **{**arguments(1), "top_p": top_p}, logprobs=vocab)
                assert int((result.processed_top_tokens >= 0).sum()) == kept


def test_penalties_bias_and_masks_by_hand(sample: Any) -> None:
    """Every step of the order, in plain float32 arithmetic, read off the processed log-probabilities."""
    f = torch.tensor
    logits = f([[2.0, -2.0, 1.0, 0.5, 3.0, -1.0, 0.0, 4.0]])
    expected = f([2.0 / 1.5 - 0.25 * 2 - 0.5, -2.0 * 1.5, 1.0 + 0.75, -INF, 3.0 / 1.5 - 0.25 - 0.5 - 1.0, -1.0, -INF, -INF])
    result = sample(
        logits,
        **arguments(1, first_position=7),
        penalties=Penalties(f([1.5]), f([0.5]), f([0.25]), ints(0, 1, 4), ints(2, 0, 1), ints(0, 3)),
        bias=LogitBias(ints(2, 4, 3), f([0.75, -1.0, -INF]), ints(0, 3)),
        end_tokens=EndTokens(ints(7), ints(8), ints(0, 1)),
        allowed=ints(0b10111111)[None],
        logprobs=8,
    )
    law = expected.double().log_softmax(dim=0)
    for token, logprob in zip(result.processed_top_tokens[0].tolist(), result.processed_top_logprobs[0].tolist(), strict=True):
        if token >= 0:
            assert logprob == pytest.approx(float(law[token]), abs=1e-6)
    assert sorted(result.processed_top_tokens[0].tolist()) == [-1, -1, -1, 0, 1, 2, 4, 5]
    assert float(result.logprobs) == pytest.approx(float(logits[0].log_softmax(0)[result.tokens]), abs=1e-6)


def test_end_tokens_wait_for_their_position(sample: Any) -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0]]).repeat(3, 1)
    ends = EndTokens(ints(1, 3, 1, 3, 1, 3), ints(10, 10, 10), ints(0, 2, 4, 6))
    assert sample(logits, **arguments(3, 0.0, first_position=8), end_tokens=ends).tokens.tolist() == [2, 2, 1]


def test_a_row_with_nothing_allowed(sample: Any) -> None:
    logits = torch.zeros(3, 40)
    allowed = torch.tensor([[0, 0], [0, -256], [-1, 0]], dtype=torch.int32)  # bits past the vocabulary count for nothing
    for temperature in (0.0, 1.0):
        result = sample(logits, **arguments(3, temperature), allowed=allowed)
        assert result.status.tolist() == [STATUS_NOTHING_ALLOWED, STATUS_NOTHING_ALLOWED, STATUS_OK]
        assert result.tokens.tolist()[:2] == [-1, -1]


def test_a_nan_is_seen_even_where_it_is_forbidden(sample: Any) -> None:
    logits = torch.zeros(1, 300)
    logits[0, 200] = NAN
    allowed = torch.full((1, 10), -1, dtype=torch.int32)
    allowed[0, 200 // 32] = 0
    assert sample(logits, **arguments(1), allowed=allowed).status.tolist() == [STATUS_NAN]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_what_their_float32_is(sample: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for vocab in (5, 129, 5000):
        logits = (torch.randn(30, vocab, generator=generator) * 4).to(dtype)
        given = {**arguments(30, 0.7, 40, 0.95, 0.01), "logprobs": 2}
        assert same(sample(logits, **given), sample(logits.float(), **given))


def penalise_plainly(logits: Tensor, by: Penalties) -> Tensor:
    out = logits.clone()
    for row in range(len(logits)):
        for i in range(int(by.start[row]), int(by.start[row + 1])):
            token, count, value = by.token[i], by.counts[i], logits[row, by.token[i]]
            value = value / by.repetition[row] if value > 0 else value * by.repetition[row]
            if count > 0:
                value = value - by.frequency[row] * count.float() - by.presence[row]
            out[row, token] = value
    return out


@pytest.mark.parametrize("vocab", [310, 1000, 70_000])
def test_penalties(sample: Any, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator) * 3
    logits[4, :5] = torch.tensor([0.0, -INF, -0.0, 2.0, -2.0])
    start = ints(0, 0, 5, 40, 100, 101, 300)
    token = torch.cat([logits[r].topk(int(start[r + 1] - start[r])).indices for r in range(6)]).int()  # what would be drawn
    token = torch.cat([token, ints(7, 7, 7)])  # past the last row's: nobody's
    count = torch.randint(0, 3, token.shape, generator=generator, dtype=torch.int32)
    f = torch.tensor
    by = Penalties(
        f([1.5, 1.3, 1.0, 5.0, 0.5, 100.0]), f([0.0, 0.5, -1.0, 0.0, 2.0, 0.1]), f([0.3, 0.0, 0.5, 0.0, -2.0, 0.0]), token, count, start
    )
    before = logits.clone()
    penalised = penalise_plainly(logits, by)
    for temperature, top_k in ((0.0, 0), (1.0, 0), (0.8, 3)):
        row = arguments(6, temperature, top_k)
        result = sample(logits, **row, penalties=by, logprobs=0)
        assert torch.equal(result.tokens, sample(penalised, **row).tokens)
        raw = before.double().log_softmax(dim=1).gather(1, result.tokens[:, None])[:, 0]
        assert torch.allclose(result.logprobs.double(), raw, rtol=2e-7, atol=1e-6)
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))


@needs_cpp
def test_subnormal_numbers_count_whatever_the_calling_thread_has_set() -> None:
    x = torch.full((16, 9000), 1e-42)
    x[:, 7] = 2e-42
    given = arguments(16, 0.0)
    expected = cpu.sample(x, **given).tokens
    assert expected.tolist() == [7] * 16
    assert torch.set_flush_denormal(True)
    try:
        assert torch.equal(cpu.sample(x, **given).tokens, expected)
        for row in range(16):
            alone = cpu.sample(x[row : row + 1], **{name: t[:1] for name, t in given.items()})
            assert alone.tokens.item() == 7
    finally:
        torch.set_flush_denormal(False)


def test_rows_of_any_stride(sample: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    wide = torch.randn(12, 1000, generator=generator)
    before = wide.clone()
    for view in (wide[::3, 5:505], wide[2:3, :77].expand(6, 77), wide[1::2, 999:], wide[:0], wide[:, 3:4]):
        given = {**arguments(len(view), 0.9, 20), "logprobs": 1}
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

PENALTIES = Penalties(torch.ones(2), torch.zeros(2), torch.zeros(2), ints(0, 1, 2), ints(0, 1, 2), ints(0, 1, 3))
BIAS = LogitBias(ints(0, 1, 2), torch.zeros(3), ints(0, 1, 3))
ENDS = EndTokens(ints(0, 1, 2), ints(5, 5), ints(0, 1, 3))


def penalties(**change: Any) -> dict[str, Any]:
    return {"penalties": PENALTIES._replace(**change)}


def bias(**change: Any) -> dict[str, Any]:
    return {"bias": BIAS._replace(**change)}


def ends(**change: Any) -> dict[str, Any]:
    return {"end_tokens": ENDS._replace(**change)}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": torch.zeros(2, 4).double()}, TypeError, "logits must be float32, bfloat16 or float16, got torch.float64"),
    ({"logits": [[0.0]]}, TypeError, "logits must be a tensor"),
    ({"logits": torch.zeros(4)}, ValueError, "logits must be"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "logits must be"),
    ({"logits": torch.zeros(4, 2).T}, ValueError, "logits must be.*unit stride"),
    ({"logits": torch.empty(2, (1 << 22) + 1, dtype=torch.bfloat16)}, ValueError, r"logits must have V <= 2\^22 columns, got 4194305"),
    ({"temperature": 1.0}, TypeError, "temperature must be a tensor"),
    ({"temperature": torch.ones(2).double()}, TypeError, "temperature must be float32"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature must have shape"),
    ({"temperature": torch.tensor([1.0, -0.5])}, ValueError, "temperature must be finite and >= 0, got -0.5.* at 1"),
    ({"temperature": torch.tensor([NAN, 1.0])}, ValueError, "temperature must be finite.*nan at 0"),
    ({"temperature": torch.tensor([1.0, INF])}, ValueError, "temperature must be finite.*inf at 1"),
    ({"top_k": torch.zeros(2)}, TypeError, "top_k must be int32"),
    ({"top_k": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError, "top_k must be contiguous"),
    ({"top_p": torch.tensor([0.5, 1.5])}, ValueError, r"top_p must be in \[0, 1\], got 1.5 at 1"),
    ({"top_p": torch.tensor([-0.25, 0.5])}, ValueError, r"top_p must be in \[0, 1\], got -0.25 at 0"),
    ({"top_p": torch.tensor([NAN, 0.5])}, ValueError, r"top_p must be in \[0, 1\], got nan at 0"),
    ({"top_p": torch.ones(1)}, ValueError, "top_p must have shape"),
    ({"min_p": torch.tensor([0.5, 1.5])}, ValueError, r"min_p must be in \[0, 1\], got 1.5 at 1"),
    ({"min_p": torch.tensor([0.5, NAN])}, ValueError, r"min_p must be in \[0, 1\], got nan at 1"),
    ({"min_p": torch.ones(2).half()}, TypeError, "min_p must be float32"),
    ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "seed must be int64"),
    ({"position": torch.zeros(2)}, TypeError, "position must be int32"),
    ({"position": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "position must have shape"),
    ({"stream": torch.zeros(1, dtype=torch.int32)}, ValueError, "stream must have shape"),
    ({"stream": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "stream is on meta while logits is on cpu"),
    ({"penalties": (1, 2, 3)}, TypeError, "penalties must be a Penalties, got tuple"),
    (penalties(repetition=torch.zeros(2)), ValueError, "penalties.repetition must be finite and > 0, got 0.* at 0"),
    (penalties(repetition=torch.tensor([1.0, NAN])), ValueError, "penalties.repetition must be.*nan at 1"),
    (penalties(presence=torch.tensor([0.0, INF])), ValueError, "penalties.presence must be within -1e30 and 1e30, got inf at 1"),
    (penalties(frequency=torch.tensor([NAN, 0.0])), ValueError, "penalties.frequency must be within -1e30 and 1e30, got nan at 0"),
    (penalties(token=torch.zeros(3)), TypeError, "penalties.token must be int32"),
    (penalties(token=torch.zeros(3, 1, dtype=torch.int32)), ValueError, "penalties.token must have shape"),
    (penalties(token=ints(0, 1, 4)), ValueError, r"penalties.token must be in \[0, 4\), got 4 at 2"),
    (penalties(token=ints(0, -1, 3)), ValueError, r"penalties.token must be in \[0, 4\), got -1 at 1"),
    (penalties(token=ints(0, 2, 2)), ValueError, "penalties.token must be distinct in each row, got 2 more than once in row 1"),
    (penalties(counts=ints(0, 0)), ValueError, "penalties.counts must have shape"),
    (penalties(counts=ints(0, -1, 0)), ValueError, r"penalties.counts must be from 0 to 2\^24, got -1 at 1"),
    (penalties(counts=ints(0, 0, (1 << 24) + 1)), ValueError, r"penalties.counts must be from 0 to 2\^24, got 16777217 at 2"),
    (penalties(start=ints(0, 0)), ValueError, "penalties.start must have shape"),
    (penalties(token=ints(), counts=ints(), start=ints(5, -3, 9)), ValueError, "penalties.start must rise from >= 0 to <= 0.*got 5 at 0"),
    (penalties(token=ints(), counts=ints(), start=ints(0, 0, 0), repetition=torch.zeros(2)), ValueError, "penalties.repetition must be"),
    (penalties(start=ints(0, 2, 1)), ValueError, "penalties.start must rise from >= 0 to <= 3, the length of penalties.token, got 1 at 2"),
    (penalties(start=ints(-1, 2, 3)), ValueError, "penalties.start must rise.*got -1 at 0"),
    (penalties(start=ints(0, 2, 4)), ValueError, "penalties.start must rise.*got 4 at 2"),
    (bias(bias=torch.tensor([0.0, INF, 0.0])), ValueError, "bias.bias must be within -1e30 and 1e30, or -inf, got inf at 1"),
    (bias(bias=torch.tensor([0.0, 0.0, NAN])), ValueError, "bias.bias must be within.*got nan at 2"),
    (bias(bias=torch.zeros(2)), ValueError, "bias.bias must have shape"),
    (bias(token=ints(0, 3, 3)), ValueError, "bias.token must be distinct in each row, got 3 more than once in row 1"),
    (bias(token=ints(0, 3, 9)), ValueError, r"bias.token must be in \[0, 4\), got 9 at 2"),
    (ends(token=ints(0, 3, 9)), ValueError, r"end_tokens.token must be in \[0, 4\), got 9 at 2"),
    (ends(min_position=ints(0)), ValueError, "end_tokens.min_position must have shape"),
    (
        {"allowed": torch.zeros(2, 2, dtype=torch.int32)},
        ValueError,
        r"allowed must have shape \[R, ceil\(V / 32\)\] = \(2, 1\), got \(2, 2\)",
    ),
    ({"allowed": torch.zeros(2, 1)}, TypeError, "allowed must be int32"),
    ({"logprobs": 5}, ValueError, "logprobs must be None or from 0 to V = 4, got 5"),
    ({"logprobs": -1}, ValueError, "logprobs must be None or from 0 to V = 4, got -1"),
    ({"logprobs": True}, TypeError, "logprobs must be None or an integer, got True"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(sample: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(2, 4), **arguments(2)}
    sample(**good)
    sample(**good, penalties=PENALTIES, bias=BIAS, end_tokens=ENDS, allowed=torch.full((2, 1), -1, dtype=torch.int32), logprobs=4)
    with pytest.raises(error, match=message):
        sample(**{**good, **change})


# ---- the workspace ----


@needs_cpp
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_calls_with_a_workspace_are_calls_without(logprobs: int | None):
    """The same tensors with other numbers, other tensors, other logits, other lists, other sizes, in any order."""
    generator = torch.Generator().manual_seed(5)
    workspace = cpu.SampleWorkspace()
    kept = {rows: arguments(rows, 0.8, 5) for rows in (1, 4)}
    lists = {rows: sample_cases.lists(rows, 300, generator) for rows in kept}
    for turn in range(60):
        rows = (1, 4)[turn // 3 % 2]
        given = kept[rows] if turn % 5 else {name: t.clone() for name, t in kept[rows].items()}
        given["position"] += 1
        given["temperature"].fill_(0.5 + turn % 3)
        logits = torch.randn(rows, 300, generator=generator).to(torch.bfloat16 if turn % 7 == 0 else torch.float32)
        if turn % 11 == 0:
            logits = torch.randn(rows, 600, generator=generator)[:, ::2].contiguous() if turn % 2 else torch.randn(rows, 310)[:, :300]
        more = lists[rows] if turn % 4 == 0 else {}
        expected = cpu.sample(logits, **given, **more, logprobs=logprobs)
        assert same(cpu.sample(logits, **given, **more, logprobs=logprobs, workspace=workspace), expected), turn


@needs_cpp
def test_a_workspace_keeps_the_results_and_what_is_checked():
    workspace = cpu.SampleWorkspace()
    given, logits = arguments(2), torch.zeros(2, 7)
    first = cpu.sample(logits, **given, logprobs=0, workspace=workspace)
    logits = torch.full((2, 7), -INF)
    logits[:, 3] = 0.0
    assert cpu.sample(logits, **given, logprobs=0, workspace=workspace) is first and first.tokens.tolist() == [3, 3]
    given["top_p"][1] = 1.5  # numbers are looked at in every call
    with pytest.raises(ValueError, match="top_p must be in \\[0, 1\\], got 1.5 at 1"):
        cpu.sample(logits, **given, logprobs=0, workspace=workspace)
    given["top_p"][1] = 1.0
    for wrong, error, message in (
        (torch.zeros(3, 7), ValueError, "temperature must have shape"),
        (torch.zeros(2, 7, dtype=torch.float64), TypeError, "logits must be float32"),
        (torch.zeros(7, 2).T, ValueError, "unit stride in V"),
        ([[0.0]], TypeError, "logits must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            cpu.sample(wrong, **given, logprobs=0, workspace=workspace)
    with pytest.raises(TypeError, match="logprobs must be None or an integer, got True"):
        cpu.sample(logits, **given, logprobs=True, workspace=workspace)
    assert cpu.sample(logits, **given, logprobs=0, workspace=workspace).tokens.tolist() == [3, 3]
    with pytest.raises(TypeError, match="workspace must be a cpu.SampleWorkspace or None, got str"):
        cpu.sample(logits, **given, workspace="mine")
