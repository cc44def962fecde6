"""``beam_select`` on a GPU in Triton: the launches and their memory (contract in ``api``; the kernels in ``beam_rows``, ``beam_groups``).

    beam_scan       rows x chunks    the read of the rows: maxima of sub-blocks
    beam_filter     rows             status; the threshold of top-k
    beam_mass       rows x chunks    mass of what is kept
    sample_adjust   rows             only with lists: penalties, bias, end tokens
    beam_best       rows x chunks    the best score of each sub-block
    beam_bound      groups           which sub-blocks can hold one of the best C
    beam_gather     rows x chunks    their continuations
    beam_finish     groups           the best C of those, in order

As in ``sample``, the grids depend on shapes alone, every decision is made on the device, and calls can be captured in a CUDA graph; all
arithmetic is exact or rounded one operation at a time, all sums are of integers, so that the results are the oracle's to the bit.
Parameters out of range give their row STATUS_BAD_PARAMETER, a ``group_start`` that does not rise from 0 to R all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks_sample
from ..api import BeamResult, EndTokens, LogitBias, Penalties
from . import sample_row as row
from .beam_groups import beam_bound, beam_finish, beam_gather
from .beam_rows import beam_best, beam_filter, beam_mass, beam_scan
from .launch import CHUNK, Launch, check_device, check_same_device, launch, list_arguments, power_of_two, run
from .sample_adjust import sample_adjust


def constants(vocab_size: int) -> dict[str, int]:
    """What the kernels are compiled for: tokens per sub-block SUB (64, and more where V is above 2^16), their number NSUB (at most 1024)
    and the number of chunks MAX_CHUNKS, both as powers of two."""
    sub = max(64, power_of_two(vocab_size) // 1024)
    chunks = -(-vocab_size // CHUNK)
    return {"SUB": sub, "NSUB": power_of_two(chunks * (CHUNK // sub)), "MAX_CHUNKS": power_of_two(chunks)}


class BeamWorkspace:
    """Memory for calls of ``beam_select`` with up to ``max_rows`` rows of ``vocab_size`` logits, ``max_groups`` groups and
    ``max_candidates`` candidates: scratch, and the results, which the next call with the same workspace overwrites. Calls with it allocate
    nothing.

    ``lists=False`` leaves out what penalties, bias and end tokens need: ``4.25 * max_rows * vocab_size`` bytes. Two calls that may overlap
    need a workspace each.
    """

    def __init__(
        self, max_rows: int, vocab_size: int, max_groups: int, max_candidates: int, device: torch.device | str, *, lists: bool = True
    ) -> None:
        if max_rows < 0 or not 1 <= vocab_size <= checks_sample.MAX_VOCAB or max_groups < 0 or max_candidates < 1:
            raise ValueError(
                f"a workspace needs max_rows >= 0, vocab_size from 1 to 2^22, max_groups >= 0 and max_candidates >= 1, "
                f"got {max_rows}, {vocab_size}, {max_groups} and {max_candidates}"
            )
        self.max_rows, self.vocab_size, self.max_groups, self.max_candidates = max_rows, vocab_size, max_groups, max_candidates
        self.lists, self.device = lists, torch.device(device)
        self.constants = constants(vocab_size)
        self.chunks = -(-vocab_size // CHUNK)
        most = ((1 << 31) - 1) // self._padded()
        if max_rows > most:
            raise ValueError(f"beam_select takes at most {most} rows of {vocab_size} logits in one call on a GPU, got {max_rows}")
        subs = self.constants["NSUB"]

        def empty(size: int, *shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((size, *shape), dtype=dtype, device=self.device)

        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self.values = empty(max_rows, vocab_size, dtype=f32) if lists else None
        self.touched = empty(max_rows, -(-vocab_size // 16), dtype=i32) if lists else None
        self.listed = empty(max_rows, dtype=i32) if lists else None
        self.maxima = empty(max_rows, subs, dtype=f32)
        self.chunk_nan = empty(max_rows, self.chunks, dtype=i32)
        self.selected = empty(max_rows, subs, dtype=i32)
        self.state = empty(max_rows, row.STATE.value, dtype=i64)
        self.best = empty(max_rows, self.subs_of_row(), dtype=i64)
        self.bounds = empty(max_rows, dtype=i64)
        self.row_group = empty(max_rows, dtype=i32)
        self.counts = empty(max_groups, dtype=i32)
        room = max_groups * self.room(max_rows, max_candidates)
        self.keys = empty(room, dtype=i64)
        self.key_scores = empty(room, dtype=f32)
        self.key_logprobs = empty(room, dtype=f32)
        candidates = max_groups * max_candidates
        self.scores = empty(candidates, dtype=f32)
        self.tokens = empty(candidates, dtype=i64)
        self.parents = empty(candidates, dtype=i32)
        self.logprobs = empty(candidates, dtype=f32)
        self.status = empty(max_rows, dtype=i32)

    def _padded(self) -> int:
        """V, and more where that makes it a power of two."""
        return self.constants["SUB"] * self.constants["NSUB"]

    def subs_of_row(self) -> int:
        return self.chunks * (CHUNK // self.constants["SUB"])

    def room(self, rows: int, num_candidates: int) -> int:
        """The most continuations of a group that ``beam_gather`` writes."""
        return min(2 * num_candidates * self.constants["SUB"], rows * self._padded())

    def check(self, rows: int, vocab_size: int, groups: int, num_candidates: int, device: torch.device, lists: bool) -> None:
        """Raise ``ValueError`` unless a call of these sizes can use this workspace."""
        if self.vocab_size != vocab_size or self.max_rows < rows:
            raise ValueError(f"workspace is for up to {self.max_rows} rows of {self.vocab_size} logits, got {rows} rows of {vocab_size}")
        check_same_device(self.device, device)
        if groups > self.max_groups or num_candidates > self.max_candidates:
            raise ValueError(
                f"workspace is for up to {self.max_groups} groups and {self.max_candidates} candidates, "
                f"got {groups} groups and num_candidates {num_candidates}"
            )
        if lists and not self.lists:
            raise ValueError("workspace was made with lists=False, so penalties, bias and end_tokens must be None")


def beam_select(
    logits: Tensor,
    scores: Tensor,
    group_start: Tensor,
    num_candidates: int,
    temperature: Tensor,
    top_k: Tensor,
    position: Tensor,
    *,
    seed: Tensor | None = None,
    stream: Tensor | None = None,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    workspace: Any = None,
) -> BeamResult:
    """See ``api.beam_select``. With a workspace the results are views of it."""
    checks_sample.beam_select(
        logits, scores, group_start, num_candidates, temperature, top_k, position, seed, stream, penalties, bias, end_tokens, allowed
    )  # fmt: skip
    check_device(logits.device)
    rows, vocab = logits.shape
    groups = len(group_start) - 1
    lists = penalties is not None or bias is not None or end_tokens is not None
    if workspace is None:
        workspace = BeamWorkspace(rows, vocab, groups, num_candidates, logits.device, lists=lists)
    elif not isinstance(workspace, BeamWorkspace):
        raise TypeError(f"workspace must be a triton.BeamWorkspace or None, got {type(workspace).__name__}")
    else:
        workspace.check(rows, vocab, groups, num_candidates, logits.device, lists)
    run(
        launches(
            workspace, logits, scores, group_start, num_candidates, temperature, top_k, position, seed, stream, penalties, bias, end_tokens,
            allowed,
        ),
        logits.device,
    )  # fmt: skip
    w, size, shape = workspace, groups * num_candidates, (groups, num_candidates)
    best, tokens, parents, logprobs = (t[:size].view(shape) for t in (w.scores, w.tokens, w.parents, w.logprobs))
    return BeamResult(best, tokens, parents, logprobs, w.status[:rows])


def launches(
    w: BeamWorkspace,
    logits: Tensor,
    scores: Tensor,
    group_start: Tensor,
    num_candidates: int,
    temperature: Tensor,
    top_k: Tensor,
    position: Tensor,
    seed: Tensor | None,
    stream: Tensor | None,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
) -> Sequence[Launch]:
    """The kernels of a call in order, each with its grid and arguments."""
    rows, vocab = logits.shape
    groups = len(group_start) - 1
    lists = penalties is not None or bias is not None or end_tokens is not None
    wide, narrow, grouped = (rows, w.chunks), (rows,), (groups,)
    sizes = {"SUB": w.constants["SUB"], "NSUB": w.constants["NSUB"]}
    matrix = {"logits": logits, "row_stride": logits.stride(0), "vocab": vocab}
    z = matrix | {"temperature": temperature, "maxima": w.maxima} | sizes
    of_groups = {"group_start": group_start, "rows": rows}
    state = {"state": w.state}
    changed = {
        "values": w.values if lists else None,
        "touched": w.touched if lists else None,
        "listed": w.listed if lists else None,
    }
    # What `load_continuations` takes.
    draw = {"seed": seed, "position": position, "stream": stream}
    continuations = matrix | state | draw | changed | sizes | {"scores": scores, "temperature": temperature, "allowed": allowed}
    found = {"room": w.room(rows, num_candidates), "counts": w.counts}
    found |= {"keys": w.keys, "key_scores": w.key_scores, "key_logprobs": w.key_logprobs}
    bounds = {"best": w.best, "bounds": w.bounds, "row_group": w.row_group}
    calls = [
        launch(beam_scan, wide, z, {"chunk_nan": w.chunk_nan}),
        launch(
            beam_filter, narrow, z, of_groups, state, {"groups": groups, "scores": scores, "top_k": top_k},
            {"chunks": w.chunks, "MAX_CHUNKS": w.constants["MAX_CHUNKS"]},
            {"chunk_nan": w.chunk_nan, "selected": w.selected, "status": w.status},
        ),
        launch(beam_mass, wide, z, state),
    ]  # fmt: skip
    if lists:
        adjustments = list_arguments(penalties, bias, end_tokens) | {"position": position, "temperature": temperature}
        calls.append(launch(sample_adjust, narrow, matrix, adjustments, state, changed))
    results = {"best_scores": w.scores, "best_tokens": w.tokens, "best_parents": w.parents, "best_logprobs": w.logprobs}
    calls += [
        launch(beam_best, wide, continuations, {"maxima": w.maxima, "best": w.best, "status": w.status}),
        launch(
            beam_bound, grouped, of_groups, bounds, {"num_candidates": num_candidates, "counts": w.counts, "SUBS_OF_ROW": w.subs_of_row()}
        ),
        launch(beam_gather, wide, continuations, bounds, found),
        launch(beam_finish, grouped, found, results, {"num_candidates": num_candidates}, sizes),
    ]
    return calls
