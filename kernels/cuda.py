"""The GPU backend in CUDA (``csrc/cuda``): ops for which Triton is not enough. Contracts in ``api``.

``sample`` and ``beam_select`` are one cooperative launch each, whatever the filters: the blocks that share a row hold it in their shared
memory, so that the logits are read once, and find thresholds by histograms that they add up (``csrc/cuda/sample_kernel.h``,
``beam_kernel.h``). They take everything that the contract has. Nothing waits for the host, and calls can be captured in a CUDA graph: the
grid depends on the sizes of the call and on the device alone, and the kernel leaves its memory as it found it. A parameter out of range
gives its row STATUS_BAD_PARAMETER.

When the automatic choice takes these ops is said in ``crossover``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks_sample
from .api import BeamResult, EndTokens, LogitBias, Penalties, SampleResult

OPS = ("sample", "beam_select")
ROW_GROUP_BYTES = 106544  # sizeof(RowGroup) in csrc/cuda/sample.h
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # SampleArgs::dtype in csrc/cuda/sample.h


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    if device_type != "cuda":
        return f"these kernels run on cuda, not on {device_type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    from .registry import cuda_reason

    return cuda_reason()


def describe() -> str:
    """What runs the kernels, as one line."""
    return f"CUDA C++, compiled for {torch.cuda.get_device_name()}"


def _module() -> Any:
    return importlib.import_module("._cuda", __package__)


class Plan(NamedTuple):
    """How rows are divided among blocks (``sample_plan`` in csrc/cuda/launch.h)."""

    members: int  # blocks that share a row
    chunk: int  # tokens of a block
    groups: int  # rows at a time


def _fits(plan: Any, vocab_size: int, device: torch.device) -> Plan:
    if plan is None:
        raise ValueError(f"logits have V = {vocab_size} columns, too many for the shared memory of {device}")
    return Plan(*plan)


@functools.cache
def _plan(rows: int, vocab_size: int, device: torch.device) -> Plan:
    return _fits(_module().sample_plan(rows, vocab_size, device.index), vocab_size, device)


@functools.cache
def _beam_plan(rows: int, vocab_size: int, device: torch.device) -> Plan:
    return _fits(_module().beam_plan(rows, vocab_size, device.index), vocab_size, device)


def _with_index(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


class Workspace:
    """Memory for calls of ``sample`` with up to ``max_rows`` rows of ``vocab_size`` logits: scratch, and the results, which the next call
    with the same workspace overwrites. Calls with it allocate nothing.

    ``max_logprobs``: the largest ``logprobs`` of those calls. Two calls that may overlap need a workspace each. ``plan`` says how a number
    of rows is divided; by default as the device asks for.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str, max_logprobs: int = 0, *, plan: Any = _plan) -> None:
        if max_rows < 0 or not 1 <= vocab_size <= checks_sample.MAX_VOCAB or not 0 <= max_logprobs <= vocab_size:
            raise ValueError(
                f"a workspace needs max_rows >= 0, vocab_size from 1 to 2^22 and max_logprobs from 0 to vocab_size, "
                f"got {max_rows}, {vocab_size} and {max_logprobs}"
            )
        self.max_rows, self.vocab_size, self.max_logprobs = max_rows, vocab_size, max_logprobs
        self.device = _with_index(device)
        self.plans = [plan(rows, vocab_size, self.device) for rows in range(1, max_rows + 1)]
        groups = max((p.groups for p in self.plans), default=0)
        keys = max((2 * p.groups * p.members * min(max_logprobs, p.chunk) for p in self.plans), default=0)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        f32, i64 = torch.float32, torch.int64
        self.groups = torch.zeros(groups, ROW_GROUP_BYTES // 8, dtype=i64, device=self.device)  # as the kernel leaves them
        self.top_keys = empty(keys, dtype=i64)
        self.tokens = empty(max_rows, dtype=i64)
        self.status = empty(max_rows, dtype=torch.int32)
        # Log-probabilities, raw and processed.
        self.chosen = [empty(max_rows, dtype=f32) for _ in range(2)]
        self.top_tokens = [empty(max_rows * max_logprobs, dtype=i64) for _ in range(2)]
        self.top = [empty(max_rows * max_logprobs, dtype=f32) for _ in range(2)]

    def check(self, rows: int, vocab_size: int, device: torch.device, logprobs: int | None) -> None:
        """Raise ``ValueError`` unless a call of these sizes can use this workspace."""
        if self.vocab_size != vocab_size or self.max_rows < rows:
            raise ValueError(f"workspace is for up to {self.max_rows} rows of {self.vocab_size} logits, got {rows} rows of {vocab_size}")
        if self.device != device:
            raise ValueError(f"workspace is on {self.device} while logits is on {device}")
        if (logprobs or 0) > self.max_logprobs:
            raise ValueError(f"workspace is for up to {self.max_logprobs} logprobs, got {logprobs}")

    def results(self, rows: int, logprobs: int | None) -> SampleResult:
        """Views of what a call has written."""
        tokens, status = self.tokens[:rows], self.status[:rows]
        if logprobs is None:
            return SampleResult(tokens, status)
        chosen = [t[:rows] for t in self.chosen]
        if logprobs == 0:
            return SampleResult(tokens, status, chosen[0], chosen[1])
        top_tokens, top = ([t[: rows * logprobs].view(rows, logprobs) for t in both] for both in (self.top_tokens, self.top))
        return SampleResult(tokens, status, chosen[0], chosen[1], top_tokens[0], top[0], top_tokens[1], top[1])


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
    given = (temperature, top_k, top_p, min_p, seed, position, stream)
    checks_sample.sample(logits, *given, penalties, bias, end_tokens, allowed, logprobs)
    if logits.device.type != "cuda":
        raise ValueError(f"logits is on {logits.device}; these kernels run on cuda")
    rows, vocab = logits.shape
    if workspace is None:
        workspace = Workspace(rows, vocab, logits.device, logprobs or 0)
    elif not isinstance(workspace, Workspace):
        raise TypeError(f"workspace must be a cuda.Workspace or None, got {type(workspace).__name__}")
    else:
        workspace.check(rows, vocab, logits.device, logprobs)
    if rows:
        call = words(workspace, logits, given, penalties, bias, end_tokens, allowed, logprobs)
        _module().sample(call, logits.device.index, torch.cuda.current_stream(logits.device).cuda_stream)
    result: SampleResult = workspace.results(rows, logprobs)
    return result


def words(
    w: Workspace,
    logits: Tensor,
    given: tuple[Tensor, ...],
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
    logprobs: int | None,
) -> list[int]:
    """The fields of ``SampleArgs`` in csrc/cuda/sample.h, of a call with at least one row; ``given``: temperature to stream."""
    return [
        *_row_words(logits, given, penalties, bias, end_tokens, allowed),
        -1 if logprobs is None else logprobs, w.tokens.data_ptr(), w.status.data_ptr(), w.chosen[0].data_ptr(), w.chosen[1].data_ptr(),
        w.top_tokens[0].data_ptr(), w.top[0].data_ptr(), w.top_tokens[1].data_ptr(), w.top[1].data_ptr(),
        w.groups.data_ptr(), w.top_keys.data_ptr(), *w.plans[len(logits) - 1],
    ]  # fmt: skip


def _row_words(
    logits: Tensor,
    given: tuple[Tensor | None, ...],
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
) -> list[int]:
    """The fields up to ``allowed``."""

    def addresses(tensors: Penalties | LogitBias | EndTokens | None, count: int) -> list[int]:
        """And, last, how many entries there are."""
        return [0] * (count + 1) if tensors is None else [*(t.data_ptr() for t in tensors), tensors.token.numel()]

    return [
        logits.data_ptr(), _DTYPE[logits.dtype], logits.stride(0), *logits.shape,
        *(0 if t is None else t.data_ptr() for t in given),
        *addresses(penalties, 6), *addresses(bias, 3), *addresses(end_tokens, 3), 0 if allowed is None else allowed.data_ptr(),
    ]  # fmt: skip


# ---- beam_select ----

MAX_BEAM_ROWS = 512  # kMaxBeamRows in csrc/cuda/beam.h


class BeamWorkspace:
    """Memory for calls of ``beam_select`` with up to ``max_rows`` (at most 512) rows of ``vocab_size`` logits, ``max_groups`` groups and
    ``max_candidates`` candidates: scratch, and the results, which the next call with the same workspace overwrites. Calls with it allocate
    nothing. Two calls that may overlap need a workspace each. ``plan``: as of ``Workspace``.
    """

    def __init__(
        self, max_rows: int, vocab_size: int, max_groups: int, max_candidates: int, device: torch.device | str, *, plan: Any = _beam_plan
    ) -> None:
        if not 0 <= max_rows <= MAX_BEAM_ROWS or not 1 <= vocab_size <= checks_sample.MAX_VOCAB or max_groups < 0 or max_candidates < 1:
            raise ValueError(
                f"a workspace needs max_rows from 0 to {MAX_BEAM_ROWS}, vocab_size from 1 to 2^22, max_groups >= 0, max_candidates >= 1, "
                f"got {max_rows}, {vocab_size}, {max_groups} and {max_candidates}"
            )
        self.max_rows, self.vocab_size, self.max_groups, self.max_candidates = max_rows, vocab_size, max_groups, max_candidates
        self.device = _with_index(device)
        self.plans = [plan(max(rows, 1), vocab_size, self.device) for rows in range(max_rows + 1)]
        teams = max(p.groups for p in self.plans)
        keys = max(p.groups * p.members * min(max_candidates, p.chunk) for p in self.plans)
        row_keys = max_rows * min(max_candidates, vocab_size)

        def empty(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=self.device)

        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self.groups = torch.zeros(teams, ROW_GROUP_BYTES // 8, dtype=i64, device=self.device)  # as the kernel leaves them
        self.rows_done = torch.zeros(max_groups, dtype=i32, device=self.device)  # likewise
        self.keys, self.key_logprobs = empty(keys, i64), empty(keys, f32)
        self.row_keys, self.row_logprobs = empty(row_keys, i64), empty(row_keys, f32)
        candidates = max_groups * max_candidates
        self.scores, self.tokens, self.parents, self.logprobs = (empty(candidates, dtype) for dtype in (f32, i64, i32, f32))
        self.status = empty(max_rows, i32)

    def check(self, rows: int, vocab_size: int, groups: int, num_candidates: int, device: torch.device) -> None:
        """Raise ``ValueError`` unless a call of these sizes can use this workspace."""
        if self.vocab_size != vocab_size or self.max_rows < rows:
            raise ValueError(f"workspace is for up to {self.max_rows} rows of {self.vocab_size} logits, got {rows} rows of {vocab_size}")
        if self.device != device:
            raise ValueError(f"workspace is on {self.device} while logits is on {device}")
        if groups > self.max_groups or num_candidates > self.max_candidates:
            raise ValueError(
                f"workspace is for up to {self.max_groups} groups and {self.max_candidates} candidates, "
                f"got {groups} groups and num_candidates {num_candidates}"
            )

    def results(self, rows: int, groups: int, num_candidates: int) -> BeamResult:
        """Views of what a call has written."""
        size, shape = groups * num_candidates, (groups, num_candidates)
        best, tokens, parents, logprobs = (t[:size].view(shape) for t in (self.scores, self.tokens, self.parents, self.logprobs))
        return BeamResult(best, tokens, parents, logprobs, self.status[:rows])


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
    """See ``api.beam_select``; up to 512 rows. With a workspace the results are views of it."""
    checks_sample.beam_select(
        logits, scores, group_start, num_candidates, temperature, top_k, position, seed, stream, penalties, bias, end_tokens, allowed
    )  # fmt: skip
    if logits.device.type != "cuda":
        raise ValueError(f"logits is on {logits.device}; these kernels run on cuda")
    rows, vocab = logits.shape
    groups = len(group_start) - 1
    if rows > MAX_BEAM_ROWS:
        raise ValueError(f"logits must have at most {MAX_BEAM_ROWS} rows for this kernel, got {rows}")
    if workspace is None:
        workspace = BeamWorkspace(rows, vocab, groups, num_candidates, logits.device)
    elif not isinstance(workspace, BeamWorkspace):
        raise TypeError(f"workspace must be a cuda.BeamWorkspace or None, got {type(workspace).__name__}")
    else:
        workspace.check(rows, vocab, groups, num_candidates, logits.device)
    call = beam_words(
        workspace, logits, scores, group_start, num_candidates, temperature, top_k, position, seed, stream, penalties, bias, end_tokens,
        allowed,
    )  # fmt: skip
    _module().beam_select(call, logits.device.index, torch.cuda.current_stream(logits.device).cuda_stream)
    result: BeamResult = workspace.results(rows, groups, num_candidates)
    return result


def beam_words(
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
) -> list[int]:
    """The fields of ``BeamArgs`` in csrc/cuda/beam.h."""
    given = (temperature, top_k, None, None, seed, position, stream)
    tensors = (w.rows_done, w.keys, w.key_logprobs, w.row_keys, w.row_logprobs, w.scores, w.tokens, w.parents, w.logprobs)
    return [
        *_row_words(logits, given, penalties, bias, end_tokens, allowed),
        -1, 0, w.status.data_ptr(), 0, 0, 0, 0, 0, 0, w.groups.data_ptr(), 0, *w.plans[len(logits)],
        scores.data_ptr(), group_start.data_ptr(), len(group_start) - 1, num_candidates, *(t.data_ptr() for t in tensors),
    ]  # fmt: skip
