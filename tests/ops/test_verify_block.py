"""``verify_block``: the algorithm keeps the target's law, by exact enumeration; the oracle draws by it, by chi-square; the C++ kernel of
every instruction set gives the oracle's results. Planted wrong ones fail."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import block_cases
import pytest
import torch
from exact_blocks import WRONG, Block, Model, TakesDraftsForCertain, Token, by_itself, emitted, mean_accepted
from torch import Tensor

from engine.kernels import cpu, noise, reference, reference_verify
from engine.kernels.api import STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, VerifyResult
from engine.verify.laws import chi_square

SMALLEST_P = 1e-6
MASK = 0xFFFFFFFF
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


@pytest.fixture(params=["reference", "cpu"])
def verify_block(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return {"reference": reference, "cpu": cpu}[request.param].verify_block


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = cpu._cpu.num_threads()
    yield
    cpu._cpu.set_num_threads(before)


def draws_of(verify_block: Any) -> int:
    return 600 if verify_block is reference.verify_block else 100_000


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- the algorithm, exactly ----


def random_row(rng: random.Random, vocab: int, zeros: float) -> list[Fraction]:
    weights = [0 if rng.random() < zeros else rng.randint(1, 9) for _ in range(vocab)]
    weights[rng.randrange(vocab)] += 1
    return [Fraction(w, sum(weights)) for w in weights]


def random_model(rng: random.Random, vocab: int, length: int, zeros: float) -> Model:
    model: Model = {(): random_row(rng, vocab, zeros)}
    for _ in range(length):
        model |= {(*prefix, token): random_row(rng, vocab, zeros) for prefix in list(model) for token in range(vocab)}
    return model


def random_pairs() -> Iterator[tuple[Model, Model, int]]:
    rng = random.Random(0)
    for n in (1, 2, 3):
        for zeros in (0.0, 0.3, 0.6):
            for _ in range(4):
                yield random_model(rng, 3, n, zeros), random_model(rng, 3, n, zeros), n
        same = random_model(rng, 3, n, 0.3)
        yield same, same, n
        certain: Model = {prefix: [Fraction(int(token == len(prefix) % 3)) for token in range(3)] for prefix in same}
        yield same, certain, n
        yield certain, random_model(rng, 3, n, 0.0), n


PAIRS = list(random_pairs())
# The example of the paper's section 2: two tokens, whatever came before.
PAPER_TARGET: Model = {x: [Fraction(1, 3), Fraction(2, 3)] for x in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))}
PAPER_PROPOSAL: Model = {x: row[::-1] for x, row in PAPER_TARGET.items()}


def test_what_is_emitted_has_the_law_of_the_target() -> None:
    for target, proposal, n in PAIRS:
        law = emitted(Block, target, proposal, n)
        assert sum(law.values()) == 1
        assert law == by_itself(target, n)
    assert emitted(Block, PAPER_TARGET, PAPER_PROPOSAL, 2) == by_itself(PAPER_TARGET, 2)


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_the_enumeration_finds_every_wrong_algorithm(kind: type[Block]) -> None:
    lawful = [emitted(kind, target, proposal, n) == by_itself(target, n) for target, proposal, n in PAIRS]
    assert lawful.count(False) > 5


def test_drafts_may_be_taken_for_certain_at_the_price_of_acceptance() -> None:
    losses = []
    for target, proposal, n in PAIRS:
        assert emitted(TakesDraftsForCertain, target, proposal, n) == by_itself(target, n)
        losses.append(mean_accepted(Block, target, proposal, n) - mean_accepted(TakesDraftsForCertain, target, proposal, n))
    assert min(losses) >= 0 < max(losses)


def test_more_is_accepted_than_by_single_tokens() -> None:
    """The paper's example, and never less anywhere."""
    assert mean_accepted(Block, PAPER_TARGET, PAPER_PROPOSAL, 2) == Fraction(11, 9)
    assert mean_accepted(Token, PAPER_TARGET, PAPER_PROPOSAL, 2) == Fraction(10, 9)
    gains = [mean_accepted(Block, *pair) - mean_accepted(Token, *pair) for pair in PAIRS]
    assert min(gains) >= 0 < max(gains)


# ---- the kernels draw by it ----

# Masses of chains of up to three drafts over a few tokens, and those drafts.
DRAW_FROM = [
    ([[4, 4, 2], [4, 1, 5], [4, 0, 4], [3, 2, 4]], [[0, 3, 4], [0, 2, 5], [2, 1, 0]], [1, 2, 0]),  # far from what wrong ones give
    ([[3, 1, 2], [1, 5, 2], [2, 2, 1], [1, 1, 4]], [[1, 2, 3], [4, 1, 1], [1, 0, 2]], [2, 0, 2]),
    ([[3, 1, 2], [1, 5, 2], [2, 2, 1], [1, 1, 4]], [[1, 2, 3], [4, 1, 1], [1, 0, 2]], [0, 1, 0]),
    ([[0, 1, 2], [3, 0, 1], [1, 1, 0]], [[2, 1, 2], [1, 1, 1]], [2, 1]),
    ([[1, 2], [1, 2], [1, 2]], [[2, 1], [2, 1]], [0, 0]),
    ([[1, 2], [1, 2], [1, 2]], [[2, 1], [2, 1]], [0, 1]),
    ([[5, 1, 1, 1, 1], [1, 2, 3, 2, 1]], [[1, 0, 0, 0, 0]], [0]),
]


def repeated(p: list[list[int]], q: list[list[int]], x: list[int], count: int) -> dict[str, Tensor]:
    """The same chain, ``count`` times, each under another key: seeds, positions and streams in turn."""
    n = len(x)
    index = torch.arange(count)
    return {
        "target": (torch.tensor(p) << 36).repeat(count, 1),
        "status": torch.zeros(count * (n + 1), dtype=torch.int32),
        "proposal": torch.tensor([[-1] * len(p[0]), *q]).repeat(count, 1),
        "draft": ints(-1, *x).repeat(count),
        "start": (torch.arange(count + 1) * (n + 1)).int(),
        "seed": torch.where(index % 3 == 0, index * 0x9E3779B97F4A7C15, 7),
        "position": torch.where(index % 3 == 1, index, 5).int(),
        "stream": torch.where(index % 3 == 2, index, 3).int(),
    }


def exact(p: list[list[int]], q: list[list[int]], x: list[int]) -> Block:
    rows = [[[Fraction(m, sum(row)) for m in row] for row in rows] for rows in (p, q)]
    return Block(rows[0], rows[1], x)


def chance_of(result: VerifyResult, block: Block) -> float:
    """The chance of outcomes as far from the law as these."""
    vocab, law = len(block.p[0]), block.outcomes()
    assert result.tokens is not None
    cell = result.num_accepted.long() * vocab + result.tokens
    probabilities = torch.tensor([float(law[tau, token]) for tau in range(block.n + 1) for token in range(vocab)], dtype=torch.float64)
    return chi_square(torch.bincount(cell, minlength=len(probabilities)), probabilities).p


@pytest.mark.parametrize("case", range(len(DRAW_FROM)))
def test_outcomes_have_their_probabilities(verify_block: Any, case: int) -> None:
    assert chance_of(verify_block(**repeated(*DRAW_FROM[case], draws_of(verify_block))), exact(*DRAW_FROM[case])) > SMALLEST_P


def test_the_statistic_finds_every_wrong_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the oracle, on the chain that shows them all."""

    def fails(**change: Any) -> bool:
        given = {**repeated(*DRAW_FROM[0], 600), **change}
        return chance_of(reference.verify_block(**given), exact(*DRAW_FROM[0])) < SMALLEST_P

    assert not fails()
    flatter = torch.tensor([[-1] * 3, *([3 * m + sum(row) for m in row] for row in DRAW_FROM[0][1])]).repeat(600, 1)
    assert fails(proposal=flatter)
    right_coins, right_residual = reference_verify.coins, reference_verify.residual
    monkeypatch.setattr(reference_verify, "coins", lambda seed, position, stream, n: [0.0] * (n + 1))
    assert fails()
    monkeypatch.setattr(reference_verify, "coins", lambda *key: right_coins(*key)[:1] * (key[-1] + 1))
    assert fails()
    monkeypatch.setattr(reference_verify, "coins", right_coins)
    monkeypatch.setattr(reference_verify, "residual", lambda w, p, q: ((w * p - q).abs() * 2.0**62).long())
    assert fails()
    monkeypatch.setattr(reference_verify, "residual", right_residual)
    assert not fails()


@needs_cpp
@pytest.mark.parametrize(("right", "index"), [(True, 0), (True, 4), (True, 8), (False, 0)])
def test_a_whole_step_has_the_law_of_the_target(right: bool, index: int) -> None:
    """Drafts drawn from the proposal, verified, and gone on from by the target: the law of four tokens. Wrong: verified with another
    proposal."""
    target, proposal, n = [pair for pair in PAIRS if pair[2] == 3][index]
    count, vocab = 60_000, 3
    generator = torch.Generator().manual_seed(1)
    # One number for each prefix: a 1, and then its tokens.
    prefixes = {1: ()} | {int("1" + "".join(map(str, x)), vocab): x for x in target if x}
    scale = 2520**2 * 11 * 13 * 17 * 19 * 23  # of which all the fractions are whole ones
    tables = [torch.zeros(2 * vocab**n, vocab, dtype=torch.int64) for _ in range(2)]
    for table, model in zip(tables, (target, proposal), strict=True):
        for number, x in prefixes.items():
            table[number] = torch.tensor([int(share * scale) for share in model[x]])
            assert sum(share * scale for share in model[x]) == int(table[number].sum())
    prefix = [torch.ones(count, dtype=torch.int64)]
    x = []
    for _ in range(n):
        x.append(torch.multinomial(tables[1][prefix[-1]].double(), 1, generator=generator)[:, 0])
        prefix.append(prefix[-1] * vocab + x[-1])
    behind = torch.stack(prefix, dim=1)
    proposals = torch.cat([torch.zeros(count, 1, vocab, dtype=torch.int64), tables[1][behind[:, :-1]]], dim=1)
    draft = torch.cat([torch.zeros(count, 1, dtype=torch.int64), torch.stack(x, dim=1)], dim=1)
    if not right:
        proposals = 3 * proposals + proposals.sum(dim=2, keepdim=True)
    result = cpu.verify_block(
        tables[0][behind].flatten(0, 1), torch.zeros(count * (n + 1), dtype=torch.int32), proposals.flatten(0, 1).contiguous(),
        draft.flatten().int(), (torch.arange(count + 1) * (n + 1)).int(),
        torch.arange(count), torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32),
    )  # fmt: skip
    assert result.tokens is not None
    number = behind.gather(1, result.num_accepted.long()[:, None])[:, 0] * vocab + result.tokens
    for _ in range(n):
        going_on = number < vocab ** (n + 1)
        more = torch.multinomial(tables[0][number[going_on]].double(), 1, generator=generator)[:, 0]
        number[going_on] = number[going_on] * vocab + more
    law = by_itself(target, n)
    probabilities = torch.zeros(vocab ** (n + 1), dtype=torch.float64)
    for tokens, chance in law.items():
        probabilities[int("".join(map(str, tokens)), vocab)] = float(chance)
    seen = torch.bincount(number - vocab ** (n + 1), minlength=len(probabilities))
    assert (chi_square(seen, probabilities).p > SMALLEST_P) is right


# ---- the same result everywhere ----


@pytest.fixture(scope="module")
def oracle() -> list[Any]:
    return block_cases.run_all(reference.verify_block)


def compare_with_oracle(results: list[Any], oracle: list[Any]) -> None:
    for (name, _), result, expected in zip(block_cases.cases(), results, oracle, strict=True):
        for field, mine, theirs in zip(VerifyResult._fields, result, expected, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), f"{name}: {field}"


def test_oracle_meets_every_status_and_length(oracle: list[Any]) -> None:
    assert set(torch.cat([result[3] for result in oracle]).tolist()) == {STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED}
    assert {0, 1, 2, 3, 4, 5, 63} <= set(torch.cat([result[0] for result in oracle]).tolist())


@needs_cpp
def test_cpp_gives_the_oracles_results(oracle: list[Any]) -> None:
    compare_with_oracle(block_cases.run_all(cpu.verify_block), oracle)


@needs_cpp
def test_every_instruction_set_gives_the_oracles_results(oracle: list[Any], tmp_path: Path) -> None:
    for isa in cpu._cpu.supported_isas():
        if isa == cpu._cpu.isa():
            continue
        command = [sys.executable, block_cases.__file__, isa, str(tmp_path / isa)]
        subprocess.run(command, check=True, env={**os.environ, "ENGINE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})
        compare_with_oracle(torch.load(tmp_path / isa), oracle)


@needs_cpp
@pytest.mark.usefixtures("restore_threads")
def test_threads_make_no_difference(oracle: list[Any]) -> None:
    for threads in (1, 3):
        cpu._cpu.set_num_threads(threads)
        compare_with_oracle(block_cases.run_all(cpu.verify_block), oracle)


def test_a_chain_is_the_same_alone(verify_block: Any) -> None:
    given = block_cases.chains([3, 1, 5, 2], "near", 200, True, torch.Generator().manual_seed(3))
    together = verify_block(**given)
    start = given["start"].tolist()
    for s, (first, last) in enumerate(zip(start, start[1:], strict=False)):
        rows = {name: given[name][first:last] for name in ("target", "status", "proposal", "draft")}
        alone = verify_block(
            **rows, start=ints(0, last - first), **{name: given[name][s : s + 1] for name in ("seed", "position", "stream")}
        )
        assert [int(alone.num_accepted), int(alone.tokens), int(alone.status)] == [
            int(t[s]) for t in (together.num_accepted, together.tokens, together.status)
        ]
        assert torch.equal(alone.path, together.path[first:last])


# ---- single promises ----


def chain(p: Tensor, q: Tensor, draft: list[int], count: int = 1) -> dict[str, Tensor]:
    """Chains of the same rows, each with its own seed."""
    rows = len(p)
    return {
        "target": p.repeat(count, 1),
        "status": torch.zeros(rows * count, dtype=torch.int32),
        "proposal": torch.cat([torch.zeros_like(p[:1]), q]).repeat(count, 1),
        "draft": ints(0, *draft).repeat(count),
        "start": (torch.arange(count + 1) * rows).int(),
        **block_cases.keys(count, torch.Generator().manual_seed(4)),
    }


def test_drafts_from_the_target_itself_are_all_kept(verify_block: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    p = block_cases.masses(6, 300, 2.0, generator)
    for factor in (1, 3):  # in proportion: shares that differ in their last bit
        q = p[:-1] * factor
        given = chain(p, q, block_cases.drawn_from(q, generator).tolist(), 50)
        assert verify_block(**given).num_accepted.tolist() == [5] * 50


def test_drafts_that_the_target_never_gives_are_never_kept(verify_block: Any) -> None:
    p, q = torch.tensor([[1, 3, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 2, 1]])
    result = verify_block(**chain(p, q, [2], 200))
    assert result.num_accepted.tolist() == [0] * 200
    assert set(result.tokens.tolist()) == {0, 1}
    assert result.path.tolist() == [0, -1] * 200


def test_drafts_without_a_mass_are_never_kept(verify_block: Any) -> None:
    """``sample`` may draw a token whose mass, below 1, is none."""
    p, q = torch.tensor([[1, 3, 0], [1, 1, 1]]), torch.tensor([[0, 2, 0]])
    for draft in (0, 2):
        result = verify_block(**chain(p, q, [draft], 200))
        assert result.num_accepted.tolist() == [0] * 200
        assert set(result.tokens.tolist()) == {0}  # all that p has more of than q


def test_certain_targets_are_followed_as_far_as_drafted(verify_block: Any) -> None:
    """Greedy: the drafts that agree, and then the target's token."""
    p = torch.zeros(5, 9, dtype=torch.int64)
    wanted = [3, 1, 4, 1, 5]
    p[range(5), wanted] = 1 << 40
    generator = torch.Generator().manual_seed(6)
    for draft, kept in (([3, 1, 4, 1], 4), ([3, 1, 4, 2], 3), ([3, 0, 4, 1], 1), ([0, 1, 4, 1], 0)):
        for q in (torch.nn.functional.one_hot(torch.tensor(draft), 9) << 40, block_cases.masses(4, 9, 1.0, generator)):
            result = verify_block(**chain(p, q, draft, 20))
            sure = q.count_nonzero(dim=1).max() == 1
            if sure:
                assert result.num_accepted.tolist() == [kept] * 20
            assert result.tokens.tolist() == [wanted[n] for n in result.num_accepted.tolist()]
            assert max(result.num_accepted.tolist()) <= kept


def test_a_chain_ends_with_the_first_row_that_failed(verify_block: Any) -> None:
    given = block_cases.chains([6] * 60, "near", 50, False, torch.Generator().manual_seed(7))
    first = given["start"][:-1].long()
    keep = torch.arange(360) % 6 < 4
    whole = {name: given[name][keep] for name in ("target", "status", "proposal", "draft")}
    expected = verify_block(**{**given, **whole, "start": ints(*range(0, 241, 4))})
    given["status"][first + 3] = STATUS_NAN
    given["target"][first + 3] = 0
    given["draft"][first + 4] = 99  # what comes after it is not looked at
    given["proposal"][first + 5] = 0
    cut = verify_block(**given)
    assert torch.equal(cut.num_accepted, expected.num_accepted)
    failed = expected.num_accepted == 3
    assert 0 < int(failed.sum()) < 60
    assert torch.equal(cut.tokens, torch.where(failed, -1, expected.tokens))
    assert torch.equal(cut.status == STATUS_NAN, failed) and torch.equal(cut.status == STATUS_OK, ~failed)
    assert torch.equal(cut.path[keep], expected.path) and set(cut.path[~keep].tolist()) == {-1}


def test_a_chain_whose_first_row_failed_has_its_status(verify_block: Any) -> None:
    given = block_cases.chains([1, 3, 2], "near", 5, False, torch.Generator().manual_seed(8))
    given["status"][[0, 1]] = ints(STATUS_NAN, STATUS_NOTHING_ALLOWED)
    result = verify_block(**given)
    assert result.status.tolist() == [STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK]
    assert result.tokens.tolist()[:2] == [-1, -1] and int(result.tokens[2]) in range(5)
    assert result.num_accepted.tolist()[:2] == [0, 0]
    assert result.path.tolist()[:4] == [0, 0, -1, -1]


def test_one_row_is_drawn_from_its_shares(verify_block: Any) -> None:
    p = torch.tensor([[2, 1, 0, 5]])
    result = verify_block(**chain(p, p[:0], [], draws_of(verify_block)))
    assert chi_square(torch.bincount(result.tokens, minlength=4), p[0].double() / 8).p > SMALLEST_P


def test_a_residual_that_is_rounding_gives_way_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft from the target itself, refused all the same: what is left, nothing, is not drawn from."""
    monkeypatch.setattr(reference_verify, "coins", lambda seed, position, stream, n: [2.0] * (n + 1))
    p = torch.tensor([[1, 2, 0, 5], [0, 0, 0, 1]])
    result = reference.verify_block(**chain(p, p[:1], [1], 300))
    assert result.num_accepted.tolist() == [0] * 300
    assert result.tokens is not None and set(result.tokens.tolist()) == {0, 1, 3}


def test_coins_are_the_words_of_their_domain() -> None:
    key = (torch.tensor([0x0123456789ABCDEF]), ints(77), ints(3))
    high = noise.words(*key, 64, noise.DOMAIN_COIN)[0].tolist()
    low = noise.words(*key, 64, noise.DOMAIN_COIN + noise.DOMAIN_TAIL)[0].tolist()
    u = reference_verify.coins(*key, 63)
    assert u == pytest.approx([(x * 2**32 + tail + 0.5) / 2**64 for x, tail in zip(high, low, strict=True)], rel=1e-15)
    domains = (noise.DOMAIN_SAMPLE, noise.DOMAIN_COIN, noise.DOMAIN_RESIDUAL)
    assert len({*domains, *(d + noise.DOMAIN_TAIL for d in domains)}) == 6


def test_coins_are_fine(verify_block: Any) -> None:
    """A coin is above or below a chance by 40 of its bits: a target that gives the draft the next larger chance of 2^-40, or the next
    smaller one."""
    count, whole = 50, 1 << 40
    keys = block_cases.keys(count, torch.Generator().manual_seed(10))
    u = [reference_verify.coins(*(t[s : s + 1] for t in keys.values()), 1)[1] for s in range(count)]
    for less in (0, 1):
        chances = [math.ceil(x * whole) - less for x in u]
        result = verify_block(
            torch.tensor([row for chance in chances for row in ([chance, whole - chance], [1, 1])]),
            torch.zeros(2 * count, dtype=torch.int32), torch.tensor([[1, 0]] * 2 * count), ints(*[0] * 2 * count),
            (torch.arange(count + 1) * 2).int(), **keys,
        )  # fmt: skip
        assert result.num_accepted.tolist() == [1 - less] * count


# Seed 7, stream 1: positions and tokens whose word of the last draw is below 256.
RARE = [(10858, 2546), (11759, 33), (12020, 1831)]


@pytest.mark.parametrize(("position", "token"), RARE)
def test_small_words_of_the_last_draw_get_a_tail(verify_block: Any, position: int, token: int) -> None:
    """The token beats token 0 where its share is larger than the noise of both asks for, and only there; without its tail the border would
    be another."""
    key = (torch.tensor([7]), ints(position), ints(1))
    drawn = noise.noise(*key, token + 1, noise.DOMAIN_RESIDUAL)
    assert int(drawn.word[0, token]) < noise.TAIL_WORDS
    border = (drawn.exponential[0, token] / drawn.exponential[0, 0]).double()
    without = noise.exponential(drawn.word, drawn.low * 0)[0, token]
    assert abs(float(without / drawn.exponential[0, token]) - 1) > 1e-3
    for factor, winner in ((1 + 1e-4, token), (1 - 1e-4, 0)):
        p = torch.zeros(1, token + 1, dtype=torch.int64)
        p[0, 0] = 1 << 60
        p[0, token] = int(border * factor * 2**60)
        result = verify_block(p, ints(0), torch.zeros_like(p), ints(0), ints(0, 1), *key)
        assert result.tokens.tolist() == [winner]


def test_a_residual_sums_to_the_same_in_any_order() -> None:
    generator = torch.Generator().manual_seed(9)
    p, q = (reference_verify.shares(block_cases.masses(1, 4000, 3.0, generator))[0] for _ in range(2))
    mass = reference_verify.residual(0.7, p, q)
    shuffled = torch.randperm(4000, generator=generator)
    assert int(mass.sum()) == int(mass[shuffled].sum())
    assert float(mass.sum()) * 2.0**-62 == pytest.approx(float((0.7 * p - q).clamp(min=0).sum()), rel=1e-12)


# ---- bad input ----

GOOD = chain(torch.tensor([[1, 2, 3], [1, 1, 1], [2, 0, 1]]), torch.tensor([[1, 0, 2], [0, 0, 1]]), [2, 2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": [[1]]}, TypeError, "target must be a tensor, got list"),
        ({"target": torch.ones(3, 3)}, TypeError, "target must be int64, got torch.float32"),
        ({"target": torch.ones(3, dtype=torch.int64)}, ValueError, "target must have shape \\[R, V\\] with V >= 1, got \\(3,\\)"),
        ({"target": torch.ones(3, 0, dtype=torch.int64)}, ValueError, "target must have shape \\[R, V\\] with V >= 1, got \\(3, 0\\)"),
        ({"proposal": torch.ones(3, 4, dtype=torch.int64)}, ValueError, "proposal must have shape \\[R, V\\] = \\(3, 3\\), got \\(3, 4\\)"),
        ({"proposal": torch.arange(9).view(3, 3).T}, ValueError, "proposal must be contiguous, got strides \\(1, 3\\)"),
        ({"status": torch.zeros(3)}, TypeError, "status must be int32, got torch.float32"),
        ({"seed": ints(1)}, TypeError, "seed must be int64, got torch.int32"),
        ({"position": ints(1, 2)}, ValueError, "position must have shape \\[S\\] = \\(1,\\), got \\(2,\\)"),
        ({"stream": torch.zeros(1, dtype=torch.int32, device="meta")}, ValueError, "stream is on meta while target is on cpu"),
        ({"start": ints()}, ValueError, "start must have shape \\[S \\+ 1\\] with S >= 0, got \\(0,\\)"),
        ({"start": ints(0, 2)}, ValueError, "start must run from 0 to 3, the number of rows, got 0 to 2"),
        ({"draft": ints(0, 2, 3)}, ValueError, "draft must be in \\[0, 3\\), got 3 at 2"),
        ({"draft": ints(0, -1, 2)}, ValueError, "draft must be in \\[0, 3\\), got -1 at 1"),
    ],
)
def test_bad_input(verify_block: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify_block(**{**GOOD, **change})
