"""The scheduler alone: random schedules keep every invariant, and everyone finishes."""

from __future__ import annotations

import copy
import random

import pytest

from engine.blocks import BlockPool
from engine.drafters.draft import MAX_DRAFT, Draft
from engine.params import SamplingParams
from engine.plan import StepPlan
from engine.request import Beam, Drawn, Request
from engine.scheduler import Scheduler


def make(prompt_len: int, max_new: int, followers: int = 0) -> Request:
    prompt, params = list(range(prompt_len)), SamplingParams()
    requests = [
        Request(prompt=prompt, params=params, seed=0, stream=i, max_new_tokens=max_new, end_token_ids=frozenset())
        for i in range(1 + followers)
    ]
    requests[0].followers = requests[1:]
    return requests[0]


def make_beams(prompt_len: int, max_new: int, num_beams: int, groups: int = 1) -> Request:
    request = make(prompt_len, max_new)
    request.searches = [None] * groups  # what they would be chosen by
    request.num_beams = num_beams
    request.beams = [Beam(request, group) for group in range(groups)]
    request.restart()
    return request


def choose(scheduler: Scheduler, request: Request, rng: random.Random) -> None:
    """Up to all of its seats go on from random beams."""
    parents = [rng.choice(request.beams) for _ in range(rng.randint(1, request.num_beams))]
    places = [request.beams.index(parent) for parent in parents]
    children = [parent.child(Drawn(rng.randrange(3), 0.0, 0.0), 0.0) for parent in parents]
    for child, table in zip(children, scheduler.pool.permute([b.block_table for b in request.beams], places), strict=True):
        child.block_table = table
    request.beams = children


def offer(scheduler: Scheduler, rng: random.Random) -> None:
    """Drafts of any size, for whom a speculator would have some."""
    for request in scheduler.running:
        request.draft = None
        most = min(MAX_DRAFT, request.max_new_tokens - request.num_new_tokens - 1)
        if not request.searches and not request.followers and request.num_missing == 1 and most > 0 and rng.random() < 0.7:
            size = rng.randint(1, most)
            request.draft = rng.choice([chain(size), Draft((7,) * size, (0,) * size, (0.5,) * size)])


def chain(size: int) -> Draft:
    return Draft.chain([7] * size, [0.5] * size)


def without_drafts(scheduler: Scheduler) -> list[tuple]:
    """What would be planned if nobody had a draft, and who would then be running."""
    twin = copy.deepcopy(scheduler)
    for request in twin.running:
        request.draft = None
    return planned(twin, twin.plan())


def planned(scheduler: Scheduler, plan: StepPlan) -> list[tuple]:
    sequences = [(s.request.num_preemptions, s.start, s.num_tokens, len(s.rows), s.sequence.num_tokens) for s in plan.sequences]
    return [*sequences, tuple(plan.copies), len(scheduler.running), len(scheduler.waiting)]


def run(scheduler: Scheduler, finish_early: float = 0.0, rng: random.Random | None = None, drafts: bool = False) -> StepPlan:
    """One step without a model: every row draws token 7, and any number of a draft's tokens holds."""
    if drafts and rng is not None:
        offer(scheduler, rng)
    expected = without_drafts(scheduler) if drafts and rng is not None and rng.random() < 0.25 else None  # copies are slow
    plan = scheduler.plan()
    if drafts:
        assert expected in (None, planned(scheduler, plan)), "a draft costs somebody a token or a block"
        assert all(request.draft is None for request in (*scheduler.running, *scheduler.waiting))
    scheduler.check()
    total = sum(s.num_tokens + len(s.draft) for s in plan.sequences)
    assert total <= scheduler.max_batch_tokens
    assert all(1 <= s.num_tokens <= scheduler.prefill_chunk for s in plan.sequences)
    scheduler.commit(plan)
    scheduler.check()
    rows = [row.sequence for row in plan.rows]
    for request in {row.request: None for row in rows if isinstance(row, Beam)}:
        assert [row for row in rows if isinstance(row, Beam) and row.request is request] == request.beams, "beams go on together"
        choose(scheduler, request, rng or random.Random(0))
        scheduler.check()
        if request.beams[0].num_new_tokens == request.max_new_tokens:
            request.finish("length", text=None)
            scheduler.remove(request)
    for row in plan.rows:
        request = row.sequence
        if row.node or not isinstance(request, Request):
            continue
        draft = plan.sequences[row.scheduled].draft
        held = rng.randint(0, max(draft.depths())) if rng is not None and draft else 0
        for _ in range(held + 1):
            request.append(Drawn(7, 0.0, 0.0))
        if request.num_new_tokens == request.max_new_tokens or (rng is not None and rng.random() < finish_early):
            request.finish("length", text=None)
            scheduler.remove(request)
        elif draft:
            computed = request.num_computed
            scheduler.accept(request, held)
            assert request.num_computed == computed + held and request.num_missing == 1
            assert len(request.block_table) == scheduler.pool.blocks_for(request.num_computed)
        scheduler.check()
    return plan


def scheduler_of(num_blocks: int, max_batch_size: int = 8, max_batch_tokens: int = 64, prefill_chunk: int = 64) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, 16), max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens, prefill_chunk=prefill_chunk
    )


def test_budgets_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="max_batch_tokens is 4; it must be at least max_batch_size, which is 8"):
        scheduler_of(4, max_batch_tokens=4)
    with pytest.raises(ValueError, match="prefill_chunk is 0"):
        scheduler_of(4, prefill_chunk=0)
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        scheduler_of(4, max_batch_size=0)


def test_a_request_that_can_never_fit_is_named_with_its_sizes():
    scheduler = scheduler_of(4)
    assert scheduler.admissible(60, 5) is None  # 64 tokens are written; the last one drawn never is
    reason = scheduler.admissible(60, 6)
    assert reason is not None and "needs 5 cache blocks of 16 tokens" in reason and "has 4" in reason


def test_a_long_prompt_does_not_stop_the_others():
    scheduler = scheduler_of(100, max_batch_tokens=32)
    short, long = make(4, 50), make(300, 5)
    scheduler.add(short)
    run(scheduler)
    scheduler.add(long)
    for _ in range(9):
        plan = run(scheduler)
        assert short in [row.sequence for row in plan.rows]  # a token every step while the long prompt is computed in chunks
        assert [s.num_tokens for s in plan.sequences] == [1, 31]


def test_the_youngest_is_preempted_and_resumes():
    scheduler = scheduler_of(4)
    first, second = make(30, 30), make(30, 30)
    for request in (first, second):
        scheduler.add(request)
    while not first.finished:
        run(scheduler)
    assert first.num_preemptions == 0 and second.num_preemptions > 0
    while scheduler.has_work:
        run(scheduler)
    assert second.finished and second.num_new_tokens == 30
    assert scheduler.pool.num_free == 4


def test_followers_share_the_prompt_and_copy_only_the_last_block():
    scheduler = scheduler_of(10)
    leader = make(40, 4, followers=3)
    scheduler.add(leader)
    plan = run(scheduler)
    assert len(plan.rows) == 4
    assert scheduler.pool.num_free == 10 - 3  # one copy of the prompt for all four
    plan = run(scheduler)
    assert len(plan.copies) == 3  # the last to write owns the original
    assert scheduler.pool.num_free == 10 - 2 - 4


def test_beams_compute_the_prompt_once_and_resume_together():
    scheduler = scheduler_of(14, max_batch_tokens=32)
    rng = random.Random(1)
    first, beams = make(100, 30), make_beams(40, 30, num_beams=4)
    scheduler.add(first)
    scheduler.add(beams)
    assert scheduler.admissible(40, 30, 4) is None and scheduler.admissible(40, 60, 4) is not None
    common, recomputed = 0, 0
    while scheduler.has_work:
        before = beams.num_preemptions
        plan = run(scheduler, rng=rng)
        if beams.num_preemptions > before:
            common, recomputed = beams.shared, 0
            wanted = common + sum(len(b.tokens) - common for b in beams.beams)
        if common and recomputed < wanted:
            recomputed += sum(s.num_tokens for s in plan.sequences if s.request is beams)
            assert recomputed <= wanted, "what beams share is computed once"
    assert first.finished and beams.finished and first.num_preemptions == 0
    assert beams.num_preemptions > 0 and common >= 40 and recomputed == wanted


def test_a_group_takes_all_its_seats():
    scheduler = scheduler_of(100, max_batch_size=8)
    for request in (make_beams(3, 5, 6), make(3, 5), make_beams(3, 5, 4), make(3, 5)):
        scheduler.add(request)
    plan = run(scheduler)
    assert len(scheduler.running) == 2 and len(plan.rows) == 2  # 6 + 1 seats; 4 more do not fit, and nobody overtakes
    while scheduler.has_work:
        run(scheduler)


def test_a_leader_removed_early_passes_its_followers_on():
    scheduler = scheduler_of(10)
    leader = make(40, 2, followers=2)
    followers = list(leader.followers)
    scheduler.add(leader)
    scheduler.remove(leader)
    scheduler.check()
    while scheduler.has_work:
        run(scheduler)
    assert all(f.finished for f in followers) and not leader.finished


def drafting(num_blocks: int, lengths: list[int], sizes: list[int], **options: int) -> tuple[Scheduler, list[Request]]:
    """Requests of these lengths that only lack their last token, and have drafts of these sizes."""
    scheduler = scheduler_of(num_blocks, **options)
    requests = [make(length - 1, 100) for length in lengths]
    for request in requests:
        scheduler.add(request)
    while any(not request.num_new_tokens for request in requests):
        run(scheduler)
    for request, size in zip(requests, sizes, strict=True):
        request.draft = chain(size)
    return scheduler, requests


def placed(scheduler: Scheduler) -> list[int]:
    plan = scheduler.plan()
    scheduler.check()
    assert all(len(s.sequence.block_table) == scheduler.pool.blocks_for(s.end + len(s.draft)) for s in plan.sequences)
    assert len(plan.rows) == sum(len(s.rows) + len(s.draft) for s in plan.sequences)
    return [len(s.draft) for s in plan.sequences]


def test_drafts_get_what_is_left_of_the_budget_the_oldest_first():
    scheduler, _ = drafting(100, [10, 10, 10], [5, 20, 9], max_batch_size=3, max_batch_tokens=20)
    assert placed(scheduler) == [5, 12, 0]


def test_drafts_get_what_is_left_of_the_pool():
    # 4 blocks of 16: after the last tokens one is free, of which the first request takes all.
    scheduler, _ = drafting(4, [30, 10], [63, 63], max_batch_tokens=500)
    assert placed(scheduler) == [18, 6]
    scheduler, _ = drafting(2, [16, 16], [63, 1])
    assert placed(scheduler) == [0, 0]
    assert scheduler.pool.num_free == 0


def test_a_draft_preempts_nobody_and_goes_with_its_request():
    scheduler, (first, second) = drafting(2, [16, 16], [63, 63])
    first.append(Drawn(7, 0.0, 0.0))  # it now needs a second block, which is the other's
    plan = scheduler.plan()
    assert [s.request for s in plan.sequences] == [first] and not plan.sequences[0].rows[1:]
    assert second.num_preemptions == 1 and second.draft is None and scheduler.waiting[0] is second
    assert len(plan.sequences[0].draft) == 15  # the rest of its block: the waiting one does not fit anyway


def test_a_draft_whose_request_lacks_more_than_its_last_token_is_dropped():
    scheduler = scheduler_of(20, prefill_chunk=8)
    request = make(30, 5)
    scheduler.add(request)
    run(scheduler)
    request.draft = chain(4)
    assert placed(scheduler) == [0] and request.draft is None


def test_what_holds_of_a_draft_stays_and_the_blocks_of_the_rest_are_free():
    for held in range(0, 41):
        scheduler, (request,) = drafting(20, [10], [40])
        plan = scheduler.plan()
        assert scheduler.pool.num_free == 16 and plan.sequences[0].end == 10
        scheduler.commit(plan)
        assert request.num_computed == 10 and request.peak_blocks == 4
        for _ in range(held + 1):
            request.append(Drawn(7, 0.0, 0.0))
        scheduler.accept(request, held)
        scheduler.check()
        assert request.num_computed == 10 + held and request.num_missing == 1
        assert scheduler.pool.num_free == 20 - scheduler.pool.blocks_for(10 + held)


def test_a_row_for_each_node_and_beams_last():
    scheduler, (first, second) = drafting(40, [10, 12], [2, 0])
    first.draft = Draft((1, 2), (0, 0), (0.5, 0.5))
    second.draft = None
    beams = make_beams(5, 9, 3)
    scheduler.add(beams)
    rows = scheduler.plan().rows
    assert [(row.sequence, row.scheduled, row.node) for row in rows[:4]] == [(first, 0, 0), (first, 0, 1), (first, 0, 2), (second, 1, 0)]
    assert [row.sequence for row in rows[4:]] == beams.beams


@pytest.mark.parametrize("hundred", range(10))
def test_random_schedules_end_with_every_block_free(hundred: int):
    """A thousand schedules of admit, append, fork, draft, truncate, preempt, abort and finish."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        random_schedule(random.Random(seed))


def random_schedule(rng: random.Random) -> None:
    num_blocks = rng.choice([3, 6, 20])
    size = rng.choice([1, 3, 8])
    scheduler = scheduler_of(num_blocks, size, max_batch_tokens=rng.choice([8, 24, 64]), prefill_chunk=rng.choice([1, 5, 64]))
    everyone: list[Request] = []
    for _ in range(40):
        action = rng.random()
        if action < 0.35:
            request = make(rng.randint(1, 40), rng.randint(1, 12), followers=rng.choice([0, 0, 0, min(2, size - 1)]))
            if size > 1 and rng.random() < 0.4:
                groups = rng.choice([1, 1, min(2, size // 2) or 1])
                request = make_beams(rng.randint(1, 40), rng.randint(1, 12), rng.randint(max(2, groups), size), groups)
            if scheduler.admissible(len(request.prompt), request.max_new_tokens, request.num_beams) is None:
                scheduler.add(request)
                everyone += [request, *request.followers]
        elif action < 0.45 and everyone:
            victim = rng.choice(everyone)  # an abort, at any moment of its life
            if not victim.finished:
                victim.finish("abort", text=None)
                scheduler.remove(victim)
        elif action < 0.5:
            scheduler.preempt_running()
        elif action < 0.6 and scheduler.running:
            request = rng.choice(scheduler.running)
            if request.searches:
                continue
            keep = rng.randint(0, request.num_computed)
            scheduler.pool.truncate(request.block_table, keep)
            request.num_computed = keep
        else:
            run(scheduler, finish_early=0.1, rng=rng, drafts=True)
        scheduler.check()
    for _ in range(2000):
        if not scheduler.has_work:
            break
        run(scheduler)
    assert all(r.finished for r in everyone)
    assert scheduler.pool.num_free == num_blocks
    scheduler.pool.check([])
