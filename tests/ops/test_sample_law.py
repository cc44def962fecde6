"""``sample`` draws from the law: chi-square on every control and on combinations, independence, the far tail, each batch alike; and every
planted wrong sampler fails. The laws, statistics and wrong samplers are those of ``engine verify``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from engine import kernels
from engine.kernels import fixed_math, reference
from engine.verify import checks, wrong
from engine.verify.laws import LONG, PEAKED, Law, Sampler, chi_square, edge_of_top_p, long_laws, pack, poisson, small_laws

CPU = torch.device("cpu")
KEY = 7
FASTEST = kernels.select("cpu")
SLOW = FASTEST.chosen["sample"] == "reference"
DRAWS = 5_000 if SLOW else 200_000

fastest = checks.sampler_of(FASTEST.sample, CPU)
oracle = checks.sampler_of(reference.sample, CPU)
named = {law.name: law for law in small_laws() + long_laws()}
edges = [edge_of_top_p(inside) for inside in (False, True)]


def check(outcome: checks.Outcome) -> None:
    assert outcome.holds, str(outcome)


# ---- the fastest backend ----


@pytest.mark.parametrize("vary", ["position", "seed", "wide seed", "stream"])
@pytest.mark.parametrize("name", ["temperature 0.8, peaked", "top-k 6 with ties"])
def test_whatever_varies(name: str, vary: str) -> None:
    check(checks.follows_law(fastest, named[name], vary, DRAWS, KEY))


@pytest.mark.parametrize("law", small_laws(), ids=lambda law: law.name)
def test_each_control_and_combinations(law: Law) -> None:
    check(checks.follows_law(fastest, law, "position", DRAWS, KEY))


@pytest.mark.parametrize("law", [*long_laws(), *edges], ids=lambda law: law.name)
def test_long_rows(law: Law) -> None:
    check(checks.follows_law(fastest, law, "seed", DRAWS // 4, KEY))


@pytest.mark.parametrize("vary", ["position", "seed", "stream"])
def test_neighbouring_draws_are_independent(vary: str) -> None:
    check(checks.neighbours_are_independent(fastest, named["temperature 0.8, peaked"], vary, DRAWS, KEY))


@pytest.mark.skipif(SLOW, reason="the C++ kernels are absent, and the oracle would need an hour")
def test_far_tail_is_drawn_as_often_as_it_should() -> None:
    check(checks.far_tail(fastest, checks.TAILS[0], KEY))


@pytest.mark.parametrize("sampler", [fastest, oracle], ids=["fastest", "oracle"])
def test_each_token_is_the_laws(sampler: Sampler) -> None:
    check(checks.written_plainly(sampler, 500, KEY))
    check(checks.extreme_words(sampler))


@pytest.mark.parametrize("vocab", [300, 5001, 70_001])
def test_batch_makes_no_difference(vocab: int) -> None:
    check(checks.batch_invariance(FASTEST.sample, CPU, vocab))


# ---- the oracle ----


@pytest.mark.parametrize("law", [*small_laws(), *long_laws(), *edges], ids=lambda law: law.name)
def test_oracle_follows_every_law(law: Law) -> None:
    check(checks.follows_law(oracle, law, "position", 2000, KEY))


def test_oracle_draws_the_tail() -> None:
    check(checks.far_tail(oracle, checks.TAILS[-1], KEY))


# ---- teeth ----

TEETH = checks.teeth(20_000, KEY)


@pytest.mark.parametrize(("planted", "finds"), TEETH, ids=[planted.__name__ for planted, _ in TEETH])
def test_planted_wrong_sampler_fails(planted: Sampler, finds: checks.Check) -> None:
    assert not finds(planted).holds


@pytest.mark.parametrize(("planted", "finds"), TEETH, ids=[planted.__name__ for planted, _ in TEETH])
def test_law_written_plainly_passes_the_same(planted: Sampler, finds: checks.Check) -> None:
    """So that what failed above is the planted mistake. The far tail would take it an hour: there a backend passes instead."""
    if planted not in (wrong.uniforms_of_24_bits, wrong.uniforms_plus_epsilon):
        check(finds(wrong.plain))


def test_marginals_hide_shared_positions() -> None:
    """Only the test of independence sees them."""
    check(checks.follows_law(wrong.half_the_positions, named["temperature 0.8, peaked"], "position", 20_000, KEY))


def test_wrong_samplers_that_skip_rows_draw_the_same() -> None:
    """Coarse uniforms decide most rows of the far tail by the first token alone; what they skip changes nothing."""
    law = Law("short tail", torch.full((3000,), -16.5).index_fill(0, torch.tensor([0]), 0.0))
    index = torch.arange(2000)

    def log_e(word: Tensor, low: Tensor) -> Tensor:
        return (-torch.log1p(-((word >> 8).double() + 0.5) * 2.0**-24)).log().float()

    slow = wrong.from_scores(law, index, index, index, log_exponential=log_e)
    assert torch.equal(slow, wrong.uniforms_of_24_bits(law, index, index, index))


def test_no_token_is_a_failure() -> None:
    def nothing(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
        return wrong.plain(law, seed, position, stream).index_fill(0, torch.tensor([5]), -1)

    outcome = checks.follows_law(nothing, named["temperature 0.8, peaked"], "position", 1000, KEY)
    assert not outcome.holds and outcome.p == 0


def test_a_batch_that_matters_is_found() -> None:
    def sample(logits: Tensor, *, seed: Tensor, **given: Any) -> Any:
        return reference.sample(logits=logits, seed=seed + torch.arange(len(seed)), **given)

    assert not checks.batch_invariance(sample, CPU, 300).holds


# ---- the laws and the statistics themselves ----


def test_edge_of_top_p_is_decided_by_the_integers() -> None:
    """The float64 law and the integer masses of the contract agree, though less than 4e-8 of the mass decides."""
    for law in edges:
        z = law.logits.double()
        weight = fixed_math.weight(law.logits - law.logits.max())
        needed = fixed_math.mass_needed(weight.sum()[None], torch.tensor([law.top_p]))
        assert bool(law.kept(z)[z == 0].all()) == bool(weight[z > 0].sum() < needed[0]) == (law is edges[1])
        assert abs(int(weight[z > 0].sum()) / int(weight.sum()) - law.top_p) < 4e-8


def test_probabilities_of_the_filters() -> None:
    """By hand, on a row of probabilities 0.4, 0.3, 0.2, 0.1."""
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

    def kept(**controls: Any) -> list[int]:
        return (Law("", row, **controls).probabilities() > 0).nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.69) == [0, 1] and kept(top_p=0.71) == [0, 1, 2] and kept(top_p=0.0) == [0]
    assert kept(min_p=0.51) == [0, 1] and kept(min_p=0.49) == [0, 1, 2]
    assert kept(top_k=3, top_p=0.75) == [0, 1] and kept(top_p=0.75) == [0, 1, 2]
    assert kept(temperature=0.0) == [0]
    assert kept(allowed=torch.tensor([False, True, True, False])) == [1, 2]
    assert kept(bias={0: -math.inf}) == [1, 2, 3]
    penalised = Law("", torch.tensor([2.0, -2.0, 2.0]), repetition=2.0, presence=0.5, frequency=0.25, counts={0: 2, 1: 1, 2: 0})
    assert penalised.processed(torch.float64).tolist() == [1 - 0.5 - 0.5, -4 - 0.25 - 0.5, 1.0]


def test_mask_bits() -> None:
    allowed = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[:, 31] = True  # the sign bit
    words = pack(allowed)
    assert words.shape == (3, 3) and words.dtype == torch.int32
    assert all(bool(words[r, i >> 5] >> (i & 31) & 1) == bool(allowed[r, i]) for r in range(3) for i in range(70))


def test_statistics_are_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    for law in (named["temperature 0.8, peaked"], Law("", LONG[:50] + 100)):
        probabilities = law.probabilities()
        counts = probabilities.multinomial(100_000, replacement=True, generator=generator).bincount(minlength=len(law.logits))
        ours = chi_square(counts, probabilities)
        if float(probabilities.min()) * 100_000 > 5:
            theirs = stats.chisquare(counts.double().numpy(), (probabilities * 100_000).numpy())
            assert ours.value == pytest.approx(theirs.statistic, rel=1e-9)
        assert ours.p == pytest.approx(stats.chi2.sf(ours.value, ours.freedom), rel=1e-9)
    assert chi_square(torch.tensor([10, 1]), torch.tensor([1.0, 0.0], dtype=torch.float64)).p == 0
    for hits, expected in ((0, 19.7), (20, 19.7), (60, 19.7), (3, 0.1)):
        p = 2 * min(stats.poisson.cdf(hits, expected), stats.poisson.sf(hits - 1, expected))
        assert poisson(hits, expected).p == pytest.approx(min(1.0, p), rel=1e-9)


def test_rare_cells_are_pooled() -> None:
    probabilities = torch.tensor([0.5, 0.4999] + [0.0001 / 100] * 100, dtype=torch.float64)
    statistic = chi_square(torch.tensor([50_000, 49_990] + [1] * 10 + [0] * 90), probabilities)
    assert statistic.freedom in (2, 3) and statistic.p > 0.1
    assert chi_square(torch.tensor([50_000, 49_900] + [100] + [0] * 99), probabilities).p < 1e-6


@pytest.mark.parametrize("logits", [PEAKED, LONG])
def test_temperature_zero_is_the_largest(logits: Tensor) -> None:
    law = Law("greedy", logits, 0.0, top_k=3, top_p=0.5)
    check(checks.follows_law(fastest, law, "position", 100, KEY))
    assert float(law.probabilities()[logits.argmax()]) == 1
