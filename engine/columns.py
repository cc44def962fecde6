"""Numbers that Python writes and kernels read: an array, and a tensor over its memory."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

_DTYPES = {"i": torch.int32, "q": torch.int64, "f": torch.float32}


def tensor_of(column: array[int] | array[float]) -> Tensor:
    """The numbers of an array of int32 (``"i"``), int64 (``"q"``) or float32 (``"f"``), where they lie: ``[len(column)]``.

    What is written into the array is in the tensor. Its length must stay as it is.
    """
    dtype = _DTYPES[column.typecode]
    return torch.frombuffer(column, dtype=dtype) if len(column) else torch.empty(0, dtype=dtype)
