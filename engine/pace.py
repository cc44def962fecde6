"""How many tokens of prompts a step may take beside sequences that decode: as many as make it up to twice as long. No tensors.

What is computed when never changes a token of any output, only when it comes.
"""

from __future__ import annotations

import statistics
from collections import deque

from .drafters.governor import Costs

_RECENT = 32  # steps with prompts that the estimate looks at
_ENOUGH = 4  # of them beside others, to do without those that were alone
_FEW = 4  # tokens of a step's prompts from which on they tell what each takes
_FIRST = 32  # tokens of prompts, as long as nothing is known


class Pace:
    """Learns from steps what prompts cost those who wait for their next token.

    A step with prompts is taken to last as long as one without, and some time more for each of their tokens: the median of what it was
    lately, so that a step that was interrupted counts for nothing.
    """

    def __init__(self) -> None:
        self._costs = Costs()  # seconds of steps without prompts
        self._rows = 0  # that were decoded in the last step
        # Seconds by token, of prompts beside sequences that decode and of prompts alone; what both say.
        self._beside: deque[float] = deque(maxlen=_RECENT)
        self._alone: deque[float] = deque(maxlen=_RECENT)
        self._token_seconds = 0.0

    def note(self, rows: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step of so many rows that decode, drafts included, beside so many tokens of prompts has taken so long."""
        if rows:
            self._rows = rows
        if not num_prompt_tokens:
            self._costs.note(rows, seconds)
        elif num_prompt_tokens >= _FEW:
            if not rows:
                self._alone.append(seconds / num_prompt_tokens)
            elif self._costs:
                self._beside.append((seconds - self._costs(rows)) / num_prompt_tokens)
            # Long chunks are cheaper by the token, so that prompts alone count only as long as few have been seen beside others.
            seen = self._beside if len(self._beside) >= _ENOUGH else (*self._beside, *self._alone)
            self._token_seconds = statistics.median(seen) if seen else 0.0

    @property
    def prompt_tokens(self) -> int:
        """How many the next step may take, at least 1."""
        if not self._costs or not self._token_seconds:
            return _FIRST
        plain = self._costs(self._rows)
        return max(1, int(plain / max(self._token_seconds, 1e-3 * plain)))
