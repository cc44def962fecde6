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
    num_cached_tokens: int  # of the prompt's tokens, those that the prefix cache had when the request was first scheduled
    queue_time: float | None  # until it was first scheduled; None: it never was
    time_to_first_token: float | None
    total_time: float
    peak_blocks: int  # most cache blocks that it held at once; all beams of a search together, a shared block counted once
    num_forwards: int  # steps of the model that gave it tokens; without drafts each gives one
    num_drafted: int  # tokens that were drafted and verified, and how many of them were accepted (an end may then cut some off)
    num_accepted: int

    @property
    def forwards_saved(self) -> int:
        """How many steps fewer it took than new tokens."""
        return max(0, self.num_new_tokens - self.num_forwards)


@dataclass(frozen=True)
class RequestOutput:
    """One finished continuation.

    ``finish_reason``: "stop" (an end-of-sequence token, stop token or stop string: ``stop_reason`` says which; None: the end of the
    request's grammar), "length", "error" (``error`` says why) or "abort" (at a timeout ``error`` says so). Decoding the same prompt with
    ``SamplingParams(seed=seed, stream=stream, ...)`` reproduces it alone.

    Log-probabilities are natural logarithms, one entry per new token: the plain ones under the model's own distribution, the processed ones
    under the one the token was drawn from, after penalties, bias, masks, temperature and filters (a greedy request has neither temperature
    nor filters).
    """

    prompt_index: int  # which prompt of the call
    index: int  # which of its num_return_sequences; of a beam search the best is 0
    prompt_token_ids: list[int]
    token_ids: list[int]  # new tokens only, the stop token included
    text: str | None  # without stop token or stop string; None when the decoder has no tokenizer
    finish_reason: FinishReason
    stop_reason: int | str | None
    error: str | None
    logprobs: list[float]
    processed_logprobs: list[float]
    # The most likely tokens at each position with their log-probabilities, best first, as many as the request's ``logprobs`` asks for and
    # are possible; None where it asks for none.
    top_logprobs: list[dict[int, float]] | None
    processed_top_logprobs: list[dict[int, float]] | None
    cumulative_logprob: float  # the sum of ``logprobs``
    seed: int
    stream: int
    metrics: RequestMetrics
    # Of beam search only, else None. ``beam_score`` is the float32 sum of ``processed_logprobs``; ``score`` is what the outputs of a prompt
    # are ranked by: beam_score / length ** length_penalty, or with ``do_sample`` the perturbed log-probability.
    beam_score: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class StreamEvent:
    """Progress of one continuation: tokens and text since its last event. The last event of each carries its ``output``.

    Of a beam search the first output's events show tokens as soon as all running beams and the best finished sequence have them in common.
    """

    prompt_index: int
    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""  # settled text only: never half a character, never the beginning of a stop string
    output: RequestOutput | None = None
    logprobs: list[float] = field(default_factory=list)  # of its tokens, as in RequestOutput
    top_logprobs: list[dict[int, float]] | None = None  # likewise
