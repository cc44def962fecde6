"""From a plan to rows of logits: builds the step's tensors and runs the model once."""

from __future__ import annotations

import torch
from torch import Tensor

from .kv_cache import KVCache
from .models.batch import StepBatch
from .models.transformer import Transformer
from .scheduler import StepPlan


class Runner:
    """Runs plans of one model over one cache."""

    def __init__(self, model: Transformer, cache: KVCache, block_size: int) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size

    def run(self, plan: StepPlan) -> Tensor | None:
        """Compute the plan's tokens; logits float32 ``[R, V]`` of ``plan.rows``, or None if no row needs any."""
        self.cache.copy_blocks(plan.copies)
        batch = self._batch(plan)
        logits = self.model.forward_logits(batch, self.cache)
        return logits if plan.rows else None

    def _batch(self, plan: StepPlan) -> StepBatch:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        context_len: list[int] = []
        size = self.block_size
        width = max(len(s.sequence.block_table) for s in plan.sequences)
        tables: list[list[int]] = []
        trees = False
        for scheduled in plan.sequences:
            start, end, draft = scheduled.start, scheduled.end, scheduled.draft
            table = scheduled.sequence.block_table
            tokens += scheduled.sequence.tokens[start:end]
            positions += range(start, end)
            if draft:
                tokens += draft.tokens
                positions += (end - 1 + depth for depth in draft.depths()[1:])
                trees = trees or not draft.is_chain
            context = end + len(draft)
            slots += [table[i // size] * size + i % size for i in range(start, context)]
            query_start.append(len(tokens))
            context_len.append(context)
            tables.append(table + [0] * (width - len(table)))
        return StepBatch(
            tokens=torch.tensor(tokens, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int32),
            query_start=torch.tensor(query_start, dtype=torch.int32),
            context_len=torch.tensor(context_len, dtype=torch.int32),
            block_table=torch.tensor(tables, dtype=torch.int32),
            # Followers draw from the leader's row of logits: the same index once more for each.
            logit_rows=torch.tensor(
                [query_start[row.scheduled] + plan.sequences[row.scheduled].num_tokens - 1 + row.node for row in plan.rows],
                dtype=torch.int64,
            ),
            **(_trees(plan) if trees else {}),
        )


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
