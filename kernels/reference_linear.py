"""The oracle of products with packed weights: see ``api.linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import ACTIVATION_GROUP, INT4_GROUP, INT4_GROUP_BYTES, PANEL, PackedWeight

TINY = 1e-30  # a group of x whose largest magnitude is below this counts as zeros


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` as int8 values (float32 ``[M, G, 128]``, zeros past K) and their float32 scales ``[M, G]``, one per group along K.

    ``scale = max|x| / 127`` and ``q = round_to_even(x * (127 / max|x|))``. A group that holds NaN or an infinity has scale NaN and zeros.
    """
    rows, k = x.shape
    groups = -(-k // ACTIVATION_GROUP)
    padded = x.new_zeros(rows, groups * ACTIVATION_GROUP)
    padded[:, :k] = x
    padded = padded.view(rows, groups, ACTIVATION_GROUP)
    largest = padded.abs().amax(dim=2)
    finite = padded.isfinite().all(dim=2)
    used = finite & (largest >= TINY)
    most = x.new_tensor(127.0)  # as a tensor: to PyTorch a number over a tensor is its reciprocal times that number, rounded twice
    q = (torch.where(used[..., None], padded, 0) * (most / torch.where(used, largest, 1))[..., None]).round()
    scale = torch.where(used, largest / most, 0)
    return q, torch.where(finite, scale, torch.nan)


def integer_product(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ weight.T`` with both in integers: exact int32 sums over K as far as all scales are the same, then float32, in order, every
    multiply and add rounded by itself: so this and the kernels agree to the bit.

    Per group of x, ``total += part * scale of x``. int8: part is the exact sum, and the output's scale multiplies the last total. int4:
    part is the sum, from 0 on, of ``exact sum * scale`` over the group's four groups of weights.
    """
    n = weight.shape[0]
    q, scale = quantise_rows(x)
    q = q.flatten(1).double()
    w, weight_scale = _integers(weight, q.shape[1])
    w = w.double()
    total = x.new_zeros(x.shape[0], n)
    for g in range(scale.shape[1]):
        begin, end = g * ACTIVATION_GROUP, (g + 1) * ACTIVATION_GROUP
        if weight.format == "int8":
            part = (q[:, begin:end] @ w[:n, begin:end].T).float()
        else:
            part = torch.zeros_like(total)
            for k in range(begin, end, INT4_GROUP):
                exact = (q[:, k : k + INT4_GROUP] @ w[:n, k : k + INT4_GROUP].T).float()
                part = part + exact * weight_scale[:n, k // INT4_GROUP]
        total = total + part * scale[:, g, None]
    return total * weight_scale[:n] if weight.format == "int8" else total


def _integers(weight: PackedWeight, columns: int) -> tuple[Tensor, Tensor]:
    """The integers of an int8 or int4 matrix, ``[32 P, columns]`` with zeros past K, and their float32 scales: ``[32 P]``, or of int4
    ``[32 P, columns / 32]``."""
    rows = weight.data.shape[0] * PANEL
    if weight.format == "int8":
        assert weight.scale is not None
        q = (weight.data.to(torch.int16) - 128).permute(0, 2, 1, 3).reshape(rows, -1)
        return torch.nn.functional.pad(q, (0, columns - q.shape[1])), weight.scale
    groups = weight.data.shape[1]
    dense = PackedWeight(weight.data, None, weight.format, (rows, groups * INT4_GROUP)).dense()
    scales = weight.data[..., INT4_GROUP_BYTES - 2 * PANEL :].contiguous().view(torch.float16).float()  # [P, G, 32]
    scales = scales.transpose(1, 2).reshape(rows, groups)
    q = (dense / torch.where(scales == 0, 1, scales).repeat_interleave(INT4_GROUP, 1)).round()
    missing = columns // INT4_GROUP - groups
    return torch.nn.functional.pad(q, (0, missing * INT4_GROUP)), torch.nn.functional.pad(scales, (0, missing))
