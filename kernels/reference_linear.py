"""The oracle of products with packed weights: see ``api.linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import ACTIVATION_GROUP, INT4_GROUP, INT4_GROUP_BYTES, PANEL, PackedWeight

TINY = 1e-30  # a group of x whose largest magnitude is below this counts as zeros


def quantise_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` as int8 values (float32 ``[M, G, group]``, zeros past K) and one float32 scale ``[M, G]`` per group along K.

    ``scale = max|x| / 127`` and ``q = round_to_even(x * (127 / max|x|))``. A group that holds NaN or an infinity has scale NaN and zeros.
    """
    rows, k = x.shape
    groups = -(-k // group)
    padded = x.new_zeros(rows, groups * group)
    padded[:, :k] = x
    padded = padded.view(rows, groups, group)
    largest = padded.abs().amax(dim=2)
    finite = padded.isfinite().all(dim=2)
    used = finite & (largest >= TINY)
    q = (torch.where(used[..., None], padded, 0) * (127 / torch.where(used, largest, 1))[..., None]).round()
    scale = torch.where(used, largest / 127, 0)
    return q, torch.where(finite, scale, torch.nan)


def integer_product(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ weight.T`` with both in integers: exact int32 sums within a group, float32 from group to group, in order, every multiply and
    add rounded by itself: so this and the kernels agree to the bit."""
    n, k = weight.shape
    size = ACTIVATION_GROUP[weight.format]
    q, scale = quantise_rows(x, size)
    w, weight_scale = _integers(weight, q.shape[1] * size)
    total = x.new_zeros(x.shape[0], n)
    for g in range(q.shape[1]):
        exact = (q[:, g].double() @ w[:n, g * size : (g + 1) * size].double().T).float()
        if weight_scale.dim() == 2:
            exact = exact * weight_scale[:n, g]
        total = total + exact * scale[:, g, None]
    return total if weight_scale.dim() == 2 else total * weight_scale[:n]


def _integers(weight: PackedWeight, columns: int) -> tuple[Tensor, Tensor]:
    """The integers of an int8 or int4 matrix, ``[32 P, columns]``, and their float32 scales: ``[32 P]``, or ``[32 P, G]`` of int4."""
    unit = PackedWeight(weight.data, None, weight.format, (weight.data.shape[0] * PANEL, columns))
    if weight.format == "int8":
        assert weight.scale is not None
        q = (weight.data.to(torch.int16) - 128).permute(0, 2, 1, 3).reshape(unit.shape[0], -1)
        return torch.nn.functional.pad(q, (0, columns - q.shape[1])), weight.scale
    scales = weight.data[..., INT4_GROUP_BYTES - 2 * PANEL :].contiguous().view(torch.float16).float()  # [P, G, 32]
    scales = scales.transpose(1, 2).reshape(unit.shape[0], -1)
    nothing = torch.where(scales == 0, 1, scales).repeat_interleave(INT4_GROUP, 1)
    return (unit.dense() / nothing).round(), scales
