"""``sample`` on a GPU in Triton: the launches and their memory (contract in ``api``; one idea per ``sample_*`` module).

    sample_adjust   rows             only with lists: penalties, bias, end tokens
    sample_scan     rows x chunks    the read of the row: maxima of sub-blocks
    sample_settle   rows             status; rows that a few candidates decide, which are nearly all, are done here
    sample_masses   rows x chunks    twice } the threshold of the others,
    sample_gather   rows x chunks          } top-p without top-k or top-k above 256 as a rule:
    sample_resolve  rows                   } a program whose row is done ends at once
    sample_race     rows x chunks    the scores of the others' kept tokens
    sample_finish   rows             their tokens; log-probabilities

The grids depend on shapes alone and every decision is made on the device, so nothing waits for the host and the calls can be captured in
a CUDA graph: replays read the parameters, lists, mask and logits anew from the tensors of the capture. A parameter out of range gives its
row STATUS_BAD_PARAMETER. All arithmetic that decides a token is exact or rounded one operation at a time (``enable_fp_fusion=False``),
all sums that do are of integers, and all ties go to the lower token, so the token is the oracle's to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks_sample
from ..api import EndTokens, LogitBias, Penalties, SampleResult
from . import sample_row as row
from .launch import CHUNK, Launch, check_device, check_same_device, launch, list_arguments, power_of_two, run
from .sample_adjust import sample_adjust
from .sample_race import sample_finish, sample_race
from .sample_scan import sample_scan
from .sample_search import sample_gather, sample_masses, sample_resolve
from .sample_settle import sample_settle

MASS_CHUNK = row.MASS_CHUNK.value


def constants(vocab_size: int) -> dict[str, int]:
    """What the kernels are compiled for: tokens per sub-block SUB (64, and more where V is above 2^18), their number NSUB and the number
    of chunks MAX_CHUNKS, both as powers of two."""
    sub = max(64, power_of_two(vocab_size) // 4096)
    chunks = -(-vocab_size // CHUNK)
    return {"SUB": sub, "NSUB": power_of_two(chunks * (CHUNK // sub)), "MAX_CHUNKS": power_of_two(chunks)}


class Workspace:
    """Memory for calls of ``sample`` with up to ``max_rows`` rows of ``vocab_size`` logits: scratch, and the results, which the next call
    with the same workspace overwrites. Calls with it allocate nothing.

    ``max_logprobs``: the largest ``logprobs`` of those calls. ``lists=False`` leaves out what penalties, bias and end tokens need, by far
    the largest part: ``4.25 * max_rows * vocab_size`` bytes. Two calls that may overlap need a workspace each.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str, max_logprobs: int = 0, *, lists: bool = True) -> None:
        if max_rows < 0 or not 1 <= vocab_size <= checks_sample.MAX_VOCAB or not 0 <= max_logprobs <= vocab_size:
            raise ValueError(
                f"a workspace needs max_rows >= 0, vocab_size from 1 to 2^22 and max_logprobs from 0 to vocab_size, "
                f"got {max_rows}, {vocab_size} and {max_logprobs}"
            )
        self.max_rows, self.vocab_size, self.max_logprobs, self.lists = max_rows, vocab_size, max_logprobs, lists
        self.device = torch.device(device)
        self.constants = constants(vocab_size)
        self.chunks = -(-vocab_size // CHUNK)
        subs = self.constants["NSUB"]

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((max_rows, *shape), dtype=dtype, device=self.device)

        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self.values = empty(vocab_size, dtype=f32) if lists else None
        self.touched = empty(-(-vocab_size // 16), dtype=i32) if lists else None
        self.listed = empty(dtype=i32) if lists else None
        self.maxima = empty(subs, dtype=f32)
        self.raw_maxima = empty(subs, dtype=f32) if max_logprobs else None
        self.chunk_lower = empty(self.chunks, dtype=f32)
        self.chunk_nan = empty(self.chunks, dtype=i32)
        self.raw_largest = empty(self.chunks, dtype=f32)
        self.raw_sum = empty(self.chunks, dtype=f32)
        self.selected = empty(subs, dtype=i32)
        self.candidates = empty(row.CAP.value, dtype=i64)
        self.state = empty(row.STATE.value, dtype=i64)
        self.pivots = empty(2 * row.PIVOTS.value, dtype=i32)
        self.totals = empty(4 * row.PIVOTS.value, dtype=i64)
        self.tokens = empty(dtype=i64)
        self.status = empty(dtype=i32)
        # Log-probabilities, raw and processed.
        self.chosen = [empty(dtype=f32) for _ in range(2)]
        self.top_tokens = [empty(max_logprobs, dtype=i64).flatten() for _ in range(2)]
        self.top = [empty(max_logprobs, dtype=f32).flatten() for _ in range(2)]

    def check(self, rows: int, vocab_size: int, device: torch.device, logprobs: int | None, lists: bool) -> None:
        """Raise ``ValueError`` unless a call of these sizes can use this workspace."""
        if self.vocab_size != vocab_size or self.max_rows < rows:
            raise ValueError(f"workspace is for up to {self.max_rows} rows of {self.vocab_size} logits, got {rows} rows of {vocab_size}")
        check_same_device(self.device, device)
        if (logprobs or 0) > self.max_logprobs:
            raise ValueError(f"workspace is for up to {self.max_logprobs} logprobs, got {logprobs}")
        if lists and not self.lists:
            raise ValueError("workspace was made with lists=False, so penalties, bias and end_tokens must be None")


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
    logprobs: int | None = None,
    workspace: Any = None,
) -> SampleResult:
    """See ``api.sample``. With a workspace the results are views of it."""
    checks_sample.sample(
        logits, temperature, top_k, top_p, min_p, seed, position, stream, penalties, bias, end_tokens, allowed, logprobs
    )  # fmt: skip
    check_device(logits.device)
    rows, vocab = logits.shape
    lists = penalties is not None or bias is not None or end_tokens is not None
    if workspace is None:
        workspace = Workspace(rows, vocab, logits.device, logprobs or 0, lists=lists)
    elif not isinstance(workspace, Workspace):
        raise TypeError(f"workspace must be a triton.Workspace or None, got {type(workspace).__name__}")
    else:
        workspace.check(rows, vocab, logits.device, logprobs, lists)
    run(
        launches(
            workspace, logits, temperature, top_k, top_p, min_p, seed, position, stream, penalties, bias, end_tokens, allowed, logprobs
        ),
        logits.device,
    )  # fmt: skip
    return _results(workspace, rows, logprobs)


def _results(w: Workspace, rows: int, logprobs: int | None) -> SampleResult:
    tokens, status = w.tokens[:rows], w.status[:rows]
    if logprobs is None:
        return SampleResult(tokens, status)
    chosen = [t[:rows] for t in w.chosen]
    if logprobs == 0:
        return SampleResult(tokens, status, chosen[0], chosen[1])
    top_tokens, top = ([t[: rows * logprobs].view(rows, logprobs) for t in both] for both in (w.top_tokens, w.top))
    return SampleResult(tokens, status, chosen[0], chosen[1], top_tokens[0], top[0], top_tokens[1], top[1])


def launches(
    w: Workspace,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
    logprobs: int | None,
) -> Sequence[Launch]:
    """The kernels of a call in order, each with its grid and arguments."""
    rows, vocab = logits.shape
    lists = penalties is not None or bias is not None or end_tokens is not None
    wide, narrow = (rows, w.chunks), (rows,)
    sizes = {"SUB": w.constants["SUB"], "NSUB": w.constants["NSUB"]}
    chunks = {"chunks": w.chunks, "MAX_CHUNKS": w.constants["MAX_CHUNKS"]}
    wants_logprobs = {"LOGPROBS": int(logprobs is not None)}
    matrix = {"logits": logits, "row_stride": logits.stride(0), "vocab": vocab}
    # What `load_z` takes.
    z = matrix | {
        "temperature": temperature,
        "values": w.values if lists else None,
        "touched": w.touched if lists else None,
        "listed": w.listed if lists else None,
        "allowed": allowed,
        "maxima": w.maxima,
    }
    filters = {"top_k": top_k, "top_p": top_p}
    draw = {"seed": seed, "position": position, "stream": stream}
    search = {"state": w.state, "pivots": w.pivots, "totals": w.totals}
    raw = w.raw_maxima if logprobs else None

    calls = []
    if lists:
        calls.append(
            launch(
                sample_adjust,
                narrow,
                matrix,
                list_arguments(penalties, bias, end_tokens),
                {"position": position, "temperature": None, "state": None},
                {"values": w.values, "touched": w.touched, "listed": w.listed},
            )
        )
    raw_stats = {"raw_largest": w.raw_largest if logprobs is not None else None, "raw_sum": w.raw_sum if logprobs is not None else None}
    of_chunks = {"chunk_lower": w.chunk_lower, "chunk_nan": w.chunk_nan}
    masses = ((rows, -(-vocab // MASS_CHUNK)), z, filters, search, sizes)
    calls += [
        launch(sample_scan, wide, z, filters, {"min_p": min_p}, draw, of_chunks, raw_stats, {"raw_maxima": raw}, sizes),
        launch(
            sample_settle, narrow, z, filters, {"min_p": min_p}, draw, of_chunks, search, sizes, chunks, wants_logprobs,
            {"selected": w.selected, "candidates": w.candidates, "tokens": w.tokens, "status": w.status},
        ),
        launch(sample_masses, *masses, {"PASS": 0}),
        launch(sample_masses, *masses, {"PASS": 1}),
        launch(sample_gather, wide, z, filters, search, {"candidates": w.candidates}, sizes),
        launch(
            sample_resolve, narrow, z, filters, {"min_p": min_p}, draw, search, {"candidates": w.candidates, "tokens": w.tokens}, sizes
        ),
        launch(sample_race, wide, z, draw, {"state": w.state}, wants_logprobs, sizes),
        launch(
            sample_finish, narrow, z, raw_stats, {"raw_maxima": raw, "state": w.state, "tokens": w.tokens}, sizes, chunks, wants_logprobs,
            {"chosen_raw": w.chosen[0], "chosen": w.chosen[1], "num_top": logprobs or 0},
            {"top_raw_tokens": w.top_tokens[0], "top_raw": w.top[0], "top_tokens": w.top_tokens[1], "top": w.top[1]},
        ),
    ]  # fmt: skip
    return calls
