"""The ops of a GPU that are fastest where a row need not have the same bits in every batch; ``select(deterministic=True)`` leaves them
out.

``linear`` is cuBLAS, by way of torch: which of its kernels runs, and so how K is cut, depends on how many rows there are. Several weights
are as many products, each writing its columns of one result: cuBLAS takes any distance between the rows of its result (``ldc``), and torch
hands it such a view as it is, without a copy. The engine keeps no joined copy of a live model's weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, reference, triton
from .packed import PackedWeight
from .quantized import QuantizedWeight

OPS = ("linear", "paged_attention")
_MANY_QUERIES = 16  # for each sequence, from which wide query tiles pay


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    if device_type != "cuda":
        return f"these ops run on cuda, not on {device_type}"
    return None if torch.cuda.is_available() else "torch finds no CUDA GPU"


@torch.no_grad()  # results in given tensors are none that autograd could follow
def linear(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight | QuantizedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``api.linear``. Quantised weights, and weights of another dtype than x, are multiplied by Triton's kernels."""
    width = checks.linear(x, weights, biases, residual, out)
    if any(not isinstance(w, Tensor) or w.dtype != x.dtype for w in weights):
        other: Any = reference if triton.unavailable(x.device.type) else triton
        result: Tensor = other.linear(x, weights, biases, residual=residual, out=out)
        return result
    if out is None:
        out = x.new_empty((x.shape[0], width), dtype=x.dtype if residual is None else torch.float32)
    column = 0
    for i, weight in enumerate(weights):
        assert isinstance(weight, Tensor)
        n = weight.shape[0]
        bias = None if biases is None else biases[i]
        _product(x, weight, bias, None if residual is None else residual[:, column : column + n], out[:, column : column + n])
        column += n
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """``x @ weight.T`` plus bias plus residual to ``out``, a view of some columns."""
    dtype: dict[str, Any] = {} if out.dtype == x.dtype else {"out_dtype": out.dtype}
    if bias is None and residual is None:
        torch.mm(x, weight.t(), out=out, **dtype)
        return
    if bias is None:
        assert residual is not None
        if residual.data_ptr() != out.data_ptr():
            out.copy_(residual)
    elif residual is None:
        out.copy_(bias)  # in 16 bits too the sum is rounded once: what is there is added to the float32 sums
    else:
        torch.add(residual, bias, out=out)
    torch.addmm(out, x, weight.t(), out=out, **dtype)  # the same object twice, so that torch adds in place


if importlib.util.find_spec("triton") is not None:

    def paged_attention(
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        *,
        scale: float,
        window: int = 0,
        tree_start: Tensor | None = None,
        ancestors: Tensor | None = None,
    ) -> Tensor:
        """See ``api.paged_attention``. Wide query tiles where sequences have many queries, else Triton's op itself."""
        from .triton import attention

        many = len(q) >= _MANY_QUERIES * max(len(context_len), 1)
        hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
        wide = many and hopper and q.dtype != torch.float32 and q.shape[2] <= attention.WIDE_HEAD_DIM
        step = (q, key_cache, value_cache, block_table, query_start, context_len)
        return attention.attend(step, scale, window, tree_start, ancestors, wide=wide)
