"""Who computes how many tokens in the next step: budgets in, plan out. No tensors.

Requests are served in the order they came. A running request keeps its blocks until it finishes or is preempted; when the pool runs dry the
youngest running request is preempted (its blocks freed, its tokens recomputed later), so the oldest always makes progress.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .blocks import BlockPool
from .request import Request


@dataclass(frozen=True)
class ScheduledSequence:
    """``num_tokens`` query tokens of ``request`` from ``start`` on; each of ``rows`` draws a token from the last one's logits."""

    request: Request
    start: int
    num_tokens: int
    rows: tuple[Request, ...]


@dataclass
class StepPlan:
    sequences: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # block copies to carry out first (copy-on-write)

    @property
    def rows(self) -> list[Request]:
        """The requests that draw a token in this step, in the order of the rows of logits."""
        return [request for sequence in self.sequences for request in sequence.rows]


class Scheduler:
    """Plans steps over a block pool.

    Args:
        pool: the blocks of the cache.
        max_batch_size: most sequences running at once.
        max_batch_tokens: most query tokens in one step (at least ``max_batch_size``, so that every running sequence can advance).
        prefill_chunk: most query tokens of one sequence in one step.
    """

    def __init__(self, pool: BlockPool, *, max_batch_size: int, max_batch_tokens: int, prefill_chunk: int) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if max_batch_tokens < max_batch_size:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least max_batch_size, which is {max_batch_size}")
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def admissible(self, num_prompt_tokens: int, max_new_tokens: int) -> str | None:
        """None if such a request can ever run here, else one sentence saying why not."""
        # The last token drawn is never written to the cache.
        needed = self.pool.blocks_for(num_prompt_tokens + max_new_tokens - 1)
        if needed > self.pool.num_blocks:
            return (
                f"prompt of {num_prompt_tokens} tokens + max_new_tokens {max_new_tokens} needs {needed} cache blocks of "
                f"{self.pool.block_size} tokens; the whole cache has {self.pool.num_blocks}"
            )
        return None

    def add(self, request: Request) -> None:
        """Queue a request with its followers, ``max_batch_size`` in all at most. The caller has asked ``admissible``."""
        assert 1 + len(request.followers) <= self.max_batch_size
        self.waiting.append(request)

    def plan(self) -> StepPlan:
        plan = StepPlan()
        budget = self.max_batch_tokens
        position = 0
        while position < len(self.running):
            request = self.running[position]
            behind = len(self.running) - position - 1  # each of these is owed one token of the budget
            num_tokens = min(request.num_missing, self.prefill_chunk, budget - behind)
            if not self._make_room(request, num_tokens):
                break  # request was the youngest and has been preempted itself; nobody is behind it
            self._schedule(plan, request, num_tokens)
            budget -= num_tokens
            position += 1
        while self.waiting and budget > 0:
            request = self.waiting[0]
            if self._seats() + 1 + len(request.followers) > self.max_batch_size:
                break
            num_tokens = min(request.num_missing, self.prefill_chunk, budget)
            # Admitted only if everything it has fits now: a prompt admitted by halves would be the first to be preempted.
            if self.pool.blocks_for(len(request.tokens)) > self.pool.num_free:
                break
            self.running.append(self.waiting.popleft())
            self._schedule(plan, request, num_tokens)
            budget -= num_tokens
        return plan

    def _seats(self) -> int:
        """Places in the batch that are taken, those of followers about to join included."""
        return sum(1 + len(request.followers) for request in self.running)

    def _schedule(self, plan: StepPlan, request: Request, num_tokens: int) -> None:
        assert num_tokens >= 1, "a sequence is scheduled without a token to compute"
        start = request.num_computed
        plan.copies += self.pool.prepare(request.block_table, start, start + num_tokens)
        complete = num_tokens == request.num_missing
        rows = (request, *request.followers) if complete else ()
        plan.sequences.append(ScheduledSequence(request, start, num_tokens, rows))

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempt the youngest until ``request`` can write ``num_tokens`` more; False if it had to be preempted itself."""
        start = request.num_computed
        while self.pool.new_blocks(request.block_table, start, start + num_tokens) > self.pool.num_free:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.num_computed = 0
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def commit(self, plan: StepPlan) -> None:
        """Record that a plan has been run: its tokens are in the cache, and followers have joined."""
        for sequence in plan.sequences:
            request = sequence.request
            request.num_computed = sequence.start + sequence.num_tokens
            if sequence.rows and request.followers:
                for follower in request.followers:
                    follower.block_table = self.pool.fork(request.block_table)
                    follower.num_computed = request.num_computed
                at = self.running.index(request) + 1
                self.running[at:at] = request.followers
                request.followers = []

    def preempt_running(self) -> int:
        """Preempt every running request (they resume by recomputation); returns how many there were."""
        count = len(self.running)
        while self.running:
            self._preempt(self.running.pop())
        return count

    def remove(self, request: Request) -> None:
        """Take a finished or aborted request out and free its blocks. A leader removed early passes its followers on."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            for leader in (*self.running, *self.waiting):
                if request in leader.followers:
                    leader.followers.remove(request)
        self.pool.release(request.block_table)
        if request.followers:
            heir, *request.followers[:] = request.followers
            heir.followers, request.followers = request.followers, []
            self.waiting.appendleft(heir)

    def check(self) -> None:
        """Assert the invariants of queues and pool; for tests, after any step."""
        requests = (*self.running, *self.waiting)
        assert len({id(r) for r in requests}) == len(requests), "a request is queued twice"
        assert all(not r.block_table and r.num_computed == 0 for r in self.waiting), "a waiting request holds blocks"
        assert self._seats() <= self.max_batch_size, "more sequences run than the batch holds"
        for r in self.running:
            assert r.num_computed <= len(r.tokens) and len(r.block_table) >= self.pool.blocks_for(r.num_computed)
        self.pool.check(r.block_table for r in requests)
