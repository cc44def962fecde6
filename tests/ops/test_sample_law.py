"""``sample`` draws from the law: chi-square over a million draws, independence, and the far tail; each test fails on wrong samplers.

The tests check the fastest backend present. The wrong samplers are built from the specified noise; every one of them is a defect that an
engine of the field has shipped or could.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor

from engine.kernels import cpu, noise, sample

DRAWS = 1_000_000
CHUNK = 50_000
SMALLEST_P = 1e-6
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


class Law(NamedTuple):
    """A row of logits and how it is drawn from."""

    logits: Tensor  # [V]
    temperature: float
    top_k: int

    def probabilities(self) -> Tensor:
        """float64 ``[V]``, by sorting and softmax."""
        z = self.logits.double() / self.temperature
        if self.top_k:
            z = z.masked_fill(self.logits < self.logits.sort(descending=True).values[self.top_k - 1], -math.inf)
        return z.softmax(dim=0)


# Peaked rows: a flat one would hide a wrong law. The second ties at its sixth largest.
PLAIN = Law(torch.tensor([4.0, 1.0, 3.5, -2.0, 0.0, 2.0, 3.0, -1.0, 1.5, -4.0, 0.5, -6.0]), 0.8, 0)
TIED = Law(torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0, -1.0, 0.0, 1.5, 2.5, -2.0, 0.0, -0.5]), 1.3, 6)

Sampler = Callable[[Law, Tensor, Tensor], Tensor]  # law, seeds [N], positions [N] -> tokens [N]


def right(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    """The engine's own."""
    n = len(seed)
    result = sample(
        law.logits.expand(n, -1),
        torch.full((n,), law.temperature),
        torch.full((n,), law.top_k, dtype=torch.int32),
        seed,
        position,
        torch.zeros(n, dtype=torch.int32),
    )
    assert not result.status.any()
    return result.tokens


def from_scores(
    law: Law,
    seed: Tensor,
    position: Tensor,
    *,
    score: Callable[[Tensor, Tensor], Tensor] = lambda z, e: z - e.log(),
    words: Callable[[Tensor], Tensor] = lambda w: w,
    temperature: bool = True,
    exactly_k: bool = False,
) -> Tensor:
    """The law written plainly, with a place for one mistake; nothing wrong by default."""
    word = words(noise.words(seed, position, torch.zeros_like(position), len(law.logits)))
    e = noise.exponential(word, torch.zeros_like(word))
    z = law.logits / law.temperature if temperature else law.logits
    if law.top_k:
        kept = law.logits.topk(law.top_k).indices if exactly_k else (law.logits >= law.logits.topk(law.top_k).values[-1]).nonzero()[:, 0]
        z = torch.full_like(z, -math.inf).index_copy(0, kept, z[kept])
    return score(z, e).argmax(dim=1)


def exponential_noise(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    return from_scores(law, seed, position, score=lambda z, e: z + e)


def noise_shared_by_four(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    """The word's index dropped: the four tokens of a Philox block get one word."""
    return from_scores(law, seed, position, words=lambda w: w[:, torch.arange(w.shape[1]) // 4 * 4])


def temperature_ignored(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    return from_scores(law, seed, position, temperature=False)


def ties_trimmed(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    return from_scores(law, seed, position, exactly_k=True)


def coarse_noise(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    """u + eps instead of u: the smallest u are lifted, as by the epsilons of several engines (here 2^-8 to show at this size)."""
    return from_scores(law, seed, position, score=lambda z, e: z - (e + 2.0**-8).log())


def half_the_positions(law: Law, seed: Tensor, position: Tensor) -> Tensor:
    return from_scores(law, seed, position // 2)


def draw(sampler: Sampler, law: Law, vary: str, draws: int = DRAWS) -> Tensor:
    """``draws`` tokens over consecutive positions of one seed, or over many seeds at one position."""
    tokens = []
    for first in range(0, draws, CHUNK):
        index = torch.arange(first, first + CHUNK)
        seed = {"position": torch.full_like(index, 42), "seed": index, "wide seed": index * 0x9E3779B97F4A7C15}[vary]
        position = index if vary == "position" else torch.full_like(index, 17)
        tokens.append(sampler(law, seed, position.int()))
    return torch.cat(tokens)


def p_value(observed: Tensor, probabilities: Tensor) -> float:
    """Chi-square of counts against probabilities, cells of expectation below 5 pooled; 0 if anything impossible was seen."""
    expected = probabilities * int(observed.sum())
    if bool(observed[probabilities == 0].any()):
        return 0.0
    large = expected >= 5
    cells = [observed[large].double(), expected[large]]
    if float(expected[~large].sum()) >= 5:
        cells = [torch.cat([c, rest[~large].sum()[None].double()]) for c, rest in zip(cells, (observed, expected), strict=True)]
    scale = cells[0].sum() / cells[1].sum()
    return float(stats.chisquare(cells[0].numpy(), (cells[1] * scale).numpy()).pvalue)


def check_law(sampler: Sampler, law: Law, vary: str, draws: int = DRAWS) -> None:
    p = p_value(draw(sampler, law, vary, draws).bincount(minlength=len(law.logits)), law.probabilities())
    assert p > SMALLEST_P, f"p = {p}"


def check_independence(sampler: Sampler, law: Law, vary: str) -> None:
    """Pairs of neighbouring draws, without overlap, against the product of the law with itself."""
    first, second = draw(sampler, law, vary).view(-1, 2).T
    size, probabilities = len(law.logits), law.probabilities()
    p = p_value((first * size + second).bincount(minlength=size * size), torch.outer(probabilities, probabilities).flatten())
    assert p > SMALLEST_P, f"p = {p}"


@pytest.mark.parametrize("vary", ["position", "seed", "wide seed"])
@pytest.mark.parametrize("law", [PLAIN, TIED], ids=["temperature", "top-k with ties"])
def test_chi_square(law: Law, vary: str) -> None:
    check_law(right, law, vary)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_neighbouring_draws_are_independent(vary: str) -> None:
    check_independence(right, PLAIN, vary)


def test_law_written_plainly_passes() -> None:
    """So that what fails below is the planted mistake."""
    check_law(from_scores, TIED, "position")


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (exponential_noise, PLAIN),
        (noise_shared_by_four, PLAIN),
        (temperature_ignored, PLAIN),
        (coarse_noise, PLAIN),
        (ties_trimmed, TIED),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_chi_square_finds_wrong_samplers(wrong: Sampler, law: Law) -> None:
    with pytest.raises(AssertionError, match="p = "):
        check_law(wrong, law, "position")


def test_independence_finds_shared_noise() -> None:
    check_law(half_the_positions, PLAIN, "position")  # each draw by itself is fine
    with pytest.raises(AssertionError, match="p = "):
        check_independence(half_the_positions, PLAIN, "position")


@needs_cpp
def test_chi_square_over_many_blocks() -> None:
    """A longer row: tokens of all blocks, lanes and words of the kernel take part."""
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(2)) * 2
    law = Law(logits, 1.0, 0)
    check_law(right, law, "position", 200_000)
    check_law(right, law._replace(top_k=40), "seed", 200_000)


# ---- the far tail ----

TAIL_TOKENS, GAP, TAIL_DRAWS, TAIL_CHUNK = 262_144, 19.0, 12_000, 3000


def check_tail(hits_of: Callable[[range], int]) -> None:
    """One token and a crowd 19 below it, each of the crowd with a chance of 5.6e-9, together one draw in 681.

    At that gap uniforms of 24 bits give the crowd a twentieth of its due (at 20.5, where vLLM's test of this kind stands, nothing at all).
    """
    mass = TAIL_TOKENS * math.exp(-GAP)
    expected = TAIL_DRAWS * mass / (1 + mass)
    hits = sum(hits_of(range(first, first + TAIL_CHUNK)) for first in range(0, TAIL_DRAWS, TAIL_CHUNK))
    p = 2 * min(stats.poisson.cdf(hits, expected), stats.poisson.sf(hits - 1, expected))
    assert p > 1e-4, f"p = {p}: {hits} hits, {expected:.1f} expected"


def right_hits(positions: range) -> int:
    logits = torch.full((TAIL_TOKENS + 1,), -GAP)
    logits[0] = 0.0
    position = torch.tensor(positions)
    return int((right(Law(logits, 1.0, 0), torch.full_like(position, 3), position.int()) != 0).sum())


def hits_with_24_bits(positions: range) -> int:
    """The engine's own words cut to 24 bits, as several engines' uniforms are."""
    words, tails = torch.empty(TAIL_TOKENS + 1, dtype=torch.int32), torch.empty(TAIL_TOKENS + 1, dtype=torch.int32)
    hits = 0
    for position in positions:
        cpu._cpu.noise_of_row(3, position, 0, TAIL_TOKENS + 1, words.data_ptr(), tails.data_ptr())
        head = (int(words[0]) & 0xFFFFFFFF) >> 8
        least = (int(words[1:].bitwise_xor_(-(2**31)).min()) + 2**31) >> 8  # the smallest as unsigned
        best_of_tail, best_of_head = (-math.log(-math.log1p(-(w + 0.5) * 2.0**-24)) for w in (least, head))
        hits += best_of_tail - GAP > best_of_head
    return hits


@needs_cpp
def test_far_tail_is_drawn_as_often_as_it_should() -> None:
    check_tail(right_hits)


@needs_cpp
def test_tail_test_finds_coarse_uniforms() -> None:
    with pytest.raises(AssertionError, match="p = .* hits"):
        check_tail(hits_with_24_bits)
