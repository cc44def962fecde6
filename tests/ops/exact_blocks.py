"""Block verification over fractions, for the tests of ``verify_block``: the algorithm as the paper has it, its coins integrated out, and
planted wrong ones."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Row = Sequence[Fraction]
Outcome = tuple[int, int]  # number of accepted drafts, and the token after them
ONE, ZERO = Fraction(1), Fraction(0)


class Block:
    """One chain: the target's rows ``p[0..n]``, the proposal's ``q[0..n - 1]`` (``q[i]`` is what ``x[i]`` was drawn from)."""

    def __init__(self, p: Sequence[Row], q: Sequence[Row], x: Sequence[int]) -> None:
        self.p, self.x, self.n = p, x, len(x)
        self.q = self.proposal(q)
        self.w = [ONE]
        for i, token in enumerate(x):
            self.w.append(min(self.w[i] * p[i][token] / self.q[i][token], ONE))

    def proposal(self, q: Sequence[Row]) -> Sequence[Row]:
        return q

    def rest(self, i: int) -> list[Fraction]:
        return [max(self.w[i] * p - q, ZERO) for p, q in zip(self.p[i], self.q[i], strict=True)]

    def acceptance(self, i: int) -> Fraction:
        """``h_i``."""
        if i == self.n:
            return self.w[i]
        z = sum(self.rest(i), ZERO)
        return z / (z + 1 - self.w[i]) if z + 1 - self.w[i] else ONE

    def stops(self) -> list[Fraction]:
        """The probability of each number of accepted drafts: of the largest i whose own coin falls below ``h_i``."""
        left, chances = ONE, [ZERO] * (self.n + 1)
        for i in range(self.n, 0, -1):
            chances[i] = left * self.acceptance(i)
            left -= chances[i]
        chances[0] = left
        return chances

    def outcomes(self) -> Counter[Outcome]:
        """The probability of every outcome."""
        law: Counter[Outcome] = Counter()
        for tau, chance in enumerate(self.stops()):
            if not chance:
                continue
            mass = list(self.p[tau]) if tau == self.n else self.rest(tau)
            if not any(mass):
                mass = list(self.p[tau])
            for token, m in enumerate(mass):
                if m:
                    law[tau, token] += chance * m / sum(mass)
        return law


class AcceptsAll(Block):
    def acceptance(self, i: int) -> Fraction:
        return ONE


class LeavesTheResidualUnclamped(Block):
    def rest(self, i: int) -> list[Fraction]:
        return [abs(self.w[i] * p - q) for p, q in zip(self.p[i], self.q[i], strict=True)]


class KnowsAnotherProposal(Block):
    """Not the one that the drafts were drawn from, but a flatter one."""

    def proposal(self, q: Sequence[Row]) -> Sequence[Row]:
        return [[(share + Fraction(1, len(row))) / 2 for share in row] for row in q]


class TossesOneCoin(Block):
    """For all decisions of the chain."""

    def stops(self) -> list[Fraction]:
        at_least = [max([ZERO, *map(self.acceptance, range(i, self.n + 1))]) for i in range(1, self.n + 1)]
        reach = [ONE, *at_least, ZERO]
        return [reach[i] - reach[i + 1] for i in range(self.n + 1)]


WRONG: tuple[type[Block], ...] = (AcceptsAll, LeavesTheResidualUnclamped, KnowsAnotherProposal, TossesOneCoin)


class TakesDraftsForCertain(Block):
    """Not wrong: whatever was drafted, without a look at the target's coins, may be taken for the only thing that could have been."""

    def proposal(self, q: Sequence[Row]) -> Sequence[Row]:
        return [[ONE if token == x else ZERO for token in range(len(row))] for row, x in zip(q, self.x, strict=True)]


class Token(Block):
    """Token verification (Leviathan et al. 2023), for comparison: each draft by itself, the first rejected ends the chain."""

    def stops(self) -> list[Fraction]:
        left, chances = ONE, []
        for i, token in enumerate(self.x):
            accepted = min(self.p[i][token] / self.q[i][token], ONE)
            chances.append(left * (1 - accepted))
            left *= accepted
        return [*chances, left]


Model = dict[tuple[int, ...], Row]  # the next token's law after each prefix


def drafted(proposal: Model, n: int) -> Any:
    """Every chain of ``n`` drafts with its probability."""
    for x in itertools.product(range(len(proposal[()])), repeat=n):
        chance = ONE
        for i, token in enumerate(x):
            chance *= proposal[x[:i]][token]
        if chance:
            yield x, chance


def block_of(kind: type[Block], target: Model, proposal: Model, x: tuple[int, ...]) -> Block:
    return kind([target[x[:i]] for i in range(len(x) + 1)], [proposal[x[:i]] for i in range(len(x))], x)


def emitted(kind: type[Block], target: Model, proposal: Model, n: int) -> Counter[tuple[int, ...]]:
    """The law of the first n + 1 tokens: those kept, the one after them, and then what the target draws by itself."""
    law: Counter[tuple[int, ...]] = Counter()
    for x, chance in drafted(proposal, n):
        for (tau, token), share in block_of(kind, target, proposal, x).outcomes().items():
            law[(*x[:tau], token)] += chance * share
    for length in range(1, n + 1):
        for tokens in [t for t in law if len(t) == length]:
            chance = law.pop(tokens)
            for token, share in enumerate(target[tokens]):
                if share:
                    law[(*tokens, token)] += chance * share
    return law


def by_itself(target: Model, n: int) -> Counter[tuple[int, ...]]:
    """The target's law of n + 1 tokens."""
    return Counter({x: chance for x, chance in drafted(target, n + 1)})


def mean_accepted(kind: type[Block], target: Model, proposal: Model, n: int) -> Fraction:
    """``E[tau]``."""
    mean = ZERO
    for x, chance in drafted(proposal, n):
        mean += chance * sum(tau * share for tau, share in enumerate(block_of(kind, target, proposal, x).stops()))
    return mean
