"""The ops of a GPU that are fastest where a row need not have the same bits in every batch; ``select(deterministic=True)`` leaves them
out."""

from __future__ import annotations

import torch

OPS: tuple[str, ...] = ()


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    if device_type != "cuda":
        return f"these ops run on cuda, not on {device_type}"
    return None if torch.cuda.is_available() else "torch finds no CUDA GPU"
