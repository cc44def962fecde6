"""The ops of a GPU that are fastest where a row need not have the same bits in every batch; ``select(deterministic=True)`` leaves them
out."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

OPS: tuple[str, ...] = ("paged_attention",)
_MANY_QUERIES = 16  # for each sequence, from which wide query tiles pay


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    if device_type != "cuda":
        return f"these ops run on cuda, not on {device_type}"
    return None if torch.cuda.is_available() else "torch finds no CUDA GPU"


if importlib.util.find_spec("triton") is not None:

    def paged_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, *step: Tensor, **options: Any) -> Tensor:
        """See ``api.paged_attention``. Wide query tiles where sequences have many queries, else Triton's op itself."""
        from .triton import attention

        many = len(q) >= _MANY_QUERIES * (len(step[-1]) or 1)
        return attention.paged_attention(q, key_cache, value_cache, *step, wide=many and q.dtype != torch.float32, **options)
