"""Every drafter with every number of drafted tokens at every temperature, alone and in batches: the output is that of plain decoding."""

from __future__ import annotations

import functools
import random

import pytest
from decode.speculation_cases import MODELS, Target, check_cell, total, watch

DRAFTERS = ("same", "near", "other", "tree", "wide tree", "tree of the same", "lookup", "suffix", "list")
COUNTS = (*range(11), 25, 63, None)
BATCHES = (1, 16)


@functools.cache
def target_at(model: str, temperature: float) -> Target:
    """Its requests all at one temperature."""
    return Target(model, (temperature,))


def run_cells(model: str, temperature: float, drafter: str, cells: list[tuple[int | None, int]]) -> None:
    one = target_at(model, temperature)
    accepted = 0
    for count, batch in cells:
        decoder = watch(one.speculative(one.drafter(drafter), max_batch_size=batch))
        accepted += total(check_cell(one, decoder, count), "num_accepted")
    assert accepted > 20 * len(cells)


@pytest.mark.slow_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.8, 1.2])
@pytest.mark.parametrize("model", MODELS[:2])
def test_every_cell(model: str, temperature: float, drafter: str):
    """In float32 and bfloat16; a cell is 208 requests, eight of each kind."""
    run_cells(model, temperature, drafter, [(count, batch) for count in COUNTS for batch in BATCHES])


@pytest.mark.slow_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("model", MODELS[2:])
def test_windows(model: str, drafter: str):
    rng = random.Random(f"{model} {drafter}")
    for temperature in (0.0, 0.8):
        run_cells(model, temperature, drafter, [(count, rng.choice(BATCHES)) for count in rng.sample(COUNTS, 4)])


@pytest.mark.slow_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_bundled_pair(drafter: str):
    for temperature, count, batch in ((0.0, 4, 16), (0.8, 10, 1), (0.8, None, 16), (1.2, 7, 16)):
        run_cells("bundled", temperature, drafter, [(count, batch)])


@pytest.mark.slow_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_preemptions(drafter: str):
    for model, count, every in (("llama", 5, 2), ("llama bfloat16", 10, 3), ("mistral window", 3, 5), (MODELS[3], 20, 3)):
        one = target_at(model, 0.8)
        decoder = watch(one.speculative(one.drafter(drafter), max_batch_size=16, cache_tokens=240), preempt_every=every)
        assert total(check_cell(one, decoder, count), "num_preemptions") > 50
