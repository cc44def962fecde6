"""The pace of prompts, on steps of known cost: it finds it, follows it, and is not led astray by interruptions."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from engine.pace import Pace

Cost = Callable[[int, int], float]  # seconds by rows and tokens of prompts


def linear(base: float, row: float, token: float) -> Cost:
    return lambda rows, tokens: base + row * rows + token * tokens


def run(pace: Pace, cost: Cost, rows: int, steps: int, rng: random.Random, noise: float = 0.0, interrupted: float = 0.0) -> list[float]:
    """Steps that decode ``rows``, every third beside a prompt at the pace's; how many times as long each of those was meant to take."""
    stretched = []
    for step in range(steps):
        tokens = pace.prompt_tokens if step % 3 == 2 else 0
        assert tokens >= 0
        seconds = cost(rows, tokens) * (1 + noise * rng.uniform(-1, 1))
        pace.note(rows, tokens, seconds * (20 if rng.random() < interrupted else 1))
        if tokens:
            stretched.append(cost(rows, tokens) / cost(rows, 0))
    return stretched


@pytest.mark.parametrize(("noise", "interrupted"), [(0.0, 0.0), (0.2, 0.0), (0.1, 0.05)])
@pytest.mark.parametrize("cost", [linear(0.01, 0.0001, 0.0005), linear(0.001, 0.0005, 0.001), linear(0.1, 0.0, 0.0005)])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_step_with_prompts_takes_about_twice_one_without(cost: Cost, rows: int, noise: float, interrupted: float):
    rng = random.Random(rows)
    pace = Pace()
    pace.note(0, 400, cost(0, 400))
    stretched = run(pace, cost, rows, 150, rng, noise, interrupted)[5:]
    assert max(stretched) < 3.0
    middle = sorted(stretched)[len(stretched) // 2]
    assert 1.5 < middle < 2.3 or pace.prompt_tokens < 3  # a single token may be too much already


def test_it_follows_the_number_of_rows():
    cost = linear(0.002, 0.001, 0.001)
    pace, rng = Pace(), random.Random(0)
    for rows in (1, 30, 2, 60, 1):
        assert max(run(pace, cost, rows, 90, rng)[10:]) < 2.5
        assert pace.prompt_tokens == pytest.approx(2 + rows, rel=0.4, abs=1.5)


def test_it_follows_what_tokens_cost():
    pace, rng = Pace(), random.Random(0)
    for token in (0.0002, 0.002, 0.0005):
        run(pace, linear(0.01, 0.0, token), 4, 200, rng)
        assert pace.prompt_tokens == pytest.approx(0.01 / token, rel=0.25)


def test_it_begins_with_care_and_never_stops_prompts():
    pace = Pace()
    assert pace.prompt_tokens == 32
    pace.note(3, 0, 0.001)
    assert pace.prompt_tokens == 32
    pace.note(0, 100, 100.0)  # a token takes a thousand steps
    assert pace.prompt_tokens == 1
    free = Pace()
    free.note(3, 0, 0.001)
    for _ in range(5):
        free.note(3, 32, 0.0009)  # as if prompts cost nothing
    assert 100 <= free.prompt_tokens <= 1000
    free.note(3, 2, 5.0)  # too few to tell
    assert 100 <= free.prompt_tokens <= 1000
