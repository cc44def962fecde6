"""Sequences being decoded: requests, the beams of one, and what one would be after drafted tokens."""

from __future__ import annotations

import functools
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .blocks import BlockTable, new_table
from .outputs import FinishReason, RequestMetrics, RequestOutput, StreamEvent
from .params import SamplingParams

if TYPE_CHECKING:
    from .drafters.draft import Draft


class Drawn(NamedTuple):
    """What a row of logits became: a token with its log-probabilities (see ``RequestOutput``), or why there is none."""

    token: int
    logprob: float
    processed_logprob: float
    top: dict[int, float] | None = None
    processed_top: dict[int, float] | None = None
    error: str | None = None  # one sentence; then there is no token


class History:
    """The distinct tokens of a sequence and how often each occurs in its output, flat, as penalties are handed to the kernel."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.tokens = array("i", dict.fromkeys(prompt))
        self.counts = array("i", [0] * len(self.tokens))
        self._place = {token: place for place, token in enumerate(self.tokens)}

    def add(self, token: int) -> None:
        """One more occurrence in the output."""
        place = self._place.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        self.counts[place] += 1

    def copy(self) -> History:
        twin = object.__new__(History)
        twin.tokens, twin.counts, twin._place = self.tokens[:], self.counts[:], dict(self._place)
        return twin


class TokenSequence:
    """Tokens and their progress.

    The one rule of progress: ``num_computed`` of its ``tokens`` are in the cache and all of them are wanted there. Prefill, chunked
    prefill, decode and resuming after preemption are the same subtraction. A step that computes the last of them draws the next token.
    """

    prompt: list[int]
    params: SamplingParams
    end_token_ids: frozenset[int]
    controls: Any  # decode.controls.Controls
    tokens: list[int]
    num_computed: int
    block_table: BlockTable
    history: History | None
    matcher: Any

    @property
    def num_tokens(self) -> int:
        """Of ``tokens``: also the position of the next one."""
        return len(self.tokens)

    @property
    def num_new_tokens(self) -> int:
        return self.num_tokens - len(self.prompt)

    @property
    def num_missing(self) -> int:
        """Tokens not yet in the cache."""
        return len(self.tokens) - self.num_computed


class Beam(TokenSequence):
    """One of the sequences that a beam search holds at a time.

    Args:
        request: whose beam it is.
        group: in which of the request's searches (``num_beam_groups``).
    """

    def __init__(self, request: Request, group: int) -> None:
        self.request = request
        self.group = group
        self.prompt, self.params, self.controls, self.end_token_ids = (
            request.prompt, request.params, request.controls, request.end_token_ids
        )  # fmt: skip
        self.tokens = list(request.prompt)
        self.num_computed = 0
        self.block_table = new_table()
        self.history = None if request.history is None else request.history.copy()
        self.matcher = None if request.matcher is None else request.matcher.copy()
        self.drawn: list[Drawn] = []
        self.score = 0.0  # the sum of its tokens' processed log-probabilities, in float32
        self.perturbed: float | None = None  # stochastic beams: the score with noise, which they are ranked by; None before the first token
        self.noise_key = request.stream  # stochastic beams: what its noise follows from

    def child(self, drawn: Drawn, score: float) -> Beam:
        """The beam that goes on from this one with one more token; its blocks and its matcher's place are the caller's to set."""
        twin = object.__new__(Beam)
        twin.__dict__.update(self.__dict__)
        twin.tokens, twin.drawn, twin.score = [*self.tokens, drawn.token], [*self.drawn, drawn], score
        if self.history is not None:
            twin.history = self.history.copy()
            twin.history.add(drawn.token)
        return twin


class Lookahead(TokenSequence):
    """A request as it would be after drafted tokens: what rows of logits are drawn for while it is not known whether they are right.

    Args:
        before: the request, or it after the drafted tokens before.
        token: one more, or None for none.

    Where the request has a grammar, that may raise what its matcher raises at a token that cannot be.
    """

    seed: int
    stream: int
    drafted: tuple[int, ...]

    def __init__(self, before: Request | Lookahead, token: int | None = None) -> None:
        self.request: Request = before.request if isinstance(before, Lookahead) else before
        drafted = before.drafted if isinstance(before, Lookahead) else ()
        self.prompt, self.params, self.controls, self.end_token_ids = before.prompt, before.params, before.controls, before.end_token_ids
        self.seed, self.stream = before.seed, before.stream
        self.history, self.matcher = before.history, before.matcher
        self.drafted = drafted if token is None else (*drafted, token)
        if token is not None:
            if self.history is not None:
                self.history = self.history.copy()
                self.history.add(token)
            if self.matcher is not None:
                self.matcher = self.matcher.copy()
                self.matcher.advance(self.tokens, len(self.prompt))

    @functools.cached_property
    def tokens(self) -> list[int]:  # type: ignore[override]  # made only for those who look back: most rows need just their number
        return [*self.request.tokens, *self.drafted]

    @property
    def num_tokens(self) -> int:
        return len(self.request.tokens) + len(self.drafted)


@dataclass(eq=False)
class Request(TokenSequence):
    """One request: itself a sequence, or a beam search over several."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    stream: int
    max_new_tokens: int
    end_token_ids: frozenset[int]
    prompt_index: int = 0
    index: int = 0
    # Further samples of the same prompt; they join, sharing its blocks, when this request's prompt has been computed.
    followers: list[Request] = field(default_factory=list)
    text_state: Any = None  # decode.stop.TextState, or None without a tokenizer
    controls: Any = None  # decode.controls.Controls
    matcher: Any = None  # decode.grammar.Matcher, or None without a grammar

    tokens: list[int] = field(init=False)
    num_computed: int = 0
    block_table: BlockTable = field(default_factory=new_table)
    drawn: list[Drawn] = field(default_factory=list)  # the new tokens; of a beam search those that have settled
    beams: list[Beam] = field(default_factory=list)  # of a beam search; all are equally long
    searches: list[Any] = field(default_factory=list)  # decode.beam.BeamSearch of each beam group; none: no beam search
    num_beams: int = 1
    shared: int = 0  # so many tokens of all beams are computed once, by the first, before the others join; 0: they have joined
    history: History | None = None  # kept only under a penalty
    draft: Draft | None = None  # what the next step verifies beside computing the last token
    num_drafted: int = 0
    num_accepted: int = 0
    num_forwards: int = 0  # steps that gave it tokens
    events: deque[StreamEvent] = field(default_factory=deque)  # where its progress goes; the requests of one call share it
    streams: bool = True  # whether each of its tokens is an event, or its end alone
    outputs: list[RequestOutput] = field(default_factory=list)  # when it has finished: one, or those of a beam search, best first
    peak_blocks: int = 0
    num_preemptions: int = 0
    clock: Callable[[], float] = time.perf_counter  # in seconds; all its times are of this clock
    submitted_at: float = 0.0
    scheduled_at: float | None = None  # when its first tokens were put into a step
    first_token_at: float | None = None
    priority: int = 0  # lower ones first
    timeout: float | None = None  # seconds that it may take since it was submitted
    cache_salt: str | None = None  # cached blocks are shared by requests of the same salt only
    order: tuple[float, int] = (0.0, 0)  # its place among all requests, given by the scheduler
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first scheduled

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.params.repetition_penalty != 1.0:
            self.history = History(self.prompt)
        elif self.params.presence_penalty or self.params.frequency_penalty:
            self.history = History(())  # these look at the output alone

    @property
    def sequences(self) -> Sequence[TokenSequence]:
        """What is computed for it."""
        return self.beams if self.searches else (self,)

    @property
    def num_sequences(self) -> int:
        return len(self.beams) if self.searches else 1

    @property
    def num_blocks(self) -> int:
        """Cache blocks that it holds; one that beams share is counted once."""
        if not self.searches:
            return len(self.block_table)
        return len({block for beam in self.beams for block in beam.block_table})

    @property
    def seats(self) -> int:
        """Sequences that it may have at once, its followers' not counted."""
        return self.num_beams

    @property
    def decodes(self) -> bool:
        """Whether each of its sequences lacks its last token only."""
        if not self.searches:
            return self.num_missing == 1
        return not self.shared and all(beam.num_missing == 1 for beam in self.beams)

    @property
    def deadline(self) -> float | None:
        return None if self.timeout is None else self.submitted_at + self.timeout

    @property
    def finished(self) -> bool:
        return bool(self.outputs)

    @property
    def num_outputs(self) -> int:
        """How many it will have."""
        return self.params.num_return_sequences if self.searches else 1

    def restart(self) -> None:
        """Nothing of it is in the cache any more (its blocks are the caller's to free). Beams will share what they have in common."""
        self.draft = None
        for sequence in self.sequences:
            sequence.num_computed = 0
        self.shared = 0
        if len(self.beams) > 1:
            first, *others = (beam.tokens for beam in self.beams)
            longest = len(first) - 1  # each computes its last token, which the next one is drawn from
            self.shared = next((i for i in range(longest) if any(tokens[i] != first[i] for tokens in others)), longest)

    def append(self, drawn: Drawn) -> None:
        self.tokens.append(drawn.token)
        self.drawn.append(drawn)
        if self.history is not None:
            self.history.add(drawn.token)
        self.note_first_token()

    def note_first_token(self) -> None:
        if self.first_token_at is None:
            self.first_token_at = self.clock()

    def _since_submission(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.submitted_at

    def finish(
        self,
        reason: FinishReason,
        *,
        text: str | None,
        stop_reason: int | str | None = None,
        error: str | None = None,
        drawn: list[Drawn] | None = None,
        beam_score: float | None = None,
        score: float | None = None,
    ) -> RequestOutput:
        """Add an output: of the request's own tokens, or of those ``drawn``, with their scores, by a beam search."""
        drawn = self.drawn if drawn is None else drawn
        logprobs = [d.logprob for d in drawn]
        top = self.params.logprobs > 0
        output = RequestOutput(
            prompt_index=self.prompt_index,
            index=self.index + len(self.outputs),
            prompt_token_ids=self.prompt,
            token_ids=[d.token for d in drawn],
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            logprobs=logprobs,
            processed_logprobs=[d.processed_logprob for d in drawn],
            top_logprobs=[d.top or {} for d in drawn] if top else None,
            processed_top_logprobs=[d.processed_top or {} for d in drawn] if top else None,
            cumulative_logprob=sum(logprobs),
            seed=self.seed,
            stream=self.stream,
            metrics=RequestMetrics(
                num_prompt_tokens=len(self.prompt),
                num_new_tokens=len(drawn),
                num_preemptions=self.num_preemptions,
                num_cached_tokens=self.num_cached_tokens,
                queue_time=self._since_submission(self.scheduled_at),
                time_to_first_token=self._since_submission(self.first_token_at),
                total_time=self.clock() - self.submitted_at,
                peak_blocks=self.peak_blocks,
                num_forwards=self.num_forwards,
                num_drafted=self.num_drafted,
                num_accepted=self.num_accepted,
            ),
            beam_score=beam_score,
            score=score,
        )
        self.outputs.append(output)
        return output


class Submission:
    """The requests of one call and what becomes of them.

    Args:
        requests: in order; they share ``events``.
        streams: whether each of their tokens is an event, or their ends alone.
    """

    def __init__(self, requests: list[Request], streams: bool = True) -> None:
        self.requests = requests
        self.events: deque[StreamEvent] = deque()  # since they were last taken from here
        for request in requests:
            request.events, request.streams = self.events, streams

    @property
    def num_outputs(self) -> int:
        """How many it will have."""
        return sum(request.num_outputs for request in self.requests)

    @property
    def finished(self) -> bool:
        return all(request.finished for request in self.requests)

    @property
    def outputs(self) -> list[RequestOutput]:
        """Of the requests that have finished, in order."""
        return [output for request in self.requests for output in request.outputs]
