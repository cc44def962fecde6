"""From a plan to rows of logits: builds the step's tensors and runs the model once."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from .columns import tensor_of
from .kv_cache import KVCache
from .models.batch import StepBatch
from .models.transformer import Transformer
from .plan import StepPlan

_WIDTH = 8  # the columns of a block table come in eights, so that a step is seldom wider than the one before


class Runner:
    """Runs plans of one model over one cache.

    A step of the same sizes as the one before, as steps of decoding are, writes its numbers into the same tensors, and is the same
    ``StepBatch``: then nothing is allocated, and whoever looks at a batch may keep what follows from its sizes and addresses.
    """

    def __init__(self, model: Transformer, cache: KVCache, block_size: int) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self._last: tuple[list[array[int]], StepBatch] | None = None  # the numbers of the last step, and its tensors over them

    def run(self, plan: StepPlan) -> Tensor | None:
        """Compute the plan's tokens; logits float32 ``[R, V]`` of ``plan.rows``, or None if no row needs any."""
        self.cache.copy_blocks(plan.copies)
        logits = self.model.forward_logits(self._prepare(plan), self.cache)
        return logits if plan.rows else None

    def move_tokens(self, sources: list[int], targets: list[int]) -> None:
        """See ``KVCache.move_tokens``."""
        self.cache.move_tokens(self.model.ops, sources, targets)

    def _prepare(self, plan: StepPlan) -> StepBatch:
        """The step's tensors."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        context_len: list[int] = []
        last: list[int] = []  # the row of each sequence's last token, drafted ones not counted
        size = self.block_size
        width = -(-max([len(s.sequence.block_table) for s in plan.sequences]) // _WIDTH) * _WIDTH
        tables, unused = array("i"), array("i", [0]) * width
        trees = False
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
                trees = trees or not draft.is_chain
                context += len(draft)
            for i in range(start, context):
                slots.append(table[i // size] * size + i % size)
            query_start.append(len(tokens))
            context_len.append(context)
            tables += table
            tables += unused[len(table) :]
        # Followers draw from the leader's row of logits: the same index once more for each.
        rows = [last[row.scheduled] + row.node for row in plan.rows]
        columns = [array("i", column) for column in (tokens, positions, slots, query_start, context_len)]
        columns += tables, array("q", rows)
        if trees or self._last is None or list(map(len, columns)) != list(map(len, self._last[0])):
            flat = [tensor_of(column) for column in columns]
            flat[5] = flat[5].view(-1, width)
            batch = StepBatch(*flat, **(_trees(plan) if trees else {}))
            self._last = None if trees else (columns, batch)
        else:
            kept, batch = self._last
            for target, column in zip(kept, columns, strict=True):
                target[:] = column
        return batch


def _trees(plan: StepPlan) -> dict[str, Tensor]:
    """``tree_start`` and ``ancestors`` of a step in which some draft is a tree: its root is the last of the sequence's own tokens."""
    tree_start: list[int] = []
    ancestors: list[int] = []
    for scheduled in plan.sequences:
        is_tree = not scheduled.draft.is_chain
        tree_start.append(scheduled.end - 1 if is_tree else -1)
        ancestors += [0] * (scheduled.num_tokens - 1)
        ancestors += scheduled.draft.ancestors() if is_tree else [0] * (1 + len(scheduled.draft))
    return {"tree_start": torch.tensor(tree_start, dtype=torch.int32), "ancestors": torch.tensor(ancestors, dtype=torch.int64)}
