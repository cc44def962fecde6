"""Who goes first and who waits: priorities, timeouts, prompts beside sequences that decode, prompts that share a beginning."""

from __future__ import annotations

import pytest
from unit.simulated import Simulation

from engine.request import Request
from engine.scheduler import PRIORITY_SECONDS


def prompt(first: int, length: int) -> list[int]:
    """Of a first token of its own, so that it shares nothing."""
    return [first, *[i % 3 for i in range(length - 1)]]


def ends_in_order(sim: Simulation, requests: list[Request]) -> list[int]:
    """Run to the end; the indices of requests in the order in which they ended."""
    order: list[int] = []
    while sim.scheduler.has_work:
        sim.step()
        order += [i for i, request in enumerate(requests) if request.finished and i not in order]
    sim.drain()
    return order


def submit_each(sim: Simulation, terms: list[dict], seconds: float = 1.0) -> list[Request]:
    """One request of each terms, so many seconds apart, all while the only seat is taken."""
    sim.submit(prompt(99, 3), 3)
    sim.step()
    requests = []
    for i, term in enumerate(terms):
        sim.now += seconds
        requests += sim.submit(prompt(i, 5), 2, **term).requests
    return requests


def test_first_come_first_served_within_a_priority():
    sim = Simulation(20, max_batch_size=1)
    requests = submit_each(sim, [{"priority": p} for p in (0, 1, 0, -2, 1, 0, -2)])
    assert ends_in_order(sim, requests) == [3, 6, 0, 2, 5, 1, 4]


def test_a_priority_is_worth_its_seconds_and_no_more():
    for seconds, expected in ((0.9, [1, 0]), (1.1, [0, 1])):
        sim = Simulation(20, max_batch_size=1)
        requests = submit_each(sim, [{"priority": 1}, {"priority": 0}], seconds * PRIORITY_SECONDS)
        assert ends_in_order(sim, requests) == expected


def test_nobody_starves_under_a_stream_of_others_of_higher_priority():
    sim = Simulation(20, max_batch_size=1)
    (patient,) = submit_each(sim, [{"priority": 2}])
    for i in range(1000):
        sim.now += 1.0
        if len(sim.scheduler.waiting) < 3:
            sim.submit(prompt(i % 90, 5), 2)
        sim.step()
        if patient.finished:
            break
    assert patient.finished and 2 * PRIORITY_SECONDS - 5 < sim.now < 2 * PRIORITY_SECONDS + 10


def test_one_that_does_not_fit_is_not_overtaken_and_blocks_nobody_for_ever():
    sim = Simulation(8, max_batch_size=4)
    (running,) = sim.submit(prompt(0, 40), 60).requests  # 3 blocks, 7 at last
    sim.step()
    (large,) = sim.submit(prompt(1, 90), 10).requests  # 6 blocks
    small = [sim.submit(prompt(2 + i, 5), 2).requests[0] for i in range(3)]
    for _ in range(20):
        sim.step()
    assert sim.scheduler.running == [running] and sim.scheduler.waiting == [large, *small]
    assert ends_in_order(sim, [running, large, *small]) == [0, 2, 3, 4, 1]  # the small ones beside the large one


def test_the_last_in_order_is_preempted_whoever_came_last():
    sim = Simulation(4, max_batch_size=2)
    (low,) = sim.submit(prompt(0, 30), 20, priority=1).requests
    (high,) = sim.submit(prompt(1, 30), 20).requests
    sim.step()
    assert sim.scheduler.running == [high, low]
    while not high.finished:
        sim.step()
    assert low.num_preemptions == 1 and high.num_preemptions == 0
    sim.drain()


def test_a_preempted_request_goes_back_to_its_place():
    sim = Simulation(40, max_batch_size=3)
    requests = [sim.submit(prompt(i, 20), 30, priority=p).requests[0] for i, p in enumerate((0, 2, 1))]
    sim.step()
    requests.append(sim.submit(prompt(7, 20), 30, priority=1).requests[0])
    sim.scheduler.preempt_running()
    assert sim.scheduler.waiting == [requests[i] for i in (0, 2, 3, 1)]
    sim.drain()


@pytest.mark.parametrize("seats", [1, 4])
def test_a_timeout_ends_those_who_run_and_those_who_wait(seats: int):
    sim = Simulation(20, max_batch_size=seats)
    kept, timed = (sim.submit(prompt(i, 20), 30, timeout=timeout).requests[0] for i, timeout in enumerate((None, 5.0)))
    (leader, follower, other) = sim.submit(prompt(2, 20), 30, timeout=5.0, samples=min(3, seats)).requests if seats > 1 else (timed,) * 3
    beams = sim.submit(prompt(3, 20), 30, timeout=5.0, beams=2).requests[0] if seats > 1 else timed
    for now, ended in ((4.9, False), (5.0, True)):
        sim.now = now
        sim.step()
        assert not kept.finished
        assert all(request.finished == ended for request in (timed, leader, follower, other, beams))
    assert timed.outputs[0].finish_reason == "abort" and sim.scheduler.running == [kept]
    assert sim.scheduler.expired() == []
    sim.drain()


def test_a_request_that_has_ended_times_out_no_more():
    sim = Simulation(20)
    sim.submit(prompt(0, 5), 2, timeout=5.0)
    sim.drain()
    sim.now = 10.0
    assert sim.scheduler.expired() == []


def tokens_of(plan, request: Request) -> int:
    return sum(s.num_tokens for s in plan.sequences if s.request is request)


def test_prompts_get_what_is_left_for_them_together():
    sim = Simulation(100, max_batch_size=8, max_batch_tokens=64)
    (short,) = sim.submit(prompt(0, 4), 60).requests
    sim.step(10)
    assert short.num_new_tokens == 1  # nobody decoded: it got all of its tokens
    long = [sim.submit(prompt(1 + i, 40), 5).requests[0] for i in range(3)]
    given = []
    while not all(request.finished for request in long):
        plan = sim.step(10)
        assert tokens_of(plan, short) == 1  # a token every step
        given.append([tokens_of(plan, request) for request in long])
        assert sum(n for n in given[-1] if n > 1) <= 10
    assert given[:5] == [[10, 0, 0]] * 4 + [[1, 10, 0]]  # one after the other
    sim.drain()


def test_prompts_get_everything_where_nobody_reads_along():
    sim = Simulation(100, max_batch_tokens=64)
    sim.submit(prompt(0, 4), 60, streams=False)
    sim.step(10)
    (long,) = sim.submit(prompt(1, 200), 5).requests
    assert tokens_of(sim.step(10), long) == 63
    sim.drain()


def test_a_prompt_waits_for_those_before_it_even_if_it_has_begun():
    sim = Simulation(100, max_batch_size=8)
    sim.submit(prompt(0, 4), 60)
    sim.step()
    (first,) = sim.submit(prompt(1, 40), 5, priority=1).requests
    assert tokens_of(sim.step(10), first) == 10
    (urgent,) = sim.submit(prompt(2, 40), 5).requests
    plan = sim.step(10)
    assert tokens_of(plan, first) == 10  # the urgent one had no room beside it
    sim.scheduler.preempt_running()
    plan = sim.step(10)  # nobody decodes now: what is left of the budget is theirs
    assert tokens_of(plan, urgent) == 40 and tokens_of(plan, first) == 64 - 40 - 7
    sim.drain()


def test_beams_resume_beside_others_with_any_room():
    for room in (1, 2, 3, 5, 9):
        sim = Simulation(100, max_batch_size=8, seed=room)
        sim.submit(prompt(0, 4), 60)
        (beams,) = sim.submit(prompt(1, 10), 30, beams=4).requests
        while len(beams.beams) < 4 or beams.beams[0].num_new_tokens < 5:
            sim.step(room)
        first = sim.scheduler.running.pop()
        assert first is beams
        sim.scheduler._preempt(beams)
        while not beams.finished:
            sim.step(room)
        sim.drain()


def test_prompts_that_share_a_beginning_compute_it_once():
    sim = Simulation(100, max_batch_size=8, max_batch_tokens=64)
    shared = prompt(0, 100)
    requests = [sim.submit([*shared, 10 + i, 3], 3).requests[0] for i in range(5)]
    computed = 0
    while any(request.num_new_tokens == 0 for request in requests):
        computed += sum(s.num_tokens for s in sim.step().sequences if s.num_tokens > 1)
    assert computed == 102 + 4 * (102 - 96)  # 6 full blocks are the same
    assert [request.num_cached_tokens for request in requests] == [0, 96, 96, 96, 96]
    assert sim.scheduler.num_cached_tokens == 4 * 96 and sim.scheduler.num_prompt_tokens == 5 * 102
    sim.drain()


def test_another_prompt_behind_those_that_wait_to_share_waits_as_well():
    sim = Simulation(100, max_batch_size=8, max_batch_tokens=64, prefill_chunk=16)
    first, second = (sim.submit(prompt(0, 60), 3).requests[0] for _ in range(2))
    (other,) = sim.submit(prompt(1, 60), 3).requests
    for _ in range(3):
        assert {s.request for s in sim.step().sequences} == {first}
    assert {s.request for s in sim.step().sequences} == {first, second, other}
    sim.drain()


def test_what_ended_or_was_preempted_leaves_its_blocks_behind():
    sim = Simulation(40)
    (request,) = sim.submit(prompt(0, 40), 30).requests
    for _ in range(12):
        sim.step()
    computed = request.num_computed
    sim.scheduler.preempt_running()
    plan = sim.step()
    assert plan.sequences[0].start == computed // 16 * 16 and request.num_cached_tokens == 0  # it counts what others have left
    sim.abort(request)
    (again,) = sim.submit(request.tokens[:45], 3).requests
    sim.step()
    assert again.num_cached_tokens == 32
    sim.drain()
    assert sim.scheduler.pool.num_cached >= 3 and sim.scheduler.pool.num_free == 40


def test_cached_blocks_are_taken_when_memory_is_wanted_the_oldest_first():
    sim = Simulation(8)
    for first in (0, 1):
        sim.submit(prompt(first, 48), 2)
        sim.drain()
    assert sim.scheduler.pool.num_cached == 6
    sim.submit(prompt(2, 60), 2)  # 4 blocks, 2 of which were never used
    sim.drain()
    left = [len(sim.scheduler.pool.match(prompt(first, 48), 3, None)) for first in (0, 1, 2)]
    assert left == [1, 3, 3]  # of the oldest the last blocks go first
    assert sim.scheduler.pool.num_free == 8


def test_a_hit_in_use_costs_nothing_and_a_free_one_its_block():
    sim = Simulation(5, max_batch_size=4)
    (first,) = sim.submit(prompt(0, 40), 20).requests  # 3 blocks, 4 at last
    sim.step()
    (second,) = sim.submit([*prompt(0, 32), 9], 2).requests  # the same 2, and one more
    sim.step()
    assert sim.scheduler.running == [first, second] and sim.scheduler.pool.num_free == 1
    sim.abort(first)
    sim.abort(second)
    sim.submit(prompt(1, 20), 2)
    sim.step()
    assert sim.scheduler.pool.num_free == 3
    (third,) = sim.submit([*prompt(0, 32), 9, *[1] * 20], 2).requests  # 2 free hits and 2 more: one too many
    sim.step()
    assert sim.scheduler.waiting == [third] or third.scheduled_at is None
    sim.drain()


@pytest.mark.parametrize("num_beams", [1, 4])
def test_salts_keep_apart(num_beams: int):
    sim = Simulation(100)
    for salt, expected in ((None, 0), ("a", 0), (None, 32), ("a", 32), ("b", 0), ("", 0)):
        (request,) = sim.submit(prompt(0, 40), 2, cache_salt=salt, beams=num_beams).requests
        sim.drain()
        assert request.num_cached_tokens == expected, salt
