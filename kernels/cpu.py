"""The CPU backend: argument checks and calls into ``engine.kernels._cpu`` (C++, ``csrc/cpu``). Contracts in ``api``.

Each op tests its arguments with a few plain comparisons; when one fails, ``checks`` finds which and raises. These functions run about a
hundred times per decode step, so they must cost microseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, checks_sample
from .api import SampleResult

_cpu: Any = None
_reason: str | None = None
try:
    _cpu = importlib.import_module("._cpu", __package__)
except ImportError as error:
    _reason = f"engine.kernels._cpu cannot be imported: {error}"

# ---- helpers shared by the ops ----

_F32 = torch.float32
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType in csrc/cpu/kernels.h


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    return _reason if device_type == "cpu" else f"these kernels run on cpu, not on {device_type}"


def describe() -> str:
    """Threads and instruction set in use, as one line."""
    return f"{_cpu.num_threads()} threads; instruction set {_cpu.isa()}, of {', '.join(_cpu.supported_isas())}"


# ---- linear ----


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    width = checks.linear(x, weights, biases, residual, out)
    if out is None:
        out = torch.empty((x.shape[0], width), dtype=_F32)
    segments: list[int] = []
    for i, w in enumerate(weights):
        bias = None if biases is None else biases[i]
        segments += (w.data_ptr(), w.shape[0], 0 if bias is None else bias.data_ptr(), 0 if bias is None else _DTYPE[bias.dtype])
    _cpu.linear(
        x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], tuple(segments), _DTYPE[weights[0].dtype],
        0 if residual is None else residual.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


# ---- embed, rms_norm, rope_append, silu_mul ----


# ---- paged_attention ----


# ---- sample ----


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    repetition_penalty: Tensor | None = None,
    history: Tensor | None = None,
    history_start: Tensor | None = None,
) -> SampleResult:
    """See ``api.sample``. Logprobs are NaN where there is no token; +inf logits share the probability of the raw row evenly."""
    checks_sample.sample(logits, temperature, top_k, seed, position, stream, repetition_penalty, history, history_start)
    rows, vocab = logits.shape
    result = SampleResult(torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=_F32), torch.empty(rows, dtype=torch.int32))
    penalty = (0, 0, 0, 0)
    if repetition_penalty is not None and history is not None and history_start is not None:
        penalty = (repetition_penalty.data_ptr(), history.data_ptr(), history.shape[0], history_start.data_ptr())
    _cpu.sample(
        logits.data_ptr(), logits.stride(0), rows, vocab, temperature.data_ptr(), top_k.data_ptr(), seed.data_ptr(), position.data_ptr(),
        stream.data_ptr(), *penalty, result.tokens.data_ptr(), result.logprobs.data_ptr(), result.status.data_ptr(),
    )  # fmt: skip
    return result
