"""The loop behind the face: draft -> plan -> run -> commit -> decide, one step at a time."""

from __future__ import annotations

import logging

from .blocks import BlockPool
from .decode import beam_request, speculate
from .decode.beam_rows import choose
from .decode.grammar import GrammarError
from .decode.rows import said
from .decode.sample import Sampler
from .drafters.speculator import Speculator
from .kernels.registry import Ops
from .kv_cache import KVCache
from .outputs import FinishReason, RequestOutput, StreamEvent
from .pace import Pace
from .plan import StepPlan
from .request import Drawn, Request
from .runner import PENDING, Runner, Started
from .scheduler import Scheduler
from .stats import Meter, Stats

logger = logging.getLogger("engine.loop")


class StepLoop:
    """Takes queued requests to their ends, all that are there together in each step.

    Args:
        ops: kernels, of the sampler and of drafts.
        scheduler: plans steps over its block pool.
        cache: the tensors behind those blocks.
        runner: runs plans.
        speculator: drafts, or None.
    """

    def __init__(self, ops: Ops, scheduler: Scheduler, cache: KVCache, runner: Runner, speculator: Speculator | None) -> None:
        self.ops = ops
        self.scheduler = scheduler
        self.pool: BlockPool = scheduler.pool
        self.cache = cache
        self.runner = runner
        self.sampler = Sampler(ops)
        self.speculator = speculator
        if speculator is not None:
            scheduler.on_preemption = speculator.release
        self.pace = Pace()
        self.meter = Meter()
        self._stepping = False
        self._started: Started | None = None  # the last step, while its tokens are on their way: only of a runner that can feed them

    @property
    def num_steps(self) -> int:
        """Run so far."""
        return self.meter.num_steps

    def stats(self) -> Stats:
        """See ``Decoder.stats``."""
        scheduler, pool, meter = self.scheduler, self.pool, self.meter
        step_seconds, tokens_per_second = meter.recent()
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            block_size=pool.block_size,
            num_steps=meter.num_steps,
            num_finished=dict(meter.num_finished),
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_new_tokens=meter.num_new_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_drafted=meter.num_drafted,
            num_accepted=meter.num_accepted,
            seconds=dict(meter.seconds),
            step_seconds=step_seconds,
            tokens_per_second=tokens_per_second,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def enqueue(self, requests: list[Request]) -> None:
        """Queue requests; samples of one prompt go together, the first with the others as followers, in groups that fit a batch."""
        leaders: list[Request] = []
        for request in requests:
            leader = leaders[-1] if leaders else request
            same_prompt = leader is not request and request.prompt_index == leader.prompt_index
            if same_prompt and not leader.searches and 1 + len(leader.followers) < self.scheduler.max_batch_size:
                leader.followers.append(request)
            else:
                leaders.append(request)
        for leader in leaders:
            self.scheduler.add(leader)

    def abort(self, requests: list[Request]) -> None:
        """End those that have not finished, with what they have."""
        for request in requests:
            if not request.finished:
                self._finish(request, "abort")

    def reset_prefix_cache(self) -> None:
        """See ``Decoder.reset_prefix_cache``."""
        if self._stepping:
            raise RuntimeError("this decoder is in the middle of a step; its prefix cache can be reset between two")
        self._settle_started()
        self.scheduler.reset_prefix_cache()

    def step(self) -> None:
        """One step of the loop: plan, run, commit, decide. Progress arrives as events of the requests."""
        if self._stepping:
            raise RuntimeError("this decoder is in the middle of a step; a logits_processor must not call its own decoder")
        self._stepping = True
        try:
            self._step()
        finally:
            self._stepping = False

    def _step(self) -> None:
        self.meter.begin()
        for request in self.scheduler.expired():
            self._finish(request, "abort", error=f"the request has run into its timeout of {request.timeout:g} seconds")
        started = self._started
        try:
            if started is not None and self.speculator is None and self.runner.can_feed(started):
                plan = self._step_ahead(started)
            else:
                plan = self._step_in_turn()
        except BaseException:
            # What of this step is in the cache, and who has had a token, is not certain: all running requests start over from the
            # tokens they have, and by the token law draw what they would have drawn.
            self._started = None
            self.scheduler.preempt_running()
            raise
        if plan is not None:
            self._note(plan, self.meter.end())

    def _step_in_turn(self) -> StepPlan | None:
        """A step that begins when the one before it is done; returns its plan, or None if there is none or it has failed."""
        if self._started is not None:
            self._settle_started()
        if not self.scheduler.has_work:
            return None
        if self.speculator is not None:
            self.speculator.propose(self.scheduler.running)
            self.meter.lap("draft")
        plan = self.scheduler.plan(self.pace.prompt_tokens)
        self.meter.lap("plan")
        if not plan.sequences:
            assert not self.scheduler.has_work, "requests wait, yet none can be scheduled"
            return None
        try:
            self._execute(plan)
        except Exception as error:
            self._fail(plan, error)
            return None
        return plan

    def _step_ahead(self, before: Started) -> StepPlan | None:
        """A step that begins while the tokens of the one before are on their way; returns the plan of that one, whose time this was.

        While it is planned, a token that stands for the one to come lets a request count as what it is about to be: longer by one token,
        whatever that will be. Whose last token is on its way has none, and nothing to compute. Requests that turn out to have ended are
        computed once too often, which nobody reads.
        """
        ahead = [row for row in before.plan.drawing if not row.finished and row.num_new_tokens + 1 < row.max_new_tokens]
        plan, started, failure = None, None, None
        try:
            for request in ahead:
                request.tokens.append(PENDING)
            plan = self.scheduler.plan(self.pace.prompt_tokens)
            self.meter.lap("plan")
            if plan.sequences:
                started = self.runner.start(plan)
            self.meter.lap("forward")
        except Exception as error:
            failure = error
        finally:
            for request in ahead:
                if request.tokens[-1] == PENDING:
                    request.tokens.pop()
        self._started = None
        self._settle_safely(before)
        if failure is not None:
            if plan is None:
                raise failure
            self._fail(plan, failure)
        elif started is not None:
            self.scheduler.commit(started.plan)
            self._keep(started)
        return before.plan

    def _keep(self, started: Started) -> None:
        """Settle a step, or let the next one begin before."""
        if self.speculator is None and self.runner.can_feed(started):
            self._started = started
        else:
            self._settle_safely(started)

    def _settle_started(self) -> None:
        """Wait for the tokens that are on their way, if any are."""
        started, self._started = self._started, None
        if started is not None:
            self._settle_safely(started)

    def _settle_safely(self, started: Started) -> None:
        try:
            self._settle(started)
        except Exception as error:
            self._fail(started.plan, error)

    def _note(self, plan: StepPlan, seconds: float) -> None:
        """Learn from the time of a step."""
        shares = [scheduled.num_tokens for scheduled in plan.sequences]
        num_prompt_tokens = sum([n for n in shares if n > 1])
        rows = shares.count(1)
        if self.speculator is not None:
            rows += sum([len(scheduled.draft) for scheduled in plan.sequences])
        self.pace.note(rows, num_prompt_tokens, seconds)
        if self.speculator is not None and not num_prompt_tokens:
            self.speculator.note_step(len(shares), rows, seconds)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """End those whose step has failed: what of it is in the cache is not certain. All others go on."""
        requests: dict[Request, None] = {}
        for scheduled in plan.sequences:
            requests[scheduled.request] = None
            requests |= dict.fromkeys(row for row in scheduled.rows if isinstance(row, Request))
        unfinished = [request for request in requests if not request.finished]
        logger.error("a step failed, and with it %d requests", len(unfinished), exc_info=error)
        for request in unfinished:
            self._finish(request, "error", error=f"a step with this request failed with {type(error).__name__}: {said(error)}")

    def _execute(self, plan: StepPlan) -> None:
        started = self.runner.start(plan)
        self.meter.lap("forward")
        self.scheduler.commit(plan)
        self.meter.lap("commit")
        if started.draw is not None:
            self._keep(started)
        else:
            self._settle(started)

    def _settle(self, started: Started) -> None:
        """Give the requests of a step their tokens; those that have ended meanwhile get none."""
        plan, logits = started.plan, started.logits
        if plan.drawing:
            if started.draw is not None:
                drawn = started.draw.result()
            else:
                assert logits is not None
                drawn = self.sampler.draw(logits[: len(plan.drawing)] if plan.beams else logits, plan.drawing)
            verdicts = speculate.verdicts(self.ops, plan, logits, drawn, self.runner.device)
            self.meter.lap("sample")
            for verdict in verdicts:
                if not verdict.request.finished:
                    self._carry_out(verdict)
            self.meter.lap("commit")
        if plan.beams:
            assert logits is not None
            choices = choose(self.ops, logits[len(plan.drawing) :] if plan.drawing else logits, plan.beams)
            self.meter.lap("sample")
            for choice in choices:
                if choice.error is not None:
                    self._finish(choice.request, "error", error=choice.error)
                    continue
                beam_request.go_on(choice, self.pool)
                self.meter.num_new_tokens += 1
                if choice.request.finished:
                    self._remove(choice.request)
            self.meter.lap("commit")

    def _carry_out(self, verdict: speculate.Verdict) -> None:
        """Give a request its next tokens, as far as it goes on, and keep of its draft in the cache what holds."""
        request = verdict.request
        request.num_forwards += 1
        if self.speculator is not None and verdict.draft:
            self.speculator.learn(verdict)
            self.meter.num_drafted += len(verdict.draft)
            self.meter.num_accepted += verdict.num_accepted
        end = request.num_tokens
        for drawn in verdict.drawn:
            if drawn.error is not None:
                self._finish(request, "error", error=drawn.error)
            else:
                self._advance(request, drawn)
            if request.finished:
                return
        if verdict.draft:
            # The root is the token before `end`; node n of the draft was written n slots after it.
            moved = [(end - 1 + node, end - 1 + depth) for depth, node in enumerate(verdict.path) if node != depth]
            if moved:
                table, size = request.block_table, self.pool.block_size
                sources, targets = ([table[i // size] * size + i % size for i in places] for places in zip(*moved, strict=True))
                self.runner.move_tokens(sources, targets)
            self.scheduler.accept(request, verdict.num_accepted)

    def _advance(self, request: Request, drawn: Drawn) -> None:
        """Append a drawn token, settle its text, and end the request where it ends."""
        request.append(drawn)
        self.meter.num_new_tokens += 1
        token = drawn.token
        if token in request.end_token_ids:
            self._finish(request, "stop", stop_reason=token, drawn=drawn)
            return
        text, matched, complete = "", None, False
        if request.text_state is not None:
            try:
                text, matched = request.text_state.feed(token)
            except Exception as error:  # a tokenizer may raise anything; it is this request's alone
                self._finish(request, "error", error=f"the tokenizer cannot decode token {token}: {error}", drawn=drawn)
                return
        if request.matcher is not None:
            try:
                request.matcher.advance(request.tokens, len(request.prompt))
            except GrammarError as error:
                self._finish(request, "error", error=f"the grammar cannot go on after token {token}: {error}", drawn=drawn, text=text)
                return
            complete = request.matcher.complete and request.num_new_tokens >= request.params.min_new_tokens
        if matched is not None or complete:
            self._finish(request, "stop", stop_reason=matched, drawn=drawn, text=text)
        elif request.num_new_tokens == request.max_new_tokens:
            self._finish(request, "length", drawn=drawn, text=text)
        elif request.streams:
            request.events.append(self._event(request, drawn, text))

    def _event(self, request: Request, drawn: Drawn | None, text: str, output: RequestOutput | None = None) -> StreamEvent:
        """Progress by one drawn token, or by none."""
        tokens = [] if drawn is None else [drawn.token]
        logprobs = [] if drawn is None else [drawn.logprob]
        top = None if request.params.logprobs == 0 else [] if drawn is None else [drawn.top or {}]
        return StreamEvent(request.prompt_index, request.index, tokens, text, output, logprobs, top)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        error: str | None = None,
        drawn: Drawn | None = None,
        text: str = "",
    ) -> None:
        if request.searches:
            beam_request.fail(request, reason, error=error)
            self._remove(request)
            return
        whole = None
        if request.text_state is not None:
            if not isinstance(stop_reason, str) and reason != "error":  # after a stop string no text may follow
                try:
                    rest, matched = request.text_state.flush()
                except Exception as failure:
                    rest, matched = "", None
                    reason, stop_reason, error = "error", None, f"the tokenizer cannot decode the last tokens: {said(failure)}"
                text += rest
                if matched is not None and stop_reason is None and reason != "abort":
                    reason, stop_reason = "stop", matched
            whole = request.text_state.text
        output = request.finish(reason, text=whole, stop_reason=stop_reason, error=error)
        request.events.append(self._event(request, drawn, text, output))
        self._remove(request)

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.meter.num_finished.update(output.finish_reason for output in request.outputs)
        if self.speculator is not None:
            self.speculator.release(request)
