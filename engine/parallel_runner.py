"""Steps of a model in parts: rank 0 tells the others each step before it launches it, and they launch the same (see ``parallel``).

What is told is what a step is to the device: its sizes, and the buffer of its numbers as it lies in the host's memory. All that touches the
cache reaches every rank in one order: tokens moved after the last step's verification, then block copies, then the step. Tokens that the
device draws are known to every rank, which feeds them to its next step itself; all else that is decided is rank 0's alone.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .decode.sample import FILTERED, FUSED
from .graph_runner import LOGITS, NONE, GraphRunner, Sizes, num_words
from .parallel import Parallel

_DRAWS = (FUSED, FILTERED, LOGITS, NONE)
_HEADER = len(Sizes._fields) + 3  # sizes, whether they come again, numbers of block copies and of moved tokens


class LeadingRunner(GraphRunner):
    """The runner of rank 0. An error while ranks work together is the end of all their work (``Parallel.together``)."""

    _moves: list[tuple[int, int]]  # since the last step

    def __init__(self, parallel: Parallel, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parallel = parallel
        self._moves = []

    def move_tokens(self, sources: list[int], targets: list[int]) -> None:
        super().move_tokens(sources, targets)
        self._moves += zip(sources, targets, strict=True)

    def _launch(self, sizes: Sizes, again: bool, copies: list[tuple[int, int]], words: Tensor) -> Tensor | None:
        with self.parallel.together():
            moves, self._moves = self._moves, []
            draws = _DRAWS.index(sizes.draws)
            header = (*sizes._replace(draws=draws), again, len(copies), len(moves))  # type: ignore[arg-type]
            pairs = torch.tensor([*moves, *copies], dtype=torch.int32).flatten()
            self.parallel.tell(torch.tensor(header, dtype=torch.int32), torch.cat([words, pairs]))
            return super()._launch(sizes, again, copies, words)


class FollowingRunner(GraphRunner):
    """The runner of another rank."""

    def __init__(self, parallel: Parallel, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parallel = parallel

    def follow(self) -> None:
        """Run what rank 0 tells until it says that no more comes. Raises what goes wrong here; ``ConnectionError`` if another has gone."""
        header = torch.empty(_HEADER, dtype=torch.int32)
        while True:
            with self.parallel.together():
                self.parallel.hear(header, patient=True)
                *shape, draws, again, num_copies, num_moves = header.tolist()
                sequences, tokens, rows, blocks, trees = shape
                if not tokens:
                    break
                sizes = Sizes(sequences, tokens, rows, blocks, bool(trees), _DRAWS[draws])
                n = num_words(sizes)
                numbers = torch.empty(n + 2 * (num_moves + num_copies), dtype=torch.int32)
                self.parallel.hear(numbers)
                pairs = numbers[n:].view(-1, 2).tolist()
                if num_moves:
                    self.move_tokens(*map(list, zip(*pairs[:num_moves], strict=True)))
                words = self._free_staging()[:n]
                words.copy_(numbers[:n])
                self._launch(sizes, bool(again), [(source, target) for source, target in pairs[num_moves:]], words)
        leave(self.parallel)


def leave(parallel: Parallel) -> None:
    """End the work of all ranks together; on rank 0 it tells the others, as far as they are there, to come here too."""
    if parallel.rank == 0:
        with suppress(RuntimeError, ConnectionError), parallel.together():
            parallel.tell(torch.zeros(_HEADER, dtype=torch.int32))
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
