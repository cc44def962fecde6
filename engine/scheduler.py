"""Who computes how many tokens in the next step: budgets in, plan out. No tensors.

Requests are served in the order they came, where one of priority p counts as one that came ``p * PRIORITY_SECONDS`` later. A running
request keeps its blocks until it finishes or is preempted; when the pool runs dry the last in order of the running is preempted (its blocks
freed, its tokens recomputed later) and waits at its place in the order, so the first always makes progress. Nobody overtakes a request that
waits because it does not fit yet; it fits at the latest when all others have ended. A beam search is one request with several sequences:
they are computed, preempted and resumed together, and what they have in common is computed once.
"""

from __future__ import annotations

import bisect
import math
import operator
import time
from collections.abc import Callable

from .blocks import BlockPool, BlockTable, Key, Write
from .plan import ScheduledSequence, StepPlan
from .request import Request, TokenSequence

PRIORITY_SECONDS = 60.0  # of waiting that one step of priority is worth: whoever comes later than that does not go first

_order = operator.attrgetter("order")


class Scheduler:
    """Plans steps over a block pool.

    Args:
        pool: the blocks of the cache.
        max_batch_size: most sequences running at once.
        max_batch_tokens: most query tokens in one step (at least ``max_batch_size``, so that every running sequence can advance).
        prefill_chunk: most query tokens of one sequence in one step.
        prefix_cache: whether requests begin with the cached blocks that their tokens begin with.
        clock: seconds, for timeouts and times of requests.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        prefill_chunk: int,
        prefix_cache: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if max_batch_tokens < max_batch_size:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least max_batch_size, which is {max_batch_size}")
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.prefill_chunk = prefill_chunk
        self.prefix_cache = prefix_cache
        self.clock = clock
        self.waiting: list[Request] = []  # both in the order of requests
        self.running: list[Request] = []
        self._num_added = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of all requests scheduled so far; of these were cached:
        self.num_cached_tokens = 0
        self._timed: dict[Request, float] = {}  # deadlines
        self._earliest = math.inf  # none of them is before
        self.on_preemption: Callable[[Request], None] | None = None  # told of each request that is preempted

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, followers of those that run or wait included."""
        return sum(1 + len(request.followers) for request in tuple(self.waiting)) + sum(len(r.followers) for r in tuple(self.running))

    def admissible(self, num_prompt_tokens: int, max_new_tokens: int, num_beams: int = 1) -> str | None:
        """None if such a request can ever run here, else one sentence saying why not."""
        if num_beams > self.max_batch_size:
            return f"num_beams is {num_beams}; max_batch_size allows {self.max_batch_size} sequences at once"
        # The last token drawn is never written to the cache. Beams share the full blocks of the prompt at least.
        shared = num_prompt_tokens // self.pool.block_size
        needed = shared + num_beams * (self.pool.blocks_for(num_prompt_tokens + max_new_tokens - 1) - shared)
        if needed > self.pool.num_blocks:
            beams = f", num_beams {num_beams}," if num_beams > 1 else ""
            return (
                f"prompt of {num_prompt_tokens} tokens + max_new_tokens {max_new_tokens}{beams} needs {needed} cache blocks of "
                f"{self.pool.block_size} tokens; the whole cache has {self.pool.num_blocks}"
            )
        return None

    def add(self, request: Request) -> None:
        """Queue a request with its followers, ``max_batch_size`` in all at most. The caller has asked ``admissible``."""
        assert request.seats + len(request.followers) <= self.max_batch_size
        for one in (request, *request.followers):
            self._num_added += 1
            one.order = one.submitted_at + one.priority * PRIORITY_SECONDS, self._num_added
            if one.deadline is not None:
                self._timed[one] = one.deadline
                self._earliest = min(self._earliest, one.deadline)
        bisect.insort(self.waiting, request, key=_order)

    def expired(self) -> list[Request]:
        """Those whose timeout has passed; the caller ends them."""
        now = self.clock()
        if now < self._earliest:
            return []
        self._earliest = min((deadline for deadline in self._timed.values() if deadline > now), default=math.inf)
        return [request for request, deadline in self._timed.items() if deadline <= now]

    def plan(self, prompt_tokens: int | None = None) -> StepPlan:
        """The next step. If it decodes any request whose tokens are streamed, it has at most ``prompt_tokens`` tokens of those that lack
        more than their last one."""
        plan = StepPlan()
        budget = self.max_batch_tokens
        room = None  # for tokens of prompts; looked at when there are any
        seen, owed = 0, 0  # of the running; one token of the budget to each sequence that is yet to get its share
        position = 0
        while position < len(self.running):
            request = self.running[position]
            if seen != len(self.running):  # at first, and after a preemption
                seen, owed = len(self.running), sum(behind.num_sequences for behind in self.running[position:])
            owed -= request.num_sequences
            if not request.searches and not request.num_missing:
                position += 1
                continue  # its last token is on its way
            limit = budget - owed
            decodes = request.decodes
            if not decodes:
                if room is None:
                    room = self._prompt_room(prompt_tokens)
                limit = min(limit, room)
                if not limit:
                    position += 1
                    continue  # its turn comes when the prompts before it are done
            shares = self._shares(request, limit)
            writes = self._writes(shares)
            if writes and not self._make_room(request, writes):
                break  # request was the last and has been preempted itself; nobody is behind it
            num_tokens = self._schedule(plan, request, shares, writes)
            budget -= num_tokens
            if room is not None and not decodes:
                room -= num_tokens
            position += 1
        if self.waiting:
            budget = self._admit(plan, budget, self._prompt_room(prompt_tokens) if room is None else room)
        self._place_drafts(plan, budget)
        plan.add_rows()
        return plan

    def _prompt_room(self, prompt_tokens: int | None) -> int:
        """How many tokens of prompts a step may have: all that fit, unless somebody waits for their next token."""
        if prompt_tokens is None or not any(request.streams and request.decodes for request in self.running):
            return self.max_batch_tokens
        return prompt_tokens

    def _admit(self, plan: StepPlan, budget: int, room: int) -> int:
        """Let those who wait begin, in their order, as far as seats, blocks and the step's tokens suffice, ``room`` of these for prompts;
        returns what is left of the budget."""
        coming: set[Key] | None = None
        while self.waiting:
            request = self.waiting[0]
            if not room or budget < request.num_sequences or self._seats() + request.seats + len(request.followers) > self.max_batch_size:
                break
            cached = self._cached(request)
            # Admitted only if everything it has fits now: a prompt admitted by halves would be the first to be preempted.
            if self._blocks_wanted(request) - self.pool.num_held(cached) > self.pool.num_free:
                break
            if coming is None:
                coming = {key for one in self.running for key in self._coming(one)}
            if self._next_key(request, cached) in coming:
                break  # somebody is about to compute what it begins with: it waits to share that
            bisect.insort(self.running, self.waiting.pop(0), key=_order)
            self._begin(request, cached)
            coming.update(self._coming(request))
            shares = self._shares(request, budget if request.decodes else min(budget, room))
            num_tokens = self._schedule(plan, request, shares, self._writes(shares))
            budget -= num_tokens
            room -= 0 if request.decodes else num_tokens
        return budget

    def _most_cached(self, request: Request) -> int:
        """How many cached blocks its first sequence may begin with: something is always left to compute."""
        return ((request.shared or len(request.sequences[0].tokens)) - 1) // self.pool.block_size if self.prefix_cache else 0

    def _cached(self, request: Request) -> BlockTable:
        """The cached blocks that a waiting request begins with."""
        return self.pool.match(request.sequences[0].tokens, self._most_cached(request), request.cache_salt)

    def _next_key(self, request: Request, cached: BlockTable) -> Key | None:
        """The key of the first block that a waiting request could share and cannot yet."""
        place = len(cached)
        if place == self._most_cached(request):
            return None
        return self.pool.key(cached, request.sequences[0].tokens, place, request.cache_salt)

    def _coming(self, request: Request) -> list[Key]:
        """Of each sequence the key of the block that it fills next, if it has the tokens for that already."""
        keys: list[Key] = []
        for sequence in request.sequences if self.prefix_cache else ():
            place = sequence.num_computed // self.pool.block_size
            if (place + 1) * self.pool.block_size <= len(sequence.tokens) and len(sequence.block_table) >= place:
                keys.append(self.pool.key(sequence.block_table, sequence.tokens, place, request.cache_salt))
        return keys

    def _begin(self, request: Request, cached: BlockTable) -> None:
        """A request runs now, and has these blocks already."""
        first = request.sequences[0]
        if cached:
            first.block_table = self.pool.share(cached)
            first.num_computed = len(cached) * self.pool.block_size
        if request.scheduled_at is None:
            now = self.clock()
            for one in (request, *request.followers):
                one.scheduled_at, one.num_cached_tokens = now, first.num_computed
            self.num_prompt_tokens += len(request.prompt)
            self.num_cached_tokens += first.num_computed

    def _remember(self, request: Request, sequence: TokenSequence, start: int) -> None:
        """Keep the blocks that a sequence has filled since it had ``start`` tokens in the cache."""
        if self.prefix_cache and sequence.num_computed // self.pool.block_size > start // self.pool.block_size:
            self.pool.cache(sequence.block_table, sequence.tokens, start, sequence.num_computed, request.cache_salt)

    def reset_prefix_cache(self) -> None:
        """Forget what is cached, also of running requests, which are computed anew."""
        self.preempt_running()
        self.pool.forget()

    def _place_drafts(self, plan: StepPlan, budget: int) -> None:
        """Give drafts what is left of budget and pool, the oldest request first: they never cost anybody else a token or a block."""
        for scheduled in plan.sequences:
            request = scheduled.request
            draft = request.draft
            if draft is None:
                continue
            request.draft = None
            if scheduled.rows != (request,):
                continue
            table, end = request.block_table, scheduled.end
            room = (len(table) + self.pool.num_free) * self.pool.block_size - end
            size = min(len(draft), budget, room)
            if size > 0:
                self.pool.prepare(table, end, end + size)
                scheduled.draft = draft.keep(range(1, size + 1))
                budget -= size

    def _seats(self) -> int:
        """Places in the batch that are taken, those of followers about to join and of beams to come included."""
        return sum(request.seats + len(request.followers) for request in self.running)

    def _blocks_wanted(self, request: Request) -> int:
        """Blocks for all that a waiting request has."""
        sequences = request.sequences
        shared = request.shared // self.pool.block_size
        return shared + len(sequences) * (self.pool.blocks_for(len(sequences[0].tokens)) - shared)

    def _shares(self, request: Request, budget: int) -> list[tuple[TokenSequence, int]]:
        """How many tokens each sequence of a request computes next, at most ``budget`` in all, which is one for each at least.

        Beams compute their last tokens in one step, for they are chosen from together.
        """
        sequences = request.sequences
        first = sequences[0]
        if request.shared:
            return [(first, min(request.shared - first.num_computed, self.prefill_chunk, budget))]
        if len(sequences) == 1:
            return [(first, min(first.num_missing, self.prefill_chunk, budget))]
        missing = [sequence.num_missing for sequence in sequences]
        if sum(missing) <= budget and max(missing) <= self.prefill_chunk:
            return list(zip(sequences, missing, strict=True))
        shares = []
        for sequence, n in zip(sequences, missing, strict=True):
            share = min(n - 1, self.prefill_chunk, budget)
            if share:
                shares.append((sequence, share))
                budget -= share
        return shares

    def _writes(self, shares: list[tuple[TokenSequence, int]]) -> list[Write]:
        """What of the shares must have blocks of the pool first."""
        writes = []
        for sequence, n in shares:
            table, start = sequence.block_table, sequence.num_computed
            if not self.pool.is_writable(table, start, start + n):
                writes.append((table, start, start + n))
        return writes

    def _schedule(self, plan: StepPlan, request: Request, shares: list[tuple[TokenSequence, int]], writes: list[Write]) -> int:
        """Add to the plan; returns how many tokens."""
        for write in writes:
            plan.copies += self.pool.prepare(*write)
        total = 0
        for sequence, n in shares:
            assert n >= 1, "a request is scheduled without a token to compute"
            rows = (sequence, *request.followers) if n == sequence.num_missing else ()
            plan.sequences.append(ScheduledSequence(request, sequence, sequence.num_computed, n, rows))
            total += n
        assert total, "a request is scheduled without a token to compute"
        return total

    def _make_room(self, request: Request, writes: list[Write]) -> bool:
        """Preempt the last in order until ``request`` can make its ``writes``; False if it had to be preempted itself."""
        while self.pool.new_blocks(writes) > self.pool.num_free:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        for sequence in request.sequences:
            self.pool.release(sequence.block_table)
        request.restart()
        request.num_preemptions += 1
        self.num_preemptions += 1
        if self.on_preemption is not None:
            self.on_preemption(request)
        bisect.insort(self.waiting, request, key=_order)

    def commit(self, plan: StepPlan) -> None:
        """Record that a plan has been run: its tokens are in the cache, and followers and beams have joined."""
        counted: Request | None = None
        for scheduled in plan.sequences:
            request, sequence = scheduled.request, scheduled.sequence
            if request.finished:
                continue  # since the step began
            sequence.num_computed = scheduled.end
            self._remember(request, sequence, scheduled.start)
            if sequence.num_computed == request.shared:
                for beam in request.beams[1:]:
                    beam.block_table = self.pool.fork(sequence.block_table)
                    beam.num_computed = sequence.num_computed
                request.shared = 0
            if request is not counted:  # its beams come one after the other, and what they hold together has been decided by the plan
                counted = request
                request.peak_blocks = max(request.peak_blocks, request.num_blocks)
            if request.followers and scheduled.rows:
                for follower in request.followers:
                    follower.block_table = self.pool.fork(request.block_table)
                    follower.num_computed = request.num_computed
                at = self.running.index(request) + 1
                self.running[at:at] = request.followers
                request.followers = []

    def accept(self, request: Request, num_tokens: int) -> None:
        """Of a request's draft so many tokens hold, and are in the cache right after its others; the blocks of the rest are free."""
        start = request.num_computed
        request.num_computed += num_tokens
        self._remember(request, request, start)
        self.pool.truncate(request.block_table, request.num_computed)

    def preempt_running(self) -> int:
        """Preempt every running request (they resume by recomputation); returns how many there were."""
        count = len(self.running)
        while self.running:
            self._preempt(self.running.pop())
        return count

    def remove(self, request: Request) -> None:
        """Take a finished or aborted request out and free its blocks. A leader removed early passes its followers on."""
        self._timed.pop(request, None)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            for leader in (*self.running, *self.waiting):
                if request in leader.followers:
                    leader.followers.remove(request)
        for sequence in request.sequences:
            self.pool.release(sequence.block_table)
        if request.followers:
            heir, *request.followers[:] = request.followers
            heir.followers, request.followers = request.followers, []
            bisect.insort(self.waiting, heir, key=_order)

    def check(self) -> None:
        """Assert the invariants of queues and pool; for tests, after any step."""
        requests = (*self.running, *self.waiting)
        assert len({id(r) for r in requests}) == len(requests), "a request is queued twice"
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_order), "requests are not in their order"
        followers = (follower for r in requests for follower in r.followers)
        assert self._timed.keys() <= {*requests, *followers}, "a request that has ended is still timed"
        waiting = [s for r in self.waiting for s in r.sequences]
        running = [s for r in self.running for s in r.sequences]
        assert all(not s.block_table and s.num_computed == 0 for s in waiting), "a waiting request holds blocks"
        assert len(running) <= self._seats() <= self.max_batch_size, "more sequences run than the batch holds"
        for s in running:
            assert s.num_computed <= len(s.tokens) and len(s.block_table) >= self.pool.blocks_for(s.num_computed)
        for r in requests:
            assert len({len(s.tokens) for s in r.sequences}) == 1, "beams of one request are not equally long"
            assert not r.searches or not r.block_table, "a beam search holds blocks besides its beams'"
        self.pool.check(s.block_table for s in running)
        for r in self.running if self.prefix_cache else ():
            for s in r.sequences:
                self.pool.check_cached(s.block_table, s.tokens, s.num_computed, r.cache_salt)
