"""One sequence being decoded."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .outputs import FinishReason, RequestMetrics, RequestOutput, StreamEvent
from .params import SamplingParams


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


@dataclass(eq=False)
class Request:
    """A sequence and its progress.

    The one rule of progress: ``num_computed`` of its ``tokens`` are in the cache and all of them are wanted there. Prefill, chunked
    prefill, decode and resuming after preemption are the same subtraction. A step that computes the last of them draws the next token.
    """

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
    block_table: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)  # the new tokens
    history: History | None = None  # kept only under a penalty
    events: deque[StreamEvent] = field(default_factory=deque)  # where its progress goes; the requests of one call share it
    output: RequestOutput | None = None
    num_preemptions: int = 0
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.params.repetition_penalty != 1.0:
            self.history = History(self.prompt)
        elif self.params.presence_penalty or self.params.frequency_penalty:
            self.history = History(())  # these look at the output alone

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def num_missing(self) -> int:
        """Tokens not yet in the cache."""
        return len(self.tokens) - self.num_computed

    @property
    def finished(self) -> bool:
        return self.output is not None

    def append(self, drawn: Drawn) -> None:
        self.tokens.append(drawn.token)
        self.drawn.append(drawn)
        if self.history is not None:
            self.history.add(drawn.token)
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def finish(
        self, reason: FinishReason, *, text: str | None, stop_reason: int | str | None = None, error: str | None = None
    ) -> RequestOutput:
        logprobs = [drawn.logprob for drawn in self.drawn]
        top = self.params.logprobs > 0
        self.output = RequestOutput(
            prompt_index=self.prompt_index,
            index=self.index,
            prompt_token_ids=self.prompt,
            token_ids=self.tokens[len(self.prompt) :],
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            logprobs=logprobs,
            processed_logprobs=[drawn.processed_logprob for drawn in self.drawn],
            top_logprobs=[drawn.top or {} for drawn in self.drawn] if top else None,
            processed_top_logprobs=[drawn.processed_top or {} for drawn in self.drawn] if top else None,
            cumulative_logprob=sum(logprobs),
            seed=self.seed,
            stream=self.stream,
            metrics=RequestMetrics(
                num_prompt_tokens=len(self.prompt),
                num_new_tokens=self.num_new_tokens,
                num_preemptions=self.num_preemptions,
                time_to_first_token=None if self.first_token_at is None else self.first_token_at - self.submitted_at,
                total_time=time.perf_counter() - self.submitted_at,
            ),
        )
        return self.output
