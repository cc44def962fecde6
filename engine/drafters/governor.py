"""How much to draft: what drafts are worth against what they cost, both as measured. No tensors.

The yardstick is goodput, tokens per second (SmartSpec, Liu et al. 2024): a step of B requests with k drafted rows gives
``B + sum of the rows' chances to hold`` tokens in ``step(B + k) + drafting`` seconds. Chances come from counts of what held, by the
drafter's confidence, for each request; costs from the times of the steps lately. Where nothing pays, nothing is drafted but for a probe now
and then, whose cost is kept to a small share of the time; lookups probe for nothing, as what they guessed is compared with what is drawn
without it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .draft import Draft

_BINS = 10
_FIRST_SLEEP, _LONGEST_SLEEP = 4, 1024  # steps between probes
_PROBE_SHARE = 0.01  # of the time
_PROBE_TOKENS = 3
_LONGEST = 32  # tokens of a draft
_UNPROVEN = 4  # of one by a drafter of whom nothing is known
_LEAST_GAIN = 1.02  # drafting must promise so much more goodput than none


class Costs:
    """Seconds of a step by its number of rows.

    What was measured lately for a number of rows counts against a rule of thumb: a step's time grows by the same for every row. So one step
    that was interrupted does not make its number of rows look dear for ever.
    """

    _ROW = 0.05  # of the first row, what another one costs by the rule
    _RULE = 2.0  # measurements that the rule counts as much as
    _KEPT = 0.995  # of a measurement's weight, with every further one of any number of rows
    _MOST = 20.0  # the weight of all measurements of a number of rows

    def __init__(self) -> None:
        self._rows: list[int] = []  # measured, in order
        # Of each: its time over that by the rule, the weight of that, and when it was noted.
        self._measured: dict[int, tuple[float, float, int]] = {}
        self._now = 0
        self._first_row = math.inf  # seconds by the rule; contexts grow and machines are shared, so all costs change together

    def __bool__(self) -> bool:
        return bool(self._rows)

    def _rule(self, rows: int) -> float:
        return self._first_row * (1 + self._ROW * (rows - 1))

    def note(self, rows: int, seconds: float) -> None:
        if not self._rows:
            self._first_row = seconds / (1 + self._ROW * (rows - 1))
        expected = self(rows)
        ratio = min(1.5, max(0.6, seconds / expected))  # what is further out was an interruption, most likely
        excess = expected * ratio / self._rule(rows)
        weight = 0.0
        if rows in self._measured:
            before, weight = self._of(rows)
            weight = min(weight, self._MOST)
            excess = before + (excess - before) / (weight + 1)
        else:
            bisect.insort(self._rows, rows)
        self._now += 1
        self._measured[rows] = excess, weight + 1, self._now
        self._first_row *= ratio**0.1

    def _of(self, rows: int) -> tuple[float, float]:
        """The time of a measured number of rows over that by the rule, and the weight of that by now."""
        excess, weight, noted = self._measured[rows]
        return excess, weight * self._KEPT ** (self._now - noted)

    def _factor(self, rows: int) -> float:
        excess, weight = self._of(rows)
        return (excess * weight + self._RULE) / (weight + self._RULE)

    def __call__(self, rows: int) -> float:
        """By the measurements of the nearest numbers of rows; infinite as long as nothing is measured at all."""
        if not self._rows:
            return self._rule(rows)
        at = bisect.bisect_left(self._rows, rows)
        high = self._rows[min(at, len(self._rows) - 1)]
        low = high if high == rows else self._rows[max(at - 1, 0)]
        factor = self._factor(low)
        if high > low:
            factor += (self._factor(high) - factor) * (rows - low) / (high - low)
        return self._rule(rows) * factor


class Rates:
    """How often what was drafted held where what it came after did, by the confidence of the drafter.

    Args:
        prior: rates to begin from, which count as much as a few observations; None: the confidence itself.
    """

    def __init__(self, prior: Rates | None = None) -> None:
        self._prior = prior
        # How many observations the prior counts as, and what is kept of counts at each further one: of what a drafter says of itself
        # next to nothing stays, of what it is like with others some always.
        self._weight, self._kept = (2.0, 0.99) if prior is None else (6.0, 0.97)
        self._held = [0.0] * _BINS
        self._tried = [0.0] * _BINS
        self._mean_held = self._mean_tried = 0.0

    def of(self, confidence: float) -> float:
        i = min(int(confidence * _BINS), _BINS - 1)
        prior = confidence if self._prior is None else self._prior.of(confidence)
        return (self._held[i] + self._weight * prior) / (self._tried[i] + self._weight)

    @property
    def mean(self) -> float:
        """Of all confidences."""
        prior = 0.7 if self._prior is None else self._prior.mean
        return (self._mean_held + self._weight * prior) / (self._mean_tried + self._weight)

    @property
    def proven(self) -> int:
        """How many tokens in depth have held lately, with all requests."""
        return int(self._mean_held if self._prior is None else self._prior._mean_held)

    def note(self, confidence: float, held: bool) -> None:
        """What became of one drafted token whose parent held."""
        i = min(int(confidence * _BINS), _BINS - 1)
        self._held[i] = self._held[i] * self._kept + held
        self._tried[i] = self._tried[i] * self._kept + 1
        if self._prior is not None:
            self._prior.note(confidence, held)

    def note_depth(self, held: bool) -> None:
        """Whether a depth held, by any of its alternatives."""
        self._mean_held = self._mean_held * self._kept + held
        self._mean_tried = self._mean_tried * self._kept + 1
        if self._prior is not None:
            self._prior.note_depth(held)


@dataclass
class Record:
    """What is known of one drafter's luck with one request."""

    rates: Rates
    patience: int = 1  # so many drafts in a row that were not worth verifying are let pass
    misses: int = 0
    asleep: int = 0  # steps until it is asked again
    sleep: int = _FIRST_SLEEP  # how many those are next time
    cost: float = 0.0  # seconds that it last took to ask
    unverified: Draft | None = None  # guessed when the request had `at` tokens, and compared with what comes
    at: int = 0

    def limit(self, depth: Depth | None, most: int) -> int:
        """How many of ``most`` tokens to ask for: as many as pay (a lookup's cost nothing: ``depth`` None), or 0; a few for a probe when
        one is due."""
        if self.unverified is not None:
            return 0
        # Whatever a drafter says of itself, it is not trusted with long drafts before shorter ones held.
        longest = min(most, _LONGEST, _UNPROVEN + 2 * self.rates.proven)
        if self.asleep:
            self.asleep -= 1
            return 0 if self.asleep else min(longest, _PROBE_TOKENS) if depth is not None else longest
        if depth is None:
            return longest
        best = depth.best(self.rates.mean, longest)
        if best:
            self.sleep = _FIRST_SLEEP
            return best
        self.rest(depth.own, self.sleep)
        self.sleep = min(2 * self.sleep, _LONGEST_SLEEP)
        return 0

    def rest(self, plain: float, least: int = 0) -> None:
        """Do not ask again for ``least`` steps, or more where asking takes more than its share of as many that take ``plain`` seconds."""
        due = self.cost / (_PROBE_SHARE * plain)
        self.asleep = min(max(least, int(due)), _LONGEST_SLEEP)

    def leave(self, draft: Draft, at: int) -> None:
        """A draft is not verified: what comes after ``at`` tokens will show how good it was."""
        self.unverified, self.at = draft, at

    def missed(self, plain: float) -> None:
        """Asking brought nothing worth verifying, where a plain step takes so many seconds."""
        self.misses += 1
        if self.misses >= self.patience:
            self.misses = 0
            self.rest(plain)

    def compare(self, tokens: Sequence[int]) -> None:
        """Learn from what an unverified draft guessed, as far as it has come."""
        draft, at = self.unverified, self.at
        if draft is None or len(tokens) <= at:
            return
        self.unverified = None
        node = 0
        for token in tokens[at:]:
            node = self._learn(draft, node, token)
            if not node:
                return

    def _learn(self, draft: Draft, node: int, token: int) -> int:
        """What came after a node that held was ``token``; the child that stands for it, or 0."""
        children = [child for child, parent in enumerate(draft.parents, 1) if parent == node]
        if not children:
            return 0
        right = next((child for child in children if draft.tokens[child - 1] == token), 0)
        for child in children:
            self.rates.note(draft.confidence[child - 1], child == right)
        self.rates.note_depth(bool(right))
        return right

    def learn(self, draft: Draft, tokens: Sequence[int]) -> None:
        """A draft has been verified: ``tokens`` came."""
        self.misses = 0
        node = 0
        for token in tokens:
            node = self._learn(draft, node, token)
            if not node:
                return

    def chances(self, draft: Draft) -> list[float]:
        """Of each node, that it holds: the product of the rates along its path."""
        chances = [1.0]
        for parent, confidence in zip(draft.parents, draft.confidence, strict=True):
            chances.append(chances[parent] * self.rates.of(confidence))
        return chances[1:]


@dataclass
class Depth:
    """How far to draft for one of ``drafting`` requests in a step of ``batch`` rows: asked before, and after each token.

    Args:
        step: seconds of the model's steps; level: of the drafter's, for all that are drafting.
        nodes: tokens drafted at each depth.
    """

    step: Costs
    level: float
    batch: int
    drafting: int
    nodes: int = 1

    own: float = field(init=False)  # its share of a plain step
    share: float = field(init=False)  # its share of a level

    def __post_init__(self) -> None:
        self.own = self.step(self.batch) / self.batch
        self.share = self.level / self.drafting

    def seconds(self, depth: int) -> float:
        """Its share of a step with drafts so deep, drafting included."""
        more = self.step(self.batch + self.drafting * depth * self.nodes) - self.step(self.batch)
        return self.own + max(more, 0.0) / self.drafting + depth * self.share

    def best(self, rate: float, most: int) -> int:
        """The depth of the best goodput if every token holds at this rate; 0 where drafting does not pay."""
        best, depth, gain, chance = _LEAST_GAIN / self.own, 0, 1.0, 1.0
        for d in range(1, most + 1):
            chance *= rate
            gain += chance
            goodput = gain / self.seconds(d)
            if goodput > best:
                best, depth = goodput, d
            elif chance < 0.02:
                break
        return depth

    def goes_on(self, chances: Sequence[float], rate: float) -> bool:
        """Whether one more token raises the goodput, after tokens that hold with such chances."""
        depth = len(chances)
        now = (1.0 + sum(chances)) / self.seconds(depth)
        return chances[-1] * rate > now * (self.seconds(depth + 1) - self.seconds(depth))


def prune(step: Costs, drafting: float, base: int, chances: Sequence[Sequence[float]]) -> list[list[int]]:
    """Which nodes of each draft to verify so that the goodput of the step is best.

    Args:
        step: seconds of the model's steps.
        drafting: seconds that the drafts took.
        base: rows of the step besides.
        chances: of each node of each draft (node i at i - 1), never larger than its parent's.

    Returns:
        Nodes of each draft, in order; with each its parent.
    """
    nodes = sorted((-chance, node, i) for i, draft in enumerate(chances) for node, chance in enumerate(draft, 1))
    best, count, gain = base / (step(base) + drafting), 0, float(base)  # the drafts are made, whatever becomes of them
    for k, (chance, _, _) in enumerate(nodes, 1):
        gain -= chance
        goodput = gain / (step(base + k) + drafting)
        if goodput > best:
            best, count = goodput, k
    kept: list[list[int]] = [[] for _ in chances]
    for _, node, i in nodes[:count]:
        kept[i].append(node)
    return [sorted(ids) for ids in kept]
