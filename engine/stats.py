"""What a decoder is doing and has done: ``Decoder.stats``."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# The parts of a step: drafts; the scheduler's plan; the model; who gets which token; what is done with them.
STEP_PARTS = ("draft", "plan", "forward", "sample", "commit")
RECENT_SECONDS = 10.0
_RECENT_STEPS = 4096


@dataclass(frozen=True)
class Stats:
    """The state of a decoder, and what it has counted since it was made."""

    num_running: int  # requests that have a place in the batch
    num_waiting: int  # and that have none yet, or no longer
    num_blocks: int  # of the KV cache
    num_free_blocks: int  # held by no request, cached ones included
    num_cached_blocks: int  # in the prefix cache, held or not
    block_size: int  # tokens of a block
    num_steps: int
    num_finished: Mapping[str, int]  # requests by finish_reason
    num_prompt_tokens: int  # of the requests that have been scheduled
    num_cached_tokens: int  # of these the prefix cache had
    num_new_tokens: int  # of a beam search one for each step
    num_preemptions: int
    num_drafted: int  # tokens that were drafted and verified
    num_accepted: int
    seconds: Mapping[str, float]  # spent in each of STEP_PARTS
    step_seconds: float  # the median of the last steps, at most RECENT_SECONDS ago; 0 if there was none
    tokens_per_second: float  # new tokens of these steps

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that the prefix cache had."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def cache_use(self) -> float:
        """The share of blocks that requests hold."""
        return 1 - self.num_free_blocks / self.num_blocks


class _Past(NamedTuple):
    """A step that has been run."""

    end: float
    seconds: float
    num_new_tokens: int


class Meter:
    """Counts for ``Stats``; every moment between ``begin`` and ``end`` of a step goes to one of its parts. Any thread may read it."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_new_tokens = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_finished: Counter[str] = Counter()
        self.seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self._recent: deque[_Past] = deque(maxlen=_RECENT_STEPS)
        self._start = self._since = 0.0
        self._tokens_before = 0

    def begin(self) -> None:
        self._start = self._since = time.perf_counter()
        self._tokens_before = self.num_new_tokens

    def lap(self, part: str) -> None:
        """The time since the last lap was spent in ``part``."""
        now = time.perf_counter()
        self.seconds[part] += now - self._since
        self._since = now

    def end(self) -> float:
        """The step is over; returns its seconds."""
        seconds = self._since - self._start
        self.num_steps += 1
        self._recent.append(_Past(self._since, seconds, self.num_new_tokens - self._tokens_before))
        return seconds

    def recent(self) -> tuple[float, float]:
        """The median of the last steps' seconds, and their new tokens per second."""
        now = time.perf_counter()
        past = [step for step in tuple(self._recent) if step.end > now - RECENT_SECONDS]
        if not past:
            return 0.0, 0.0
        elapsed = now - (past[0].end - past[0].seconds)
        return statistics.median(step.seconds for step in past), sum(step.num_new_tokens for step in past) / elapsed
