"""Argument checks of ``sample``, ``sample_head``, ``masses`` and ``beam_select``, shared by the backends: one clear error that names the
argument.

The functions named like an op look at types, shapes, strides and devices, which costs no look into a tensor. ``values`` and
``beam_values`` read what is in the tensors; on a GPU that would wait for the device, so its backend gives such rows STATUS_BAD_PARAMETER.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .api import EndTokens, LogitBias, Penalties
from .packed import PackedWeight
from .quantized import QuantizedWeight

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VOCAB = 1 << 22  # sums of so many weights of 2^40 stay below 2^62
LARGEST = 1e30  # of penalties and biases: no sum of them and a logit can be NaN
MAX_COUNT = 1 << 24  # float32 holds counts up to here


class Expected(NamedTuple):
    """A contiguous tensor argument."""

    name: str
    tensor: Any
    dtype: torch.dtype
    shape: tuple[int, ...]
    meaning: str


def _raise(expected: Expected, device: torch.device, first: str) -> None:
    """Say what is wrong with a tensor that should be contiguous, of this dtype, shape and device."""
    name, t, dtype, shape, meaning = expected
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} while {first} is on {device}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(t.shape)}")
    raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def length(t: Any) -> tuple[int, ...]:
    """The shape of a tensor whose length is free."""
    return tuple(t.shape) if isinstance(t, Tensor) and t.dim() == 1 else (0,)


def _logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be [R, V] with V >= 1 and unit stride in V, got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if logits.shape[1] > MAX_VOCAB:
        raise ValueError(f"logits must have V <= 2^22 columns, got {logits.shape[1]}")


def _parameters(rows: int, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, position: Tensor) -> list[Expected]:
    each = (rows,)
    return [
        Expected("temperature", temperature, torch.float32, each, "[R]"),
        Expected("top_k", top_k, torch.int32, each, "[R]"),
        Expected("top_p", top_p, torch.float32, each, "[R]"),
        Expected("min_p", min_p, torch.float32, each, "[R]"),
        Expected("position", position, torch.int32, each, "[R]"),
    ]


def _lists(
    rows: int, vocab: int, penalties: Penalties | None, bias: LogitBias | None, end_tokens: EndTokens | None, allowed: Tensor | None
) -> list[Expected]:
    """What the lists of tokens and the mask must be."""
    f32, i32 = torch.float32, torch.int32
    each = (rows,)
    expected = []
    for name, group, kind in (("penalties", penalties, Penalties), ("bias", bias, LogitBias), ("end_tokens", end_tokens, EndTokens)):
        if group is not None and not isinstance(group, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(group).__name__}")
    if penalties is not None:
        size = length(penalties.token)
        expected += [
            Expected("penalties.repetition", penalties.repetition, f32, each, "[R]"),
            Expected("penalties.presence", penalties.presence, f32, each, "[R]"),
            Expected("penalties.frequency", penalties.frequency, f32, each, "[R]"),
            Expected("penalties.token", penalties.token, i32, size, "[N]"),
            Expected("penalties.counts", penalties.counts, i32, size, "[N]"),
            Expected("penalties.start", penalties.start, i32, (rows + 1,), "[R + 1]"),
        ]
    if bias is not None:
        size = length(bias.token)
        expected += [
            Expected("bias.token", bias.token, i32, size, "[N]"),
            Expected("bias.bias", bias.bias, f32, size, "[N]"),
            Expected("bias.start", bias.start, i32, (rows + 1,), "[R + 1]"),
        ]
    if end_tokens is not None:
        expected += [
            Expected("end_tokens.token", end_tokens.token, i32, length(end_tokens.token), "[N]"),
            Expected("end_tokens.min_position", end_tokens.min_position, i32, each, "[R]"),
            Expected("end_tokens.start", end_tokens.start, i32, (rows + 1,), "[R + 1]"),
        ]
    if allowed is not None:
        expected.append(Expected("allowed", allowed, i32, (rows, (vocab + 31) // 32), "[R, ceil(V / 32)]"))
    return expected


def expect(expected: list[Expected], device: torch.device, first: str = "logits") -> None:
    """Check dtypes, shapes, contiguity, and the device, which is that of the argument ``first``."""
    for e in expected:
        t = e.tensor
        if not (isinstance(t, Tensor) and t.dtype is e.dtype and t.shape == e.shape and t.device == device and t.is_contiguous()):
            _raise(e, device, first)


def sample(
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
) -> None:
    """Check everything that can be seen from outside the tensors."""
    _logits(logits)
    rows, vocab = logits.shape
    expected = _parameters(rows, temperature, top_k, top_p, min_p, position)
    expected += [Expected("seed", seed, torch.int64, (rows,), "[R]"), Expected("stream", stream, torch.int32, (rows,), "[R]")]
    expect(expected + _lists(rows, vocab, penalties, bias, end_tokens, allowed), logits.device)
    if logprobs is not None:
        if isinstance(logprobs, bool) or not isinstance(logprobs, int):
            raise TypeError(f"logprobs must be None or an integer, got {logprobs!r}")
        if not 0 <= logprobs <= vocab:
            raise ValueError(f"logprobs must be None or from 0 to V = {vocab}, got {logprobs}")


def sample_head(
    x: Tensor,
    head: Tensor | PackedWeight | QuantizedWeight,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    first_token: int,
) -> None:
    """Check everything that can be seen from outside the tensors."""
    checks.linear(x, (head,), None, None, None)
    each = (len(x),)
    expect(
        [
            Expected("temperature", temperature, torch.float32, each, "[R]"),
            Expected("seed", seed, torch.int64, each, "[R]"),
            Expected("position", position, torch.int32, each, "[R]"),
            Expected("stream", stream, torch.int32, each, "[R]"),
        ],
        x.device,
        "x",
    )
    if isinstance(first_token, bool) or not isinstance(first_token, int):
        raise TypeError(f"first_token must be an integer, got {first_token!r}")
    vocab = head.shape[0]
    if vocab < 1:
        raise ValueError(f"head must be [V, K] with V >= 1, got {tuple(head.shape)}")
    if not 0 <= first_token <= MAX_VOCAB - vocab:
        raise ValueError(f"first_token must be in [0, 2^22 - V = {MAX_VOCAB - vocab}], got {first_token}")


def masses(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    position: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
) -> None:
    """Check everything that can be seen from outside the tensors."""
    _logits(logits)
    rows, vocab = logits.shape
    expected = _parameters(rows, temperature, top_k, top_p, min_p, position)
    expect(expected + _lists(rows, vocab, penalties, bias, end_tokens, allowed), logits.device)


def beam_select(
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
) -> None:
    """Check everything that can be seen from outside the tensors."""
    _logits(logits)
    rows, vocab = logits.shape
    each = (rows,)
    expected = [
        Expected("scores", scores, torch.float32, each, "[R]"),
        Expected("group_start", group_start, torch.int32, length(group_start), "[G + 1]"),
        Expected("temperature", temperature, torch.float32, each, "[R]"),
        Expected("top_k", top_k, torch.int32, each, "[R]"),
        Expected("position", position, torch.int32, each, "[R]"),
    ]
    if (seed is None) is not (stream is None):
        raise ValueError(f"seed and stream must be given together, got None for {'seed' if seed is None else 'stream'}")
    if seed is not None:
        expected += [Expected("seed", seed, torch.int64, each, "[R]"), Expected("stream", stream, torch.int32, each, "[R]")]
    expect(expected + _lists(rows, vocab, penalties, bias, end_tokens, allowed), logits.device)
    if not len(group_start):
        raise ValueError("group_start must have shape [G + 1] with G >= 0, got (0,)")
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int):
        raise TypeError(f"num_candidates must be an integer, got {num_candidates!r}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")


def values(
    vocab: int,
    temperature: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
) -> None:
    """Check what the tensors of ``sample`` hold."""
    temperature_values(temperature)
    _all("top_p", top_p, (top_p >= 0) & (top_p <= 1), "in [0, 1]")
    _all("min_p", min_p, (min_p >= 0) & (min_p <= 1), "in [0, 1]")
    _list_values(vocab, penalties, bias, end_tokens)


def temperature_values(temperature: Tensor) -> None:
    """Check what the ``temperature`` of ``sample`` and ``sample_head`` holds."""
    _all("temperature", temperature, (temperature >= 0) & temperature.isfinite(), "finite and >= 0")


def beam_values(
    vocab: int,
    scores: Tensor,
    group_start: Tensor,
    temperature: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
) -> None:
    """Check what the tensors of ``beam_select`` hold."""
    _all("scores", scores, (scores.abs() <= LARGEST) | (scores == -torch.inf), "within -1e30 and 1e30, or -inf")
    _all("temperature", temperature, (temperature > 0) & temperature.isfinite(), "finite and > 0")
    starts, rows = group_start.tolist(), len(scores)
    if starts[0] != 0 or starts[-1] != rows or any(a > b for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"group_start must rise from 0 to {rows}, the number of rows, got {starts}")
    _list_values(vocab, penalties, bias, end_tokens)


def _list_values(vocab: int, penalties: Penalties | None, bias: LogitBias | None, end_tokens: EndTokens | None) -> None:
    if penalties is not None:
        repetition = penalties.repetition
        _all("penalties.repetition", repetition, (repetition > 0) & repetition.isfinite(), "finite and > 0")
        _all("penalties.presence", penalties.presence, penalties.presence.abs() <= LARGEST, "within -1e30 and 1e30")
        _all("penalties.frequency", penalties.frequency, penalties.frequency.abs() <= LARGEST, "within -1e30 and 1e30")
        _ids("penalties", penalties.token, penalties.start, vocab)
        used = penalties.counts[int(penalties.start[0]) : int(penalties.start[-1])]
        _all("penalties.counts", used, (used >= 0) & (used <= MAX_COUNT), "from 0 to 2^24", int(penalties.start[0]))
    if bias is not None:
        _ids("bias", bias.token, bias.start, vocab)
        addend = bias.bias[int(bias.start[0]) : int(bias.start[-1])]
        good = (addend.abs() <= LARGEST) | (addend == -torch.inf)
        _all("bias.bias", addend, good, "within -1e30 and 1e30, or -inf", int(bias.start[0]))
    if end_tokens is not None:
        _ids("end_tokens", end_tokens.token, end_tokens.start, vocab, distinct=False)


def _all(name: str, tensor: Tensor, good: Tensor, meaning: str, offset: int = 0) -> None:
    """Raise ``ValueError`` unless all of ``good``."""
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise ValueError(f"{name} must be {meaning}, got {tensor[at].item()} at {at + offset}")


def _ids(name: str, token: Tensor, start: Tensor, vocab: int, distinct: bool = True) -> None:
    """``start`` rises within ``token``, whose ids lie in the vocabulary, distinct in each row."""
    starts, size = start.tolist(), len(token)
    for r, s in enumerate(starts):
        if s < (starts[r - 1] if r else 0) or s > size:
            raise ValueError(f"{name}.start must rise from >= 0 to <= {size}, the length of {name}.token, got {s} at {r}")
    used = token[starts[0] : starts[-1]]
    _all(f"{name}.token", used, (used >= 0) & (used < vocab), f"in [0, {vocab})", starts[0])
    for r, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        if distinct and last - first > 1:
            ids, counts = token[first:last].unique(return_counts=True)
            if len(ids) != last - first:
                raise ValueError(f"{name}.token must be distinct in each row, got {int(ids[counts > 1][0])} more than once in row {r}")
