"""The checks of the exactness contract, each giving one ``Outcome``; a wrong sampler makes it fail, never raise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import cpu, fixed_math, noise, reference
from . import hostile, wrong
from .laws import Law, Sampler, Statistic, chi_square, draw, edge_of_top_p, long_laws, poisson, small_laws

SMALLEST_P = 1e-6  # about a hundred p-values: one run in ten thousand of a right sampler has a smaller one
MASK = 0xFFFFFFFF

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


class Outcome(NamedTuple):
    """A row of the table. Where ``p`` is None, the statistic is the number of draws that are not what they must be."""

    check: str
    draws: int
    statistic: float
    freedom: int | None  # of chi-square
    p: float | None
    holds: bool


def _differences(check: str, draws: int, wrong_draws: int) -> Outcome:
    return Outcome(check, draws, wrong_draws, None, None, wrong_draws == 0)


def _judged(check: str, draws: int, statistic: Statistic) -> Outcome:
    return Outcome(check, draws, *statistic, statistic.p > SMALLEST_P)


def sampler_of(sample: Callable[..., Any], device: torch.device) -> Sampler:
    """A backend's ``sample`` as what draws from a law; -1 where it gives no token."""

    def run(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
        tokens: Tensor = sample(**law.arguments(seed, position, stream, device)).tokens
        return tokens.cpu()

    return run


# ---- equality ----


def philox_known_answers() -> Outcome:
    """The oracle's Philox against the vectors its authors publish."""
    results = [noise.philox4x32(_words(c), _words(k)) for c, k, _ in KNOWN_ANSWERS]  # type: ignore[arg-type]
    wrong_blocks = sum(tuple(map(int, block)) != answer for block, (*_, answer) in zip(results, KNOWN_ANSWERS, strict=True))
    return _differences("Philox known answers", len(KNOWN_ANSWERS), wrong_blocks)


def _words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def noise_bits() -> Outcome:
    """The C++ kernels' words, exponentials and logarithms of them against the oracle's, bit for bit."""
    vocab = 40_000
    seed, stream = hostile.WORDS_KEY
    keys = [(seed, position, stream) for position, _ in hostile.LARGE_WORDS + hostile.SMALL_WORDS] + [(-1, -1, -1), (2**63 - 1, 5, 0)]
    differing = 0
    for key in keys:
        seeds, positions, streams = (torch.tensor([value]) for value in key)
        expected = noise.noise(seeds, positions, streams, vocab)
        word, low = torch.empty(vocab, dtype=torch.int32), torch.empty(vocab, dtype=torch.int32)
        cpu._cpu.noise_of_row(*key, vocab, word.data_ptr(), low.data_ptr())
        e, log_e = torch.empty(vocab), torch.empty(vocab)
        cpu._cpu.noise_of_words(word.data_ptr(), low.data_ptr(), vocab, e.data_ptr(), log_e.data_ptr())
        same = (word.long() & MASK == expected.word[0]) & (low.long() & MASK == expected.low[0])
        same &= (e.view(torch.int32) == expected.exponential[0].view(torch.int32)) & (log_e == fixed_math.log(expected.exponential[0]))
        differing += int((~same).sum())
    return _differences("noise of each token, bit for bit", vocab * len(keys), differing)


def hostile_rows(sample: Callable[..., Any], device: torch.device, vocabs: Sequence[int], times: int) -> Outcome:
    """Token and status are the oracle's on rows with ties, infinities, NaN, subnormals, and every control at random."""
    rows = differing = 0
    for given in hostile.cases(vocabs, times):
        expected = reference.sample(**given)
        result = sample(**hostile.move(given, device))
        differing += int(((result.tokens.cpu() != expected.tokens) | (result.status.cpu() != expected.status)).sum())
        rows += len(expected.tokens)
    return _differences("hostile rows: the oracle's tokens", rows, differing)


def written_plainly(sampler: Sampler, draws: int, key: int) -> Outcome:
    """The tokens are those of the law written plainly over the same noise, for every law of the table."""
    laws = small_laws() + long_laws()
    differing = 0
    for law in laws:
        differing += int((draw(sampler, law, "position", draws, key) != draw(wrong.plain, law, "position", draws, key)).sum())
    return _differences("each token is the law's", draws * len(laws), differing)


def extreme_words(sampler: Sampler) -> Outcome:
    """Where a token's noise is the largest or smallest there is: neither infinite nor lost."""
    seed, stream = torch.tensor([hostile.WORDS_KEY[0]]), torch.tensor([hostile.WORDS_KEY[1]])
    differing = 0
    for words, logit in ((hostile.LARGE_WORDS, 60.0), (hostile.SMALL_WORDS, -30.0)):
        for position, token in words:
            law = Law("extreme word", torch.zeros(40_000).index_fill(0, torch.tensor([token]), logit))
            drawn, right = (int(s(law, seed, torch.tensor([position]), stream)) for s in (sampler, wrong.plain))
            differing += drawn != right or (drawn == token) != (logit > 0)
    return _differences("words next to 0 and 2^32", len(hostile.LARGE_WORDS + hostile.SMALL_WORDS), differing)


def batch_invariance(sample: Callable[..., Any], device: torch.device, vocab: int) -> Outcome:
    """A row alone, in batches of several sizes, shuffled, and inside a wider tensor: the same token."""
    generator = torch.Generator().manual_seed(4)
    given = hostile.case(vocab, 1, generator)
    rows = len(given["logits"])
    expected = sample(**hostile.move(given, device)).tokens.cpu()
    drawn = differing = 0

    def compare(index: Tensor, changed: dict[str, Any]) -> None:
        nonlocal drawn, differing
        tokens = sample(**hostile.move(changed, device)).tokens.cpu()
        drawn += len(index)
        differing += int((tokens != expected[index]).sum())

    for size in (1, 3, 7, rows, 2 * rows + 1):
        for index in torch.randperm(rows, generator=generator).repeat(3)[: max(rows, size)].split(size):
            compare(index, hostile.take(given, index))
    wide = torch.zeros(rows, vocab + 3)
    wide[:, :vocab] = given["logits"]
    compare(torch.arange(rows), {**given, "logits": wide[:, :vocab]})
    return _differences(f"alone, shuffled, in any batch; V = {vocab}", drawn, differing)


# ---- distribution ----


def follows_law(sampler: Sampler, law: Law, vary: str, draws: int, key: int) -> Outcome:
    """Chi-square on the counts of the tokens."""
    tokens = draw(sampler, law, vary, draws, key)
    cell = torch.arange(len(law.logits)) if law.cell is None else law.cell
    cell = torch.cat([torch.zeros(1, dtype=torch.int64), cell + 1])  # the first is for no token at all: nothing may fall into it
    probabilities = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add(0, cell[1:], law.probabilities())
    observed = cell[tokens + 1].bincount(minlength=len(probabilities))
    return _judged(f"{law.name}; by {vary}", draws, chi_square(observed, probabilities))


def neighbours_are_independent(sampler: Sampler, law: Law, vary: str, draws: int, key: int) -> Outcome:
    """Chi-square on pairs of neighbouring draws, without overlap, against the product of the law with itself."""
    first, second = draw(sampler, law, vary, draws // 2 * 2, key).view(-1, 2).T
    size = len(law.logits) + 1
    probabilities = torch.cat([torch.zeros(1, dtype=torch.float64), law.probabilities()])
    observed = ((first + 1) * size + second + 1).bincount(minlength=size * size)
    return _judged(f"pairs of neighbours; by {vary}", draws, chi_square(observed, torch.outer(probabilities, probabilities).flatten()))


class Tail(NamedTuple):
    """One token, ``tokens`` others ``gap`` below it, and how often is drawn from them."""

    gap: float
    tokens: int
    draws: int

    def law(self) -> Law:
        return Law("far tail", torch.full((self.tokens + 1,), -self.gap).index_fill(0, torch.tensor([0]), 0.0))


# At a gap of 20.5 each token of the tail has a chance of 1.2e-9, all together one draw in 3,051; noise made of 24-bit uniforms never draws
# them. (vLLM's tests have such a case.) The second and third are for backends to which the first would take minutes.
TAILS = (Tail(20.5, 262_144, 60_000), Tail(18.0, 262_144, 6_000), Tail(13.0, 65_536, 200))


def far_tail(sampler: Sampler, tail: Tail, key: int) -> Outcome:
    """Tokens far below the best are drawn as often as they should be."""
    mass = tail.tokens * math.exp(-tail.gap)
    hits = int((draw(sampler, tail.law(), "position", tail.draws, key) != 0).sum())
    expected = tail.draws * mass / (1 + mass)
    return _judged(f"far tail, {tail.gap} below: hits, {expected:.1f} expected", tail.draws, poisson(hits, expected))


# ---- teeth ----

Check = Callable[[Sampler], Outcome]


def teeth(draws: int, key: int) -> list[tuple[Sampler, Check]]:
    """Planted wrong samplers, each with a check that it must fail, and that the law written plainly passes."""
    laws = {law.name: law for law in small_laws() + long_laws()}

    def by_law(law: Law, draws: int = draws) -> Check:
        return lambda sampler: follows_law(sampler, law, "position", draws, key)

    def independence(sampler: Sampler) -> Outcome:
        return neighbours_are_independent(sampler, laws["temperature 0.8, peaked"], "position", draws, key)

    def by_tail(sampler: Sampler) -> Outcome:
        return far_tail(sampler, TAILS[0], key)

    return [
        (wrong.uniforms_of_24_bits, by_tail),
        (wrong.uniforms_plus_epsilon, by_tail),
        (wrong.one_uniform_is_1, extreme_words),
        (wrong.one_exponential_is_infinite, extreme_words),
        (wrong.exponential_noise, by_law(laws["temperature 0.8, peaked"])),
        (wrong.noise_shared_by_four, by_law(laws["temperature 0.8, peaked"])),
        (wrong.half_the_positions, independence),
        (wrong.temperature_ignored, by_law(laws["temperature 0.8, peaked"])),
        (wrong.maxima_in_bfloat16, by_law(laws["long row, its sub-blocks"])),
        (wrong.exactly_k, by_law(laws["top-k 6 with ties"])),
        (wrong.crossing_token_dropped, by_law(laws["top-p 0.8, peaked"])),
        (wrong.top_p_before_top_k, by_law(laws["top-k 3 + top-p 0.8"])),
        *((wrong.mass_in_float32, by_law(edge_of_top_p(inside), draws // 10)) for inside in (False, True)),
        (wrong.negative_logits_divided, by_law(laws["repetition penalty 1.4"])),
        (wrong.prompt_counts_as_output, by_law(laws["presence penalty 0.9"])),
    ]
