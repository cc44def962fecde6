"""Steps on a GPU that nobody waits for: one copy of numbers to the device, one graph of kernels, and the tokens' way back.

The numbers of a step (tokens, slots, block tables, what its rows are drawn by) lie side by side in one buffer of the host and are copied to
the device at once, where each is a view. Steps that decode are padded to sizes of a ladder; for each of those the kernels of a whole step,
from the tokens to the tokens, are captured once as a graph and then replayed. Tokens that the step before has drawn are fed to the next on
the device, so that the host may start a step before it knows them (``can_feed``), and copies of them are on their way to the host while it
does.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decode.sample import FILTERED, FUSED, PREPARED, drawn_by, drawn_of, law_columns
from .device import Graph, Mark, StepDevice
from .kv_cache import KVCache
from .models.batch import StepBatch
from .models.transformer import Transformer
from .plan import StepPlan
from .request import Drawn, Lookahead, Request, TokenSequence
from .runner import Numbers, Runner, Started

# What becomes of a step's rows beside FUSED and FILTERED: logits, for whoever draws from them; or there are none.
LOGITS, NONE = "logits", "none"

_SPLIT = 512  # tokens; tables of a graph have room for this many times a power of four: attention launches programs for what could be there
_ALIGNMENT = 16  # in words: kernels are compiled for how their tensors are aligned, and should not be anew for every size of a step
_RING = 2  # as many steps can be on their way, the one that the host waits for and the one after it


class Sizes(NamedTuple):
    """What the tensors of a step, and so its kernels, depend on besides numbers in memory."""

    sequences: int
    tokens: int
    rows: int
    blocks: int  # columns of the block table
    trees: bool
    draws: str


def ladder(n: int) -> int:
    """The size that ``n`` sequences or tokens are padded to: 1, 2, 4, 8, 16, 24, ... 64, 80, ... 128, 160, ..."""
    if n <= 8:
        return 1 << (n - 1).bit_length()
    step = max(8, 1 << ((n - 1).bit_length() - 3))
    return -(-n // step) * step


class _Column(NamedTuple):
    name: str
    dtype: torch.dtype
    start: int  # in words of 32 bits
    words: int


def _columns(s: Sizes) -> list[_Column]:
    """How the numbers of a step lie in the buffer."""
    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    drawn = s.rows if s.draws in (FUSED, FILTERED) else 0
    sizes: list[tuple[str, torch.dtype, int]] = [("logit_rows", i64, s.rows), ("seed", i64, drawn)]
    if s.trees:
        sizes += [("ancestors", i64, s.tokens), ("tree_start", i32, s.sequences)]
    sizes += [(name, i32, s.tokens) for name in ("tokens", "positions", "slots", "source")]
    sizes += [("query_start", i32, s.sequences + 1), ("context_len", i32, s.sequences), ("block_table", i32, s.sequences * s.blocks)]
    sizes += [(name, f32, drawn) for name in ("temperature", "top_p", "min_p")]
    sizes += [(name, i32, drawn) for name in ("top_k", "position", "stream")]
    columns, start = [], 0
    for name, dtype, size in sizes:
        words = size * dtype.itemsize // 4
        columns.append(_Column(name, dtype, start, words))
        start += -(-words // _ALIGNMENT) * _ALIGNMENT
    return columns


def num_words(sizes: Sizes) -> int:
    """Of the numbers of a step."""
    last = _columns(sizes)[-1]
    return last.start + last.words


@dataclass
class _Shape:
    """Steps of some sizes: where their numbers lie, and how often there was one."""

    columns: list[_Column]
    views: dict[str, Tensor]
    batch: StepBatch
    num_words: int
    uses: int = 0
    graph: Graph | None = None


@dataclass
class _Outputs:
    """The tokens of a step's rows and what belongs to them, on the device or on the host."""

    tokens: Tensor
    logprobs: Tensor
    processed_logprobs: Tensor
    status: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.logprobs, self.processed_logprobs, self.status


@dataclass
class _Draw:
    """See ``runner.Draw``."""

    outputs: _Outputs  # on the host
    mark: Mark
    rows: Sequence[Request | Lookahead]
    _drawn: list[Drawn] = field(default_factory=list)

    def result(self) -> list[Drawn]:
        self.mark.wait()
        n = len(self.rows)
        return drawn_of([t[:n].numpy() for t in self.outputs.tensors], self.rows)


class GraphRunner(Runner):
    """Runs plans of one model over one cache on a GPU.

    Args:
        model, cache, block_size: as of ``Runner``.
        device: what they are on.
        max_batch_size: most sequences of a step.
        max_batch_tokens: most query tokens of a step, drafted ones included.
        max_blocks: longest block table.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        block_size: int,
        device: StepDevice,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_blocks: int,
    ) -> None:
        super().__init__(model, cache, block_size)
        self._device = device
        self._split = max(1, _SPLIT // block_size)
        sequences, tokens = ladder(max_batch_size + 1), ladder(max_batch_tokens + 1)
        # Rows: one for each token, and for each follower that draws from its leader's.
        largest = Sizes(sequences, tokens, ladder(max_batch_tokens + max_batch_size), self._width(max_blocks), True, FILTERED)
        words = num_words(largest)
        self._buffer = device.memory(words, torch.int32)
        self._staging = [device.host_memory(words, torch.int32) for _ in range(_RING)]
        self._outputs = _outputs(device.memory, largest.rows)
        self._results = [_outputs(device.host_memory, largest.rows) for _ in range(_RING)]
        self._read: list[Mark | None] = [None] * _RING  # when the device has read what was staged there
        self._turn = 0
        self._shapes: dict[Sizes, _Shape] = {}
        self._addresses = model.addresses()  # of weights in the graphs
        self._places: dict[TokenSequence, int] = {}  # the rows of the last step whose tokens the device has

    def can_feed(self, started: Started) -> bool:
        """Whether the step after ``started`` can begin before the host knows its tokens. Rows that the device draws have no list that could
        depend on them; of a draft the host must know what holds."""
        return started.draw is not None and not any(scheduled.draft for scheduled in started.plan.sequences)

    def start(self, plan: StepPlan) -> Started:
        sizes, numbers = self._sizes(plan)
        again = self._comes_again(plan)
        shape = self._shape_of(sizes, again)
        results, staging = self._results[self._turn], self._free_staging()
        self._write(shape, sizes, plan, numbers, staging)
        logits = self._launch(sizes, again, plan.copies, staging[: shape.num_words])
        if sizes.draws not in (FUSED, FILTERED):
            self._places = {}
            return Started(plan, None if logits is None else logits[: len(plan.rows)])
        rows = len(plan.rows)
        for target, source in zip(results.tensors, self._outputs.tensors, strict=True):
            self._device.copy(target[:rows], source[:rows])
        self._places = {sequence: r for r, sequence in enumerate(plan.drawing)}
        return Started(plan, logits, _Draw(results, self._device.mark(), plan.drawing))

    def run(self, plan: StepPlan) -> Tensor | None:
        """Logits alone, of a step that no token need be fed to."""
        return self.start(plan).logits

    def _free_staging(self) -> Tensor:
        """Memory for the numbers of the next step to be launched, once the device has read what was there."""
        read = self._read[self._turn]
        if read is not None:
            read.wait()
        return self._staging[self._turn]

    def _launch(self, sizes: Sizes, again: bool, copies: list[tuple[int, int]], words: Tensor) -> Tensor | None:
        """The device's work of a step, from its numbers on the host to its rows of logits, if it has any."""
        self.cache.copy_blocks(self.model.ops, copies)
        shape = self._shape_of(sizes, again)
        self._device.copy(self._buffer[: shape.num_words], words)
        self._read[self._turn] = self._device.mark()
        self._turn = (self._turn + 1) % _RING
        return self._run(shape, sizes, again)

    def _run(self, shape: _Shape, sizes: Sizes, again: bool) -> Tensor | None:
        """The kernels of a step. A graph is captured when sizes come for the second time: by then all its kernels are compiled."""
        if again and (addresses := self.model.addresses()) != self._addresses:
            self._addresses = addresses
            for other in self._shapes.values():
                other.graph, other.uses = None, 0
        compute = functools.partial(_compute, self.model, self.cache, shape.batch, shape.views, self._outputs, sizes.draws)
        shape.uses += 1
        if shape.graph is None and again and shape.uses > 1:
            shape.graph = self._device.capture(compute)
        if shape.graph is None:
            return compute()
        shape.graph.replay()
        return shape.graph.result

    @staticmethod
    def _comes_again(plan: StepPlan) -> bool:
        """Whether a step is one of decoding, each token with a row of logits, drafted ones too: then others of its sizes follow."""
        return all(s.num_tokens == 1 and len(s.rows) == 1 for s in plan.sequences)

    def _width(self, blocks: int) -> int:
        """Columns of a block table of ``blocks``."""
        width = self._split
        while width < blocks:
            width *= 4
        return width

    def _sizes(self, plan: StepPlan) -> tuple[Sizes, Numbers]:
        numbers = Numbers(plan, self.block_size, 1, self._places)
        sequences, tokens, rows = len(plan.sequences), len(numbers.tokens), len(plan.rows)
        if self._comes_again(plan):
            rows = tokens = ladder(tokens)
            # Tokens of padding belong to sequences of padding.
            sequences = ladder(sequences if tokens == len(numbers.tokens) else sequences + 1)
        return Sizes(sequences, tokens, rows, self._width(numbers.width), numbers.trees, _draws(plan)), numbers

    def _shape_of(self, sizes: Sizes, again: bool) -> _Shape:
        shape = self._shapes.get(sizes) or self._shape(sizes)
        if again:
            self._shapes[sizes] = shape
        return shape

    def _shape(self, sizes: Sizes) -> _Shape:
        columns = _columns(sizes)
        views = {c.name: self._buffer[c.start : c.start + c.words].view(c.dtype) for c in columns}
        given = {f.name: views[f.name] for f in fields(StepBatch) if f.name in views}
        given["block_table"] = views["block_table"].view(sizes.sequences, sizes.blocks)
        batch = StepBatch(**given)
        return _Shape(columns, views, batch, columns[-1].start + columns[-1].words)

    def _write(self, shape: _Shape, sizes: Sizes, plan: StepPlan, numbers: Numbers, staging: Tensor) -> None:
        """The numbers of a step into memory of the host. A sequence of padding has the tokens of padding, which write nothing; they read
        what lies in the first block, and nobody reads what becomes of them."""
        own_tokens, own_sequences = len(numbers.tokens), len(plan.sequences)
        assert numbers.source is not None
        tokens, sequences = sizes.tokens - own_tokens, sizes.sequences - own_sequences
        zeros = array("i", [0])
        given: dict[str, array[Any]] = {
            "logit_rows": numbers.logit_rows + array("q", [0]) * (sizes.rows - len(numbers.logit_rows)),
            "tokens": numbers.tokens + zeros * tokens,
            "positions": numbers.positions + zeros * tokens,
            "slots": numbers.slots + array("i", [-1]) * tokens,
            "source": numbers.source + array("i", [-1]) * tokens,
            "query_start": numbers.query_start + array("i", [sizes.tokens]) * sequences,
            "context_len": numbers.context_len + array("i", [tokens]) * min(sequences, 1) + zeros * (sequences - 1),
        }
        if numbers.trees:
            tree_start, ancestors = numbers.tree_columns()
            given["tree_start"] = tree_start + array("i", [-1]) * sequences
            given["ancestors"] = ancestors + array("q", [0]) * tokens
        if sizes.draws in (FUSED, FILTERED):
            law = law_columns(plan.drawing, array("i", [row.num_tokens for row in plan.drawing]))
            names = ("temperature", "top_k", "top_p", "min_p", "seed", "position", "stream")
            for name, column in zip(names, law, strict=True):
                given[name] = column + array(column.typecode, [0]) * (sizes.rows - len(column))
        words = staging.numpy()
        for name, _, start, size in shape.columns:
            if name == "block_table":
                table = words[start : start + size].reshape(sizes.sequences, sizes.blocks)
                table[:own_sequences, : numbers.width] = np.frombuffer(numbers.block_table, dtype=np.int32).reshape(own_sequences, -1)
                table[own_sequences:] = 0
            elif size:
                words[start : start + size] = np.frombuffer(given[name], dtype=np.int32)


def _draws(plan: StepPlan) -> str:
    """How the rows of a plan become tokens."""
    if not plan.rows:
        return NONE
    if plan.beams or any(s.draft and s.request.params.verification == "block" for s in plan.sequences):
        return LOGITS  # block verification takes its masses from them
    drawn = drawn_by(plan.drawing)
    return LOGITS if drawn == PREPARED else drawn


def _outputs(memory: Any, rows: int) -> _Outputs:
    f32 = torch.float32
    return _Outputs(memory(rows, torch.int64), memory(rows, f32), memory(rows, f32), memory(rows, torch.int32))


@torch.no_grad()
def _compute(
    model: Transformer, cache: KVCache, batch: StepBatch, views: dict[str, Tensor], outputs: _Outputs, draws: str
) -> Tensor | None:
    """The kernels of a step: what is captured. It must depend on the sizes of its tensors alone."""
    model.ops.feed_tokens(batch.tokens, views["source"], outputs.tokens)
    hidden = model.hidden(batch, cache)
    if draws == NONE:
        return None
    if draws == FUSED:
        result, logits = model.draw(hidden, *(views[name] for name in ("temperature", "seed", "position", "stream"))), None
    else:
        logits = model.logits(hidden)
        if draws == LOGITS:
            return logits
        law = (views[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position", "stream"))
        result = model.sampled(logits, *law)
    assert result.logprobs is not None and result.processed_logprobs is not None
    found = (result.tokens, result.logprobs, result.processed_logprobs, result.status)
    for target, source in zip(outputs.tensors, found, strict=True):
        target[: len(source)].copy_(source)
    return logits
