"""How much to draft, against brute force: costs as measured, chances as counted, and the best goodput that follows from both."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafters import governor
from engine.drafters.draft import Draft
from engine.drafters.governor import Costs, Depth, Rates, Record, prune


class Line:
    """Costs that are known: ``base + row * rows``."""

    def __init__(self, base: float, row: float) -> None:
        self.base, self.row = base, row

    def __call__(self, rows: int) -> float:
        return self.base + self.row * rows


def measured(seconds: dict[int, float], times: int = 100) -> Costs:
    costs = Costs()
    for _ in range(times):
        for rows, time in seconds.items():
            costs.note(rows, time)
    return costs


def test_nothing_measured_costs_infinitely_much():
    costs = Costs()
    assert not costs and costs(1) == costs(9) == math.inf
    costs.note(3, 0.5)
    assert costs and costs(3) == pytest.approx(0.5)
    assert 0.2 < costs(1) < costs(2) < 0.5 < costs(4) < costs(64) < 0.5 * 64  # a guess


def test_what_is_measured_again_and_again_is_believed():
    costs = measured({8: 3.0, 2: 1.0, 32: 4.0})
    assert [costs(rows) for rows in (2, 8, 32)] == pytest.approx([1.0, 3.0, 4.0], rel=0.15)
    between = [costs(rows) for rows in range(2, 33)]
    assert between == sorted(between)
    assert 0 < costs(1) <= costs(2) and costs(32) < costs(100) < math.inf


def test_one_interruption_means_little():
    costs = measured({4: 1.0, 16: 1.5})
    costs.note(4, 1000.0)
    assert costs(4) < 1.3 and costs(16) < 1.8
    costs.note(4, 1e-9)
    assert costs(4) > 0.7


def test_a_machine_that_becomes_slower_does_so_for_all_numbers_of_rows():
    costs = measured({1: 1.0, 8: 2.0, 64: 5.0})
    before = [costs(rows) for rows in (1, 64)]
    for _ in range(300):
        costs.note(8, 4.0)
    assert costs(8) == pytest.approx(4.0, rel=0.1)
    assert all(costs(rows) > 1.2 * cost for rows, cost in zip((1, 64), before, strict=True))


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(1e-6, 10)), min_size=1, max_size=40), st.integers(1, 200))
def test_costs_stay_positive_and_finite(notes: list[tuple[int, float]], rows: int):
    costs = Costs()
    for at, seconds in notes:
        costs.note(at, seconds)
    assert 0 < costs(rows) < math.inf


def test_rates_begin_with_the_confidence_and_follow_what_is_seen():
    rates = Rates()
    assert [rates.of(c) for c in (0.0, 0.25, 1.0)] == pytest.approx([0.0, 0.25, 1.0])
    for _ in range(300):
        rates.note(0.92, False)
        rates.note(0.15, True)
    assert rates.of(0.95) < 0.2 and rates.of(0.12) > 0.8
    assert rates.of(0.55) == pytest.approx(0.55)  # nothing was seen of these


def test_rates_of_a_request_begin_with_those_of_all():
    everyone = Rates()
    first = Rates(everyone)
    for _ in range(600):
        first.note(0.9, False)
        first.note_depth(False)
    second = Rates(everyone)
    assert second.of(0.9) < 0.3 and second.mean < 0.2
    for _ in range(600):
        second.note(0.9, True)
        second.note_depth(True)
    assert second.of(0.9) > 0.9 > 0.3 > first.of(0.9) and second.mean > 0.9 > 0.3 > first.mean


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60), st.floats(0, 1))
def test_rates_are_probabilities(notes: list[tuple[float, bool]], confidence: float):
    rates = Rates(Rates())
    for at, held in notes:
        rates.note(at, held)
        rates.note_depth(held)
    assert 0 <= rates.of(confidence) <= 1 and 0 <= rates.mean <= 1


def goodput(depth: Depth, rate: float, d: int) -> float:
    return sum(rate**i for i in range(d + 1)) / depth.seconds(d)


@settings(max_examples=300)
@given(
    base=st.floats(1e-3, 1), row=st.floats(0, 0.5), level=st.floats(0, 0.5), batch=st.integers(1, 16), rate=st.floats(0, 1),
    most=st.integers(1, 40), nodes=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_the_best_depth_is_the_best(base, row, level, batch, rate, most, nodes, data):
    drafting = data.draw(st.integers(1, batch))
    depth = Depth(Line(base, row), level, batch, drafting, nodes)
    found = depth.best(rate, most)
    assert 0 <= found <= most
    best = max(goodput(depth, rate, d) for d in range(most + 1))
    plain = 1 / depth.own
    if found:
        assert goodput(depth, rate, found) >= best * (1 - 1e-9) and goodput(depth, rate, found) > plain
    else:
        assert best <= plain * governor._LEAST_GAIN * (1 + 1e-9)


def test_no_depth_where_drafting_cannot_pay():
    free = Depth(Line(1.0, 0.0), 0.0, 1, 1)
    assert free.best(0.5, 63) > 5 and free.best(0.0, 63) == 0
    assert Depth(Line(0.0, 1.0), 0.0, 1, 1).best(1.0, 63) == 0  # each row costs a step
    assert Depth(Line(1.0, 0.0), 1.0, 1, 1).best(1.0, 63) == 0  # each draft costs a step
    assert Depth(Costs(), 0.1, 1, 1).best(1.0, 63) == 0  # nothing is known yet
    assert Depth(Line(1.0, 0.0), math.inf, 1, 1).best(1.0, 63) == 0


def test_a_draft_goes_on_while_a_token_is_worth_its_cost():
    depth = Depth(Line(1.0, 0.05), 0.05, 1, 1)
    assert depth.goes_on([0.9], 0.9) and not depth.goes_on([0.01], 0.5)
    for chances in ([0.5], [0.9, 0.2], [0.99, 0.9, 0.3, 0.1], [1.0] * 30):
        for rate in (0.1, 0.5, 0.9, 1.0):
            more = [*chances, chances[-1] * rate]
            raised = (1 + sum(more)) / depth.seconds(len(more)) > (1 + sum(chances)) / depth.seconds(len(chances))
            assert depth.goes_on(chances, rate) == raised


def random_chances(rng: random.Random) -> tuple[list[int], list[float]]:
    """Parents and chances of a small tree; many of the chances are the same."""
    parents = [0] if rng.random() < 0.8 else []
    while parents and len(parents) < 6 and rng.random() < 0.8:
        parents.append(rng.randint(0, len(parents)))
    chances = [1.0]
    for parent in parents:
        chances.append(chances[parent] * rng.choice([1.0, 0.5, 0.5, 0.9, 0.1, 0.0]))
    return parents, chances[1:]


def closed(parents: list[int], kept: tuple[int, ...]) -> bool:
    return all(parents[node - 1] in (0, *kept) for node in kept)


@pytest.mark.parametrize("seed", range(8))
def test_pruning_leaves_the_best_of_all_trees(seed: int):
    rng = random.Random(seed)
    kept_any = 0
    for _ in range(25):
        drafts = [random_chances(rng) for _ in range(rng.randint(1, 2))]
        step = Line(rng.choice([0.1, 1.0]), rng.choice([0.0, 0.01, 0.1, 0.5]))
        if rng.random() < 0.3:
            step = lambda rows: 1.0 + 2.0 * (rows // 5)  # noqa: E731  a kernel works in fours: some rows are free
        drafting, base = rng.choice([0.0, 0.05, 2.0]), rng.randint(1, 3)

        def value(choice, step=step, drafting=drafting, base=base, drafts=drafts) -> float:
            rows = sum(map(len, choice))
            gain = sum(chances[node - 1] for (_, chances), nodes in zip(drafts, choice, strict=True) for node in nodes)
            return (base + gain) / (step(base + rows) + drafting)

        kept = prune(step, drafting, base, [chances for _, chances in drafts])
        every = [
            [nodes for k in range(len(parents) + 1) for nodes in itertools.combinations(range(1, len(parents) + 1), k)]
            for parents, _ in drafts
        ]
        best = max(value(choice) for choice in itertools.product(*every) if all(map(closed, (p for p, _ in drafts), choice)))
        assert value(kept) >= best * (1 - 1e-12)
        for (parents, _), nodes in zip(drafts, kept, strict=True):
            assert nodes == sorted(set(nodes)) and closed(parents, tuple(nodes))
        kept_any += any(kept)
    assert kept_any > 3


def test_pruning_nothing():
    assert prune(Line(1.0, 0.1), 0.0, 4, []) == []
    assert prune(Line(1.0, 0.1), 0.0, 4, [[], []]) == [[], []]
    assert prune(Costs(), 0.0, 1, [[1.0, 1.0]]) == [[]]  # no step has been measured
    assert prune(Line(1.0, 0.0), 0.0, 1, [[0.5, 0.5], [0.5]]) == [[1, 2], [1]]


def never_pays() -> Depth:
    return Depth(Line(0.0, 1.0), 0.0, 1, 1)


def test_a_record_sleeps_ever_longer_and_probes_in_between():
    record = Record(Rates())
    zeros = []
    for _ in range(12):
        count = 0
        while not (limit := record.limit(never_pays(), 20)):
            count += 1
        assert 1 <= limit <= governor._PROBE_TOKENS
        zeros.append(count)
    assert zeros[:4] == [4, 8, 16, 32] and zeros[-1] == zeros[-2] == governor._LONGEST_SLEEP
    pays = Depth(Line(1.0, 0.0), 0.0, 1, 1)
    assert record.limit(pays, 20) > governor._PROBE_TOKENS  # awake at once
    assert [record.limit(never_pays(), 20) for _ in range(4)] == [0] * 4 and record.limit(never_pays(), 2) == 2


def test_a_dear_probe_is_a_rare_one():
    record = Record(Rates(), cost=0.5)
    zeros = 0
    while not record.limit(never_pays(), 20):
        zeros += 1
    assert zeros == 0.5 / governor._PROBE_SHARE  # own time: 1 second a step


def test_what_costs_nothing_is_always_asked():
    record = Record(Rates())
    assert [record.limit(None, most) for most in (1, 3, 3)] == [1, 3, 3]
    record.leave(Draft.chain([5], [0.5]), 7)
    assert record.limit(None, 5) == record.limit(never_pays(), 5) == 0  # not before it is known what became of the last


def test_long_drafts_are_for_those_whose_shorter_ones_held():
    record = Record(Rates(overall := Rates()))
    limits = []
    for _ in range(20):
        limits.append(record.limit(None, 63))
        tokens = list(range(limits[-1]))
        record.learn(Draft.chain(tokens, [1.0] * len(tokens)), tokens)
    assert limits[0] == governor._UNPROVEN and limits == sorted(limits) and limits[1] < limits[2] and limits[-1] == governor._LONGEST
    assert Record(Rates(overall)).limit(None, 63) == governor._LONGEST  # for another request of the same drafter
    for _ in range(600):
        record.learn(Draft.chain([1], [1.0]), [2])
    assert Record(Rates(overall)).limit(None, 63) <= governor._UNPROVEN + 2


@pytest.mark.parametrize("patience", [1, 2])
def test_misses_in_a_row_are_rested_from(patience: int):
    record = Record(Rates(), patience=patience, cost=0.05)
    for _ in range(patience - 1):
        record.missed(1.0)
        assert record.limit(None, 3) == 3
    record.missed(1.0)
    rested = 0
    while not record.limit(None, 3):
        rested += 1
    assert rested == 0.05 / governor._PROBE_SHARE - 1  # the step in which it is asked again is one of them
    for _ in range(3 * patience):  # one that is verified makes up for it
        record.learn(Draft.chain([1], [1.0]), [2])
        for _ in range(patience - 1):
            record.missed(1.0)
    assert record.limit(None, 3) == 3


TREE = Draft((5, 6, 7, 8, 9), (0, 0, 1, 1, 3), (0.9, 0.3, 0.7, 0.5, 0.1))


class Noted(Rates):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, bool]] = []
        self.depths: list[bool] = []

    def note(self, confidence: float, held: bool) -> None:
        self.seen.append((confidence, held))

    def note_depth(self, held: bool) -> None:
        self.depths.append(held)


@pytest.mark.parametrize(
    ("tokens", "seen", "depths"),
    [
        ([1], [(0.9, False), (0.3, False)], [False]),
        ([6], [(0.9, False), (0.3, True)], [True]),
        ([6, 7], [(0.9, False), (0.3, True)], [True]),  # nothing was drafted after 6
        ([5, 1], [(0.9, True), (0.3, False), (0.7, False), (0.5, False)], [True, False]),
        ([5, 7, 1], [(0.9, True), (0.3, False), (0.7, True), (0.5, False), (0.1, False)], [True, True, False]),
        ([5, 7, 9, 2], [(0.9, True), (0.3, False), (0.7, True), (0.5, False), (0.1, True)], [True, True, True]),
        ([], [], []),
    ],
)
def test_what_is_learned_of_a_tree(tokens: list[int], seen: list, depths: list):
    """Of each node that held, its children; the same when the tokens come without the draft having been verified."""
    record = Record(rates := Noted())
    record.learn(TREE, tokens)
    assert (rates.seen, rates.depths) == (seen, depths)
    record = Record(rates := Noted(), unverified=TREE, at=3)
    record.compare([0, 0, 0])
    assert record.unverified is TREE and not rates.seen  # nothing has come yet
    record.compare([0, 0, 0, *tokens])
    assert (rates.seen, rates.depths) == (seen, depths)
    assert (record.unverified is None) == bool(tokens)


def test_of_two_like_siblings_only_one_holds():
    record = Record(rates := Noted())
    record.learn(Draft((5, 5), (0, 0), (0.6, 0.4)), [5, 1])
    assert rates.seen == [(0.6, True), (0.4, False)] and rates.depths == [True]


def test_chances_multiply_along_the_path():
    record = Record(Rates())
    assert record.chances(TREE) == pytest.approx([0.9, 0.3, 0.63, 0.45, 0.063])
    assert record.chances(Draft()) == []
