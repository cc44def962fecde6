"""The step's tensors: right for any schedule, and the same ones as long as the sizes stay."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch

from engine.blocks import BlockPool
from engine.columns import tensor_of
from engine.drafters.draft import Draft
from engine.models.batch import StepBatch
from engine.params import SamplingParams
from engine.plan import StepPlan
from engine.request import Drawn, Request
from engine.runner import Runner
from engine.scheduler import Scheduler


def request_of(length: int, followers: int = 0) -> Request:
    prompt = [random.Random(length).randrange(1000) for _ in range(length)]
    requests = [
        Request(prompt, SamplingParams(), seed=0, stream=i, max_new_tokens=99, end_token_ids=frozenset()) for i in range(1 + followers)
    ]
    requests[0].followers = requests[1:]
    return requests[0]


def scheduler_of(*requests: Request, max_batch_tokens: int = 64) -> Scheduler:
    scheduler = Scheduler(BlockPool(100, 16), max_batch_size=8, max_batch_tokens=max_batch_tokens, prefill_chunk=max_batch_tokens)
    for request in requests:
        scheduler.add(request)
    return scheduler


def runner_of() -> Runner:
    return Runner(SimpleNamespace(device=None), SimpleNamespace(), 16)  # type: ignore[arg-type]  # neither is asked for anything


def check(plan: StepPlan, batch: StepBatch) -> None:
    """The batch holds what the plan says, each number by its definition."""
    at = 0
    for s, scheduled in enumerate(plan.sequences):
        sequence, draft = scheduled.sequence, scheduled.draft
        tokens = [*sequence.tokens[scheduled.start : scheduled.end], *draft.tokens]
        places = [*range(scheduled.start, scheduled.end), *(scheduled.end - 1 + d for d in draft.depths()[1:])]
        slots = [sequence.block_table[i // 16] * 16 + i % 16 for i in range(scheduled.start, scheduled.start + len(tokens))]
        assert batch.query_start[s : s + 2].tolist() == [at, at + len(tokens)]
        assert batch.tokens[at : at + len(tokens)].tolist() == tokens
        assert batch.positions[at : at + len(tokens)].tolist() == places
        assert batch.slots[at : at + len(tokens)].tolist() == slots
        assert batch.context_len[s] == scheduled.start + len(tokens)
        assert batch.block_table[s, : len(sequence.block_table)].tolist() == list(sequence.block_table)
        at += len(tokens)
    rows = [int(batch.query_start[r.scheduled]) + plan.sequences[r.scheduled].num_tokens - 1 + r.node for r in plan.rows]
    assert batch.logit_rows.tolist() == rows
    assert len(batch.tokens) == len(batch.positions) == len(batch.slots) == at
    assert (batch.tree_start is not None) == any(not scheduled.draft.is_chain for scheduled in plan.sequences)


def test_steps_of_decoding_are_one_batch_whose_numbers_move_on():
    requests = [request_of(15), request_of(30)]
    scheduler, runner = scheduler_of(*requests), runner_of()
    batches = []
    for token in range(40):  # over the edges of blocks
        plan = scheduler.plan()
        batch = runner._prepare(plan)
        check(plan, batch)
        batches.append(batch)
        scheduler.commit(plan)
        for request in requests:
            request.append(Drawn(token, 0.0, 0.0))
    assert batches[0] is not batches[1]
    assert all(batch is batches[1] for batch in batches[1:])


def test_a_step_of_other_sizes_leaves_the_tensors_of_the_one_before_alone():
    first, second = request_of(5), request_of(7)
    scheduler, runner = scheduler_of(first), runner_of()
    plan = scheduler.plan()
    before = runner._prepare(plan)
    kept = before.tokens.clone()
    scheduler.commit(plan)
    first.append(Drawn(1, 0.0, 0.0))
    scheduler.add(second)
    plan = scheduler.plan()
    after = runner._prepare(plan)
    check(plan, after)
    assert after is not before and torch.equal(before.tokens, kept)


def test_followers_share_a_row():
    scheduler, runner = scheduler_of(request_of(4, followers=2)), runner_of()
    plan = scheduler.plan()
    batch = runner._prepare(plan)
    check(plan, batch)
    assert batch.logit_rows.tolist() == [3, 3, 3]


def test_a_step_with_a_tree_has_tensors_of_its_own():
    request = request_of(4)
    scheduler, runner = scheduler_of(request), runner_of()
    trees = [Draft((token, token + 1), (0, 0), (0.5, 0.5)) for token in (5, 7)]
    batches = []
    for draft in (None, *trees, Draft.chain([7, 8], [0.5, 0.5])):
        request.draft = draft
        plan = scheduler.plan()
        batch = runner._prepare(plan)
        check(plan, batch)
        assert all(batch is not other for other in batches)
        batches.append(batch)
        scheduler.commit(plan)
        request.append(Drawn(1, 0.0, 0.0))
        scheduler.accept(request, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules(seed: int):
    rng = random.Random(seed)
    scheduler, runner = scheduler_of(max_batch_tokens=40), runner_of()
    for _ in range(60):
        if len(scheduler.running) + len(scheduler.waiting) < 5 and rng.random() < 0.5:
            scheduler.add(request_of(rng.randint(1, 90)))
        for request in scheduler.running:
            if request.num_missing == 1 and rng.random() < 0.3:
                request.draft = Draft.chain([3] * rng.randint(1, 5), [0.5] * 5)
        plan = scheduler.plan()
        if not plan.sequences:
            continue
        check(plan, runner._prepare(plan))
        scheduler.commit(plan)
        for row in plan.rows:
            if not row.node:
                row.sequence.append(Drawn(rng.randrange(1000), 0.0, 0.0))  # type: ignore[attr-defined]
                if plan.sequences[row.scheduled].draft:
                    scheduler.accept(row.sequence, 0)  # type: ignore[arg-type]
                if rng.random() < 0.05:
                    scheduler.remove(row.sequence)  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "dtype"), [("i", torch.int32), ("q", torch.int64), ("f", torch.float32)])
def test_a_column_is_an_array_and_a_tensor(code: str, dtype: torch.dtype):
    column = array(code, [1, 2, 3])
    tensor = tensor_of(column)
    column[1] = 7
    tensor[2] = 9
    assert tensor.dtype == dtype and tensor.tolist() == [1, 7, 9] and list(column) == [1, 7, 9]
    assert tensor_of(array(code)).shape == (0,) and tensor_of(array(code)).dtype == dtype
