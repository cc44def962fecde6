"""What a step computes: the scheduler's plan, and whose rows of logits it has. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .drafters.draft import Draft
from .request import Beam, Request, TokenSequence

NO_DRAFT = Draft()


@dataclass(slots=True)
class ScheduledSequence:
    """``num_tokens`` query tokens of ``sequence`` from ``start`` on, and after them those of ``draft``; each of ``rows`` goes on from the
    logits of the last of its own tokens, and a drafted one from those of the nodes that hold."""

    request: Request
    sequence: TokenSequence  # the request itself, or one of its beams
    start: int
    num_tokens: int
    rows: tuple[TokenSequence, ...]
    draft: Draft = NO_DRAFT

    @property
    def end(self) -> int:
        """How many tokens the sequence has, drafted ones not counted, when this has been computed."""
        return self.start + self.num_tokens


class Row(NamedTuple):
    """A row of logits: whose it is, the index of its scheduled sequence, and which node of the draft it comes after (0: none)."""

    sequence: TokenSequence
    scheduled: int
    node: int


@dataclass(slots=True)
class StepPlan:
    sequences: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # block copies to carry out first (copy-on-write)
    # The rows of logits in their order: beams come last, the nodes of a draft one after the other. And whose they are: what draws a token
    # from each that is no beam's, and the beams.
    rows: list[Row] = field(default_factory=list)
    drawing: list[Any] = field(default_factory=list)  # Request or Lookahead
    beams: list[Beam] = field(default_factory=list)

    def add_rows(self) -> None:
        """Those of its sequences, once all are there with their drafts."""
        beam_rows = []
        for i, scheduled in enumerate(self.sequences):
            for sequence in scheduled.rows:
                if isinstance(sequence, Beam):
                    beam_rows.append(Row(sequence, i, 0))
                    self.beams.append(sequence)
                    continue
                self.rows.append(Row(sequence, i, 0))
                self.drawing.append(sequence)
                if scheduled.draft:
                    self.rows += [Row(sequence, i, node) for node in range(1, 1 + len(scheduled.draft))]
                    self.drawing += scheduled.draft.sequences
        self.rows += beam_rows
