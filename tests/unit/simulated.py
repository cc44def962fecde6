"""Scheduler and pool with a simulated model, cache and clock: what a sequence's blocks hold is compared with what it should have computed,
and each token follows from that content alone."""

from __future__ import annotations

import itertools
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

from engine.blocks import BlockPool
from engine.drafters.draft import Draft
from engine.outputs import RequestOutput
from engine.params import SamplingParams
from engine.request import Beam, Drawn, Request, Submission, TokenSequence
from engine.scheduler import Scheduler, StepPlan

VOCABULARY = 3


def states(tokens: Iterable[int], salt: str | None) -> list[int]:
    """What the simulated cache holds of tokens: of each a number that follows from it, all before it, and the salt."""
    start = zlib.crc32(repr(salt).encode())
    return list(itertools.accumulate(tokens, lambda state, token: zlib.crc32(bytes([token]), state), initial=start))[1:]


def next_token(state: int, stream: int) -> int:
    """What the simulated model gives after a token of such a state."""
    return zlib.crc32(state.to_bytes(4, "little"), stream) % VOCABULARY


def alone(prompt: Sequence[int], num_new_tokens: int, stream: int = 0, salt: str | None = None) -> list[int]:
    """The new tokens of a request by itself."""
    tokens, new = bytes(prompt), b""
    state = states(tokens, salt)[-1]
    while len(new) < num_new_tokens:
        new += bytes([next_token(state, stream)])
        state = zlib.crc32(new[-1:], state)
    return list(new)


class Simulation:
    """Takes requests through steps as the loop does, on a clock that stands still but for ``now += ...``.

    Args:
        seed: of the choices of beams, drafts and their sizes.
        drafts: how often a request that could have a draft has one.
        options: of the scheduler.
    """

    def __init__(self, num_blocks: int, seed: int = 0, drafts: float = 0.0, **options) -> None:
        defaults = {"max_batch_size": 4, "max_batch_tokens": 64, "prefill_chunk": 64, "prefix_cache": True}
        self.now, self.drafts = 0.0, drafts
        self.scheduler = Scheduler(BlockPool(num_blocks, 16), clock=lambda: self.now, **{**defaults, **options})
        self.memory: list[list[int | None]] = [[None] * 16 for _ in range(num_blocks)]
        self.rng = random.Random(seed)
        self.submissions: list[Submission] = []
        self.ends: Counter[Request] = Counter()
        self.num_steps = 0

    @property
    def unfinished(self) -> list[Request]:
        return [request for submission in self.submissions for request in submission.requests if not request.finished]

    def submit(
        self, prompt: Sequence[int], num_new_tokens: int, *, samples: int = 1, beams: int = 1, groups: int = 1, **terms
    ) -> Submission:
        """``terms``: priority, timeout, cache_salt, streams."""
        streams = terms.pop("streams", True)
        requests = [
            Request(
                prompt=list(prompt), params=SamplingParams(), seed=0, stream=i, max_new_tokens=num_new_tokens, end_token_ids=frozenset(),
                clock=self.scheduler.clock, submitted_at=self.now, **terms,
            )
            for i in range(samples)
        ]  # fmt: skip
        leader = requests[0]
        leader.followers = requests[1:]
        if beams > 1:
            leader.searches = [None] * groups
            leader.num_beams = beams
            leader.beams = [Beam(leader, group) for group in range(groups)]
            leader.restart()
        assert self.scheduler.admissible(len(leader.prompt), num_new_tokens, beams) is None
        self.scheduler.add(leader)
        submission = Submission(requests, streams)
        self.submissions.append(submission)
        return submission

    def end(self, request: Request, reason: str) -> RequestOutput:
        assert not request.finished
        self.ends[request] += 1
        output = request.finish(reason, text=None)
        self.scheduler.remove(request)
        return output

    def abort(self, request: Request) -> None:
        if not request.finished:
            self.end(request, "abort")
        self.check()

    def step(self, prompt_tokens: int | None = None, fails: str | None = None) -> StepPlan:
        """A step; ``fails``: "error", it fails with all that are in it, or "interrupt", it is interrupted when half done."""
        scheduler = self.scheduler
        for request in scheduler.expired():
            assert request.deadline is not None and request.deadline <= self.now
            self.end(request, "abort")
        assert not any(request.deadline is not None and request.deadline <= self.now for request in self.unfinished)
        self._offer_drafts()
        plan = scheduler.plan(prompt_tokens)
        scheduler.check()
        self._check_plan(plan, prompt_tokens)
        self.num_steps += bool(plan.sequences)
        if fails:
            self._write(plan, spoilt=True)
            if fails == "interrupt":
                scheduler.preempt_running()
            else:
                rows = [row for s in plan.sequences for row in s.rows if isinstance(row, Request)]
                for request in dict.fromkeys([*(s.request for s in plan.sequences), *rows]):
                    self.end(request, "error")
            self.check()
            return plan
        self._write(plan)
        scheduler.commit(plan)
        scheduler.check()
        beam_rows = [row.sequence for row in plan.rows if isinstance(row.sequence, Beam)]
        for request in dict.fromkeys(beam.request for beam in beam_rows):
            assert [beam for beam in beam_rows if beam.request is request] == request.beams, "beams go on together"
            self._choose(request)
        for row in plan.rows:
            if not row.node and isinstance(row.sequence, Request):
                self._advance(row.sequence, plan.sequences[row.scheduled].draft)
        self.check()
        return plan

    def _offer_drafts(self) -> None:
        for request in self.scheduler.running:
            request.draft = None
            most = request.max_new_tokens - request.num_new_tokens - 1
            if not request.searches and not request.followers and request.num_missing == 1 and most > 0 and self.rng.random() < self.drafts:
                right = alone(request.tokens, self.rng.randint(1, min(most, 20)), request.stream, request.cache_salt)
                if self.rng.random() < 0.5:
                    right[self.rng.randrange(len(right))] += 1  # wrong from there on
                request.draft = Draft.chain([token % VOCABULARY for token in right], [0.5] * len(right))

    def _check_plan(self, plan: StepPlan, prompt_tokens: int | None) -> None:
        scheduler = self.scheduler
        assert plan.sequences or not scheduler.has_work, "requests wait, yet none can be scheduled"
        assert sum(s.num_tokens + len(s.draft) for s in plan.sequences) <= scheduler.max_batch_tokens
        assert all(1 <= s.num_tokens <= scheduler.prefill_chunk for s in plan.sequences)
        decoding = {s.request for s in plan.sequences if s.request.decodes}
        assert decoding >= {request for request in scheduler.running if request.decodes}, "a sequence that decodes is left out of a step"
        if prompt_tokens is not None and any(
            request.streams and request.scheduled_at is not None for request in decoding - self._new(plan)
        ):
            assert sum(s.num_tokens for s in plan.sequences if s.request not in decoding) <= prompt_tokens

    def _new(self, plan: StepPlan) -> set[Request]:
        """Those of a plan who have nothing of their own in the cache yet: they did not decode before."""
        return {s.request for s in plan.sequences if s.request.num_new_tokens == 0 or s.request.num_preemptions}

    def _write(self, plan: StepPlan, spoilt: bool = False) -> None:
        """What the model does to the cache; ``spoilt``: only some of it, and some of that wrong."""
        for source, destination in plan.copies:
            self.memory[destination] = list(self.memory[source])
        for scheduled in plan.sequences:
            tokens = [*scheduled.sequence.tokens[: scheduled.end], *scheduled.draft.tokens]
            for i, state in list(enumerate(states(tokens, scheduled.request.cache_salt)))[scheduled.start :]:
                if not spoilt or self.rng.random() < 0.7:
                    self.memory[scheduled.sequence.block_table[i // 16]][i % 16] = 77 if spoilt and self.rng.random() < 0.3 else state

    def content(self, sequence: TokenSequence) -> list[int | None]:
        """What the cache holds of a sequence."""
        return [self.memory[sequence.block_table[i // 16]][i % 16] for i in range(sequence.num_computed)]

    def _choose(self, request: Request) -> None:
        """Up to all of its seats go on from random beams."""
        if request.beams[0].num_new_tokens + 1 == request.max_new_tokens:
            self.end(request, "length")
            return
        parents = [self.rng.choice(request.beams) for _ in range(self.rng.randint(1, request.num_beams))]
        places = [request.beams.index(parent) for parent in parents]
        children = [parent.child(Drawn(self.rng.randrange(VOCABULARY), 0.0, 0.0), 0.0) for parent in parents]
        tables = self.scheduler.pool.permute([beam.block_table for beam in request.beams], places)
        for child, table in zip(children, tables, strict=True):
            child.block_table = table
        request.beams = children

    def _advance(self, request: Request, draft: Draft) -> None:
        slots = range(request.num_computed - 1, request.num_computed + len(draft))
        after = [next_token(self.memory[request.block_table[i // 16]][i % 16], request.stream) for i in slots]
        held = next((i for i, token in enumerate(draft.tokens) if token != after[i]), len(draft))
        drawn = after[: held + 1]
        for token in drawn:
            request.append(Drawn(token, 0.0, 0.0))
            if request.num_new_tokens == request.max_new_tokens:
                self.end(request, "length")
                return
        if draft:
            self.scheduler.accept(request, len(drawn) - 1)

    def check(self) -> None:
        """Every invariant: of scheduler and pool, and that each running sequence's blocks hold what it has computed."""
        self.scheduler.check()
        for request in self.scheduler.running:
            for sequence in request.sequences:
                expected = states(sequence.tokens[: sequence.num_computed], request.cache_salt)
                assert self.content(sequence) == expected, "the cache holds something else of a sequence"

    def drain(self, most: int = 10_000) -> None:
        """Step until all have ended, and check what became of everybody."""
        for _ in range(most):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "somebody never ends"
        requests = [request for submission in self.submissions for request in submission.requests]
        assert all(self.ends[request] == 1 for request in requests), "a request ends other than once"
        for request in requests:
            if not request.searches:
                found = request.tokens[len(request.prompt) :]
                assert found == alone(request.prompt, len(found), request.stream, request.cache_salt), (
                    "a request gets other tokens than alone"
                )
        pool = self.scheduler.pool
        assert pool.num_free == pool.num_blocks and not self.scheduler._timed
        pool.check([])
