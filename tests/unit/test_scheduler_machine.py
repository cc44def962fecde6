"""Any interleaving of submit, abort, step, timeout, preemption and failure keeps every invariant of scheduler and pool, and gives everybody
the tokens that it gets alone. The clock, the model and the cache are simulated."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from unit.simulated import VOCABULARY, Simulation

from engine.blocks import BlockPool
from engine.scheduler import Scheduler

SIZES = {"num_blocks": [9, 14, 40], "max_batch_size": [1, 3, 8], "max_batch_tokens": [8, 24, 64], "prefill_chunk": [1, 5, 64]}


def prompt_of(rng: random.Random) -> list[int]:
    """One of few beginnings, and sometimes an end of its own."""
    factor = rng.choice([1, 2])
    beginning = [i * i * factor % VOCABULARY for i in range(rng.choice([1, 15, 16, 17, 31, 32, 33, 48, 60]))]
    return beginning + [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 0, 1, 9]))]


class Machine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32 - 1), sizes=st.fixed_dictionaries({k: st.sampled_from(v) for k, v in SIZES.items()}), on=st.booleans()
    )
    def begin(self, seed: int, sizes: dict[str, int], on: bool) -> None:
        self.rng = random.Random(seed)
        self.sim = Simulation(seed=seed, drafts=0.5, prefix_cache=on, **sizes)

    @rule()
    def submit(self) -> None:
        submit(self.sim, self.rng)

    @rule(times=st.integers(1, 30), prompt_tokens=st.sampled_from([None, 1, 7, 30]))
    def step(self, times: int, prompt_tokens: int | None) -> None:
        for _ in range(times):
            self.sim.step(prompt_tokens)

    @rule()
    def abort(self) -> None:
        if self.sim.unfinished:
            self.sim.abort(self.rng.choice(self.sim.unfinished))

    @rule(seconds=st.sampled_from([0.1, 3.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.sim.now += seconds

    @rule()
    def preempt(self) -> None:
        self.sim.scheduler.preempt_running()
        self.sim.check()

    @rule(fails=st.sampled_from(["error", "interrupt"]))
    def fail(self, fails: str) -> None:
        self.sim.step(fails=fails)

    @rule()
    def reset(self) -> None:
        self.sim.scheduler.reset_prefix_cache()
        assert self.sim.scheduler.pool.num_cached == 0
        self.sim.check()

    @invariant()
    def tokens_are_those_that_each_gets_alone(self) -> None:
        if hasattr(self, "sim"):
            self.sim.check()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.drain()


def submit(sim: Simulation, rng: random.Random) -> None:
    """A request of any kind that fits."""
    size = sim.scheduler.max_batch_size
    terms = {
        "priority": rng.choice([0, 0, -1, 2]),
        "timeout": rng.choice([None, None, 0.5, 5.0]),
        "cache_salt": rng.choice([None, None, "a"]),
    }
    terms["streams"] = rng.random() < 0.7
    prompt, new = prompt_of(rng), rng.choice([1, 2, 5, 20])
    if size > 1 and rng.random() < 0.2:
        beams = rng.randint(2, size)
        if sim.scheduler.admissible(len(prompt), new, beams) is None:
            sim.submit(prompt, new, beams=beams, groups=rng.choice([1, 1, 2]), **terms)
    elif sim.scheduler.admissible(len(prompt), new) is None:
        sim.submit(prompt, new, samples=rng.choice([1, 1, 1, min(3, size)]), **terms)


def act(sim: Simulation, rng: random.Random) -> None:
    """Anything that may happen."""
    what = rng.random()
    if what < 0.3:
        submit(sim, rng)
    elif what < 0.33 and sim.unfinished:
        sim.abort(rng.choice(sim.unfinished))
    elif what < 0.35:
        sim.now += rng.choice([0.1, 3.0])
    elif what < 0.36:
        sim.scheduler.preempt_running()
    elif what < 0.38:
        sim.step(fails=rng.choice(["error", "interrupt"]))
    elif what < 0.382:
        sim.scheduler.reset_prefix_cache()
    else:
        sim.step(rng.choice([None, 1, 7, 30]))


def simulate(seed: int, actions: int) -> Simulation:
    rng = random.Random(seed)
    sim = Simulation(seed=seed, drafts=0.5, prefix_cache=rng.random() < 0.9, **{name: rng.choice(sizes) for name, sizes in SIZES.items()})
    for _ in range(actions):
        act(sim, rng)
    sim.drain()
    return sim


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def test_thousands_of_steps():
    sims = [simulate(seed, 400) for seed in range(30)]
    schedulers = [sim.scheduler for sim in sims]
    assert sum(sim.num_steps for sim in sims) > 10_000
    assert sum(scheduler.num_cached_tokens for scheduler in schedulers) > 10_000
    assert sum(scheduler.num_preemptions for scheduler in schedulers) > 500
    reasons = {output.finish_reason for sim in sims for submission in sim.submissions for output in submission.outputs}
    assert reasons == {"length", "abort", "error"}


def cached_before_full(monkeypatch):
    cache = BlockPool.cache
    monkeypatch.setattr(BlockPool, "cache", lambda pool, table, tokens, start, end, salt: cache(
        pool, table, tokens, start, min(end + 1, len(table) * 16, len(tokens)), salt))  # fmt: skip


def drafts_cached(monkeypatch):
    commit = Scheduler.commit

    def wrong(scheduler, plan):
        commit(scheduler, plan)
        for s in plan.sequences:
            if s.draft and scheduler.prefix_cache:
                scheduler.pool.cache(
                    s.sequence.block_table, [*s.sequence.tokens, *s.draft.tokens], s.start, s.end + len(s.draft), s.request.cache_salt
                )

    monkeypatch.setattr(Scheduler, "commit", wrong)


def hit_counted_twice(monkeypatch):
    monkeypatch.setattr(BlockPool, "num_held", lambda pool, blocks: len(list(blocks)))


def salt_forgotten(monkeypatch):
    key = BlockPool.key
    monkeypatch.setattr(BlockPool, "key", lambda pool, table, tokens, place, salt: key(pool, table, tokens, place, salt if place else None))


def parent_forgotten(monkeypatch):
    def key(pool, table, tokens, place, salt):
        return salt, array("i", tokens[place * 16 : place * 16 + 16]).tobytes()

    monkeypatch.setattr(BlockPool, "key", key)


def key_outlives_its_block(monkeypatch):
    take = BlockPool._take

    def wrong(pool):
        before = dict(pool._cached)
        block = take(pool)
        pool._cached |= {key: of for key, of in before.items() if of == block}
        return block

    monkeypatch.setattr(BlockPool, "_take", wrong)


def all_tokens_found(monkeypatch):
    def most(scheduler, request):
        return (request.shared or len(request.sequences[0].tokens)) // 16 if scheduler.prefix_cache else 0

    monkeypatch.setattr(Scheduler, "_most_cached", most)


def first_dropped_first(monkeypatch):
    def release(pool, table):
        for block in table:
            pool._drop(block)
        del table[:]

    monkeypatch.setattr(BlockPool, "release", release)


def duplicate_kept(monkeypatch):
    def cache(pool, table, tokens, start, end, salt):
        for place in range(start // 16, end // 16):
            key = pool.key(table, tokens, place, salt)
            if pool._cached.setdefault(key, table[place]) == table[place]:
                pool._keys[table[place]] = key

    monkeypatch.setattr(BlockPool, "cache", cache)


def failed_step_cached(monkeypatch):
    remove = Scheduler.remove

    def wrong(scheduler, request):
        if request.finished and request.outputs[0].finish_reason == "error" and not request.searches:
            request.num_computed = min(len(request.tokens), 16 * len(request.block_table))
            scheduler._remember(request, request, 0)
        remove(scheduler, request)

    monkeypatch.setattr(Scheduler, "remove", wrong)


def youngest_to_the_front(monkeypatch):
    add = Scheduler.add

    def wrong(scheduler, request):
        add(scheduler, request)
        scheduler.waiting.sort(key=lambda one: one.order[1], reverse=True)

    monkeypatch.setattr(Scheduler, "add", wrong)


def deadline_forgotten(monkeypatch):
    monkeypatch.setattr(Scheduler, "expired", lambda scheduler: [])


MUTANTS = [
    cached_before_full, drafts_cached, hit_counted_twice, salt_forgotten, parent_forgotten, key_outlives_its_block, all_tokens_found,
    first_dropped_first, duplicate_kept, failed_step_cached, youngest_to_the_front, deadline_forgotten,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_planted_bugs_are_found(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError, TypeError)):
        for seed in range(30):
            simulate(seed, 400)
