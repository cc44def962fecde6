"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True)
class RequestMetrics:
    """Counts and times of one request. Times are seconds since it was submitted."""

    num_prompt_tokens: int
    num_new_tokens: int
    num_preemptions: int
    time_to_first_token: float | None
    total_time: float


@dataclass(frozen=True)
class RequestOutput:
    """One finished continuation.

    ``finish_reason``: "stop" (an end-of-sequence token, stop token or stop string: ``stop_reason`` says which), "length", "error"
    (``error`` says why) or "abort". Decoding the same prompt with ``SamplingParams(seed=seed, stream=stream, ...)`` reproduces it alone.
    """

    prompt_index: int  # which prompt of the call
    index: int  # which of its num_return_sequences
    prompt_token_ids: list[int]
    token_ids: list[int]  # new tokens only, the stop token included
    text: str | None  # without stop token or stop string; None when the decoder has no tokenizer
    finish_reason: FinishReason
    stop_reason: int | str | None
    error: str | None
    logprobs: list[float]  # of each new token, under the model's own distribution (before penalty, temperature and filters)
    cumulative_logprob: float
    seed: int
    stream: int
    metrics: RequestMetrics


@dataclass(frozen=True)
class StreamEvent:
    """Progress of one continuation: tokens and text since its last event. The last event of each carries its ``output``."""

    prompt_index: int
    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""  # settled text only: never half a character, never the beginning of a stop string
    output: RequestOutput | None = None
