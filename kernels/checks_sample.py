"""Argument checks of ``sample``, shared by the backends: one clear ``ValueError`` or ``TypeError`` that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def _raise(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], meaning: str, device: torch.device) -> None:
    """Say what is wrong with ``t``, which should be a contiguous tensor of this dtype, shape and device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} while logits is on {device}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(t.shape)}")
    raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    repetition_penalty: Tensor | None,
    history: Tensor | None,
    history_start: Tensor | None,
) -> None:
    """Check types, shapes, strides and devices; the values inside the tensors are checked by each backend."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be [R, V] with V >= 1 and unit stride in V, got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    rows, vocab = logits.shape
    if vocab >= 1 << 31:
        raise ValueError(f"logits must have V < 2^31 columns, got {vocab}")
    device = logits.device
    per_row: list[tuple[str, Tensor, torch.dtype, tuple[int, ...], str]] = [
        ("temperature", temperature, torch.float32, (rows,), "[R]"),
        ("top_k", top_k, torch.int32, (rows,), "[R]"),
        ("seed", seed, torch.int64, (rows,), "[R]"),
        ("position", position, torch.int32, (rows,), "[R]"),
        ("stream", stream, torch.int32, (rows,), "[R]"),
    ]
    given = (repetition_penalty is not None) + (history is not None) + (history_start is not None)
    if repetition_penalty is not None and history is not None and history_start is not None:
        size = tuple(history.shape) if isinstance(history, Tensor) and history.dim() == 1 else (0,)
        per_row += [
            ("repetition_penalty", repetition_penalty, torch.float32, (rows,), "[R]"),
            ("history", history, torch.int32, size, "[N]"),
            ("history_start", history_start, torch.int32, (rows + 1,), "[R + 1]"),
        ]
    elif given:
        names = ("repetition_penalty", "history", "history_start")
        missing = [n for n, t in zip(names, (repetition_penalty, history, history_start), strict=True) if t is None]
        raise ValueError(f"repetition_penalty, history and history_start must be given together, got None for {' and '.join(missing)}")
    for name, t, dtype, shape, meaning in per_row:
        if not (isinstance(t, Tensor) and t.dtype is dtype and t.shape == shape and t.device == device and t.is_contiguous()):
            _raise(name, t, dtype, shape, meaning, device)
