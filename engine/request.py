"""One sequence being decoded."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .outputs import FinishReason, RequestMetrics, RequestOutput, StreamEvent
from .params import SamplingParams


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

    tokens: list[int] = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    history: dict[int, None] | None = None  # distinct tokens in order of appearance; kept only under a repetition penalty
    events: deque[StreamEvent] = field(default_factory=deque)  # where its progress goes; the requests of one call share it
    output: RequestOutput | None = None
    num_preemptions: int = 0
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.params.repetition_penalty != 1.0:
            self.history = dict.fromkeys(self.tokens)

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

    def append(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.history is not None:
            self.history[token] = None
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def finish(
        self, reason: FinishReason, *, text: str | None, stop_reason: int | str | None = None, error: str | None = None
    ) -> RequestOutput:
        self.output = RequestOutput(
            prompt_index=self.prompt_index,
            index=self.index,
            prompt_token_ids=self.prompt,
            token_ids=self.tokens[len(self.prompt) :],
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            logprobs=self.logprobs,
            cumulative_logprob=sum(self.logprobs),
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
