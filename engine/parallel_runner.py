"""Steps of a model in parts: rank 0 tells the others each step before it runs it, and they run the same (see ``parallel``).

All that touches the cache reaches every rank in one order: tokens moved after the last step's verification, then block copies, then the
step. Two broadcasts tell it: how many of what, and the numbers themselves, all int32.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .kv_cache import KVCache
from .models.batch import StepBatch
from .models.transformer import Transformer
from .parallel import Parallel
from .plan import StepPlan
from .runner import Runner

_SIZES = 7  # tokens (0: no step comes any more), sequences, columns of the block table, rows, is a tree, copies, moves


class LeadingRunner(Runner):
    """The runner of rank 0."""

    def __init__(self, model: Transformer, cache: KVCache, block_size: int, parallel: Parallel) -> None:
        super().__init__(model, cache, block_size)
        self.parallel = parallel
        self._moves: list[tuple[int, int]] = []  # since the last step

    def run(self, plan: StepPlan) -> Tensor | None:
        """As ``Runner.run``, with all ranks. An error in here is the end of all their work together."""
        batch = self._prepare(plan)
        with self.parallel.together():
            self._tell(batch, plan.copies)
            self.cache.copy_blocks(plan.copies)
            logits = self.model.forward_logits(batch, self.cache)
        return logits if plan.rows else None

    def move_tokens(self, sources: list[int], targets: list[int]) -> None:
        super().move_tokens(sources, targets)
        self._moves += zip(sources, targets, strict=True)

    def _tell(self, batch: StepBatch, copies: list[tuple[int, int]]) -> None:
        trees = () if batch.tree_start is None or batch.ancestors is None else (batch.tree_start, batch.ancestors.view(torch.int32))
        parts = (
            batch.tokens, batch.positions, batch.slots, batch.query_start, batch.context_len, batch.block_table, batch.logit_rows.int(),
            *trees, torch.tensor(copies, dtype=torch.int32), torch.tensor(self._moves, dtype=torch.int32),
        )  # fmt: skip
        sizes = (len(batch.tokens), *batch.block_table.shape, len(batch.logit_rows), bool(trees), len(copies), len(self._moves))
        self.parallel.tell(torch.tensor(sizes, dtype=torch.int32), torch.cat([part.flatten() for part in parts]))
        self._moves = []


def follow(runner: Runner, parallel: Parallel) -> None:
    """On the other ranks: run what rank 0 tells, with ``runner``'s model and cache, until it says that no more comes.

    Raises what goes wrong here, and ``RuntimeError`` if another rank has gone.
    """
    sizes = torch.empty(_SIZES, dtype=torch.int32)
    while True:
        with parallel.together():
            parallel.hear(sizes, patient=True)
            tokens, sequences, width, rows, is_tree, num_copies, num_moves = sizes.tolist()
            if not tokens:
                break
            lengths = [tokens, tokens, tokens, sequences + 1, sequences, sequences * width, rows]
            lengths += [sequences, 2 * tokens] if is_tree else [0, 0]
            lengths += [2 * num_copies, 2 * num_moves]
            numbers = torch.empty(sum(lengths), dtype=torch.int32)
            parallel.hear(numbers)
            *flat, table, logit_rows, tree_start, ancestors, copies, moves = numbers.split(lengths)
            batch = StepBatch(
                *flat,
                table.view(-1, width),
                logit_rows.long(),
                tree_start if is_tree else None,
                ancestors.clone().view(torch.int64) if is_tree else None,
            )
            if num_moves:
                runner.move_tokens(*moves.view(-1, 2).T.tolist())
            runner.cache.copy_blocks(copies.view(-1, 2).tolist())
            runner.model.forward_logits(batch, runner.cache)
    leave(parallel)


def leave(parallel: Parallel) -> None:
    """End the work of all ranks together; on rank 0 it tells the others, as far as they are there, to come here too."""
    if parallel.rank == 0:
        with suppress(RuntimeError), parallel.together():
            parallel.tell(torch.zeros(_SIZES, dtype=torch.int32))
            parallel.close()  # before another thread can run a step
    parallel.close()


def agree(parallel: Parallel, config: Any, num_blocks: int, **settings: Any) -> int:
    """How many blocks every rank's cache can have: as many as the smallest. ``ValueError``, on all ranks, where two ranks do not have the
    same ``config`` (a dataclass) and ``settings``."""
    own = {**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **settings}
    given = parallel.agree((num_blocks, own))
    first = given[0][1]
    for rank, (_, other) in enumerate(given):
        for name, value in other.items():
            if value != first[name]:
                raise ValueError(f"rank {rank} has {name} {value!r:.100} and rank 0 {first[name]!r:.100}; all ranks must have the same")
    return min(blocks for blocks, _ in given)
