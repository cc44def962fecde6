"""From a plan to rows of logits: builds the step's tensors and runs the model once."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .columns import tensor_of
from .device import upload
from .kv_cache import KVCache
from .models.batch import StepBatch
from .models.transformer import Transformer
from .plan import StepPlan
from .request import Drawn, TokenSequence

_WIDTH = 8  # the columns of a block table come in eights, so that a step is seldom wider than the one before
PENDING = -1  # stands for a token that has been drawn on the device and is not known to the host yet


class Draw(Protocol):
    """Tokens that are being drawn on the device for the rows of a plan that are no beam's."""

    def result(self) -> list[Drawn]:
        """One for each row, when they are there."""


@dataclass(slots=True)
class Started:
    """A step that has been started."""

    plan: StepPlan
    logits: Tensor | None  # float32 [R, V] of ``plan.rows``; None if no row needs any
    draw: Draw | None = None  # where the runner draws as well


class Runner:
    """Runs plans of one model over one cache.

    A step of the same sizes as the one before, as steps of decoding are, writes its numbers into the same tensors, and is the same
    ``StepBatch``: then nothing is allocated, and whoever looks at a batch may keep what follows from its sizes and addresses.
    """

    def __init__(self, model: Transformer, cache: KVCache, block_size: int) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self.device = model.device
        self._last: tuple[list[array[int]], StepBatch] | None = None  # the numbers of the last step, and its tensors over them

    def can_feed(self, started: Started) -> bool:
        """Whether the step after ``started`` can begin before the host knows its tokens."""
        return False

    def start(self, plan: StepPlan) -> Started:
        return Started(plan, self.run(plan))

    def run(self, plan: StepPlan) -> Tensor | None:
        """Compute the plan's tokens; logits float32 ``[R, V]`` of ``plan.rows``, or None if no row needs any."""
        self.cache.copy_blocks(self.model.ops, plan.copies)
        batch = self._prepare(plan)
        logits = self.model.forward_logits(batch if batch.tokens.device == self.device else upload(batch, self.device), self.cache)
        return logits if plan.rows else None

    def move_tokens(self, sources: list[int], targets: list[int]) -> None:
        """See ``KVCache.move_tokens``."""
        self.cache.move_tokens(self.model.ops, sources, targets)

    def _prepare(self, plan: StepPlan) -> StepBatch:
        """The step's tensors."""
        numbers = Numbers(plan, self.block_size, _WIDTH)
        columns = [numbers.tokens, numbers.positions, numbers.slots, numbers.query_start, numbers.context_len]
        columns += numbers.block_table, numbers.logit_rows
        if numbers.trees or self._last is None or list(map(len, columns)) != list(map(len, self._last[0])):
            flat = [tensor_of(column) for column in columns]
            flat[5] = flat[5].view(-1, numbers.width)
            if numbers.trees:
                flat += map(tensor_of, numbers.tree_columns())
            batch = StepBatch(*flat)
            self._last = None if numbers.trees else (columns, batch)
        else:
            kept, batch = self._last
            for target, column in zip(kept, columns, strict=True):
                target[:] = column
        return batch


class Numbers:
    """The numbers of a step, as ``StepBatch`` has them.

    Args:
        plan: with at least one sequence.
        block_size: tokens of a block.
        width: the columns of the block table are a multiple of it.
        places: where tokens that are ``PENDING`` have been drawn: the row of each sequence in the step before.
    """

    __slots__ = (
        "tokens", "positions", "slots", "query_start", "context_len", "block_table", "logit_rows", "source", "width", "trees", "_plan",
    )  # fmt: skip

    def __init__(self, plan: StepPlan, block_size: int, width: int, places: dict[TokenSequence, int] | None = None) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        context_len: list[int] = []
        last: list[int] = []  # the row of each sequence's last token, drafted ones not counted
        size = block_size
        self._plan = plan
        self.width = width = -(-max([len(s.sequence.block_table) for s in plan.sequences]) // width) * width
        tables, unused = array("i"), array("i", [0]) * width
        self.trees = False
        for scheduled in plan.sequences:
            sequence, start, draft = scheduled.sequence, scheduled.start, scheduled.draft
            table = sequence.block_table
            context = start + scheduled.num_tokens
            tokens += sequence.tokens[start:context]
            positions += range(start, context)
            last.append(len(tokens) - 1)
            if draft:
                tokens += draft.tokens
                positions += (context - 1 + depth for depth in draft.depths()[1:])
                self.trees = self.trees or not draft.is_chain
                context += len(draft)
            for i in range(start, context):
                slots.append(table[i // size] * size + i % size)
            query_start.append(len(tokens))
            context_len.append(context)
            tables += table
            tables += unused[len(table) :]
        self.source: array[int] | None = None  # for each token the row of the step before that drew it, or -1
        if places is not None:
            self.source = array("i", [-1]) * len(tokens)
            for row, scheduled in zip(last, plan.sequences, strict=True):
                if tokens[row] == PENDING:
                    self.source[row], tokens[row] = places[scheduled.sequence], 0
        self.tokens, self.positions, self.slots = array("i", tokens), array("i", positions), array("i", slots)
        self.query_start, self.context_len, self.block_table = array("i", query_start), array("i", context_len), tables
        # Followers draw from the leader's row of logits: the same index once more for each.
        self.logit_rows = array("q", [last[row.scheduled] + row.node for row in plan.rows])

    def tree_columns(self) -> tuple[array[int], array[int]]:
        """``tree_start`` and ``ancestors`` of a step in which some draft is a tree: its root is the last of the sequence's own tokens."""
        tree_start, ancestors = array("i"), array("q")
        for scheduled in self._plan.sequences:
            is_tree = not scheduled.draft.is_chain
            tree_start.append(scheduled.end - 1 if is_tree else -1)
            ancestors.extend([0] * (scheduled.num_tokens - 1))
            ancestors.extend(scheduled.draft.ancestors() if is_tree else [0] * (1 + len(scheduled.draft)))
        return tree_start, ancestors
