"""Weight matrices in the order the CPU kernels stream them: panels of 32 outputs, in floats, int8 or int4.

``data`` of an ``[N, K]`` matrix W, with P = ceil(N / 32) panels (outputs past N are zeros) and ``w(p, i) = W[32 p + i]``:

* float32, float16: ``[P, K, 32]``, ``data[p, k, i] = w(p, i)[k]``.
* bfloat16: ``[P, ceil(K / 2), 32, 2]``, ``data[p, j, i, h] = w(p, i)[2 j + h]``: two neighbours along K make one 32-bit word.
* int8: uint8 ``[P, ceil(K / 4), 32, 4]``, ``data[p, j, i, h] = q + 128`` with ``W[n, k] ~ scale[n] * q``, q from -127 to 127.
* int4: uint8 ``[P, G, 576]`` for G = ceil(K / 32) groups of 32 along K. First 512 bytes ``[2, 4, 16, 4]``: byte ``[h, j, i, b]`` is
  of output ``16 h + i``; its low nibble is ``q + 8`` at k = 32 g + 4 j + b, its high nibble that at 16 further. Then 32 float16 scales,
  one per output: ``W[n, k] ~ scale * q``, q from -8 to 7. Scales travel with their group, so that a step reads one stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .huge_pages import HugePages

PANEL = 32  # outputs per panel
FLOAT_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
INTEGER_FORMATS = ("int8", "int4")
FORMATS = (*FLOAT_FORMATS.values(), *INTEGER_FORMATS)
ACTIVATION_GROUP = 128  # a row of x becomes int8 before it meets integer weights, with one scale per so many of its elements
INT4_GROUP = 32
INT4_GROUP_BYTES = PANEL * INT4_GROUP // 2 + 2 * PANEL


@dataclass(frozen=True)
class PackedWeight:
    """A matrix ``[N, K]`` in panels; see the module for the order. Made by ``pack``."""

    data: Tensor  # contiguous; shape and dtype by format
    scale: Tensor | None  # float32 [32 P], int8 only
    format: str  # one of FORMATS
    shape: tuple[int, int]  # N, K

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dense(self) -> Tensor:
        """The matrix that this stands for, ``[N, K]``: of its own dtype, dequantised to float32 for int8 and int4."""
        n, k = self.shape
        if self.format == "int4":
            return _int4_dense(self.data)[:n, :k].contiguous()
        panels = self.data.shape[0]
        if self.format == "int8":
            assert self.scale is not None
            q = (self.data.to(torch.int16) - 128).permute(0, 2, 1, 3).reshape(PANEL * panels, -1)
            return (q.float() * self.scale[:, None])[:n, :k].contiguous()
        along = self.data.transpose(1, 2) if self.format != "bfloat16" else self.data.permute(0, 2, 1, 3)
        return along.reshape(PANEL * panels, -1)[:n, :k].contiguous()


@torch.no_grad()
def pack(weight: Tensor, format: str | None = None, memory: HugePages | None = None) -> PackedWeight:
    """Pack ``weight [N, K]`` (fp32, bf16 or fp16) as it is, or as "int8" or "int4"; into ``memory``, default: memory of its own.

    int8: per output, symmetric, ``scale = max|w| / 127``, rounded to nearest even. int4: per output and group of 32 along K, with
    ``scale = float16(-extreme / 8)`` for the value largest in size, which so becomes -8; rounded to nearest even, within -8 to 7. Weights
    that are not finite raise ``ValueError`` in both, in int4 also those above 524,032; groups below 1e-5 lose precision there, as the scale
    does.
    """
    if weight.dtype not in FLOAT_FORMATS or weight.dim() != 2:
        raise TypeError(f"weight must be [N, K] of float32, bfloat16 or float16, got {weight.dtype} {tuple(weight.shape)}")
    format = FLOAT_FORMATS[weight.dtype] if format is None else format
    if format not in FORMATS or (format in FLOAT_FORMATS.values() and format != FLOAT_FORMATS[weight.dtype]):
        raise ValueError(f"format is {format!r}; for a {weight.dtype} matrix it may be {FLOAT_FORMATS[weight.dtype]!r}, 'int8' or 'int4'")
    n, k = weight.shape
    panels = -(-n // PANEL)
    depth = {"bfloat16": 2, "int8": 4, "int4": INT4_GROUP}.get(format, 1)
    columns = -(-k // depth) * depth
    padded = weight
    if (PANEL * panels, columns) != (n, k):
        padded = weight.new_zeros((PANEL * panels, columns))
        padded[:n, :k] = weight
    if not weight.numel():
        raise ValueError(f"weight is {list(weight.shape)}; it must have at least one output and one input")
    keep = Tensor.contiguous if memory is None else memory.keep
    scale = None
    if format in INTEGER_FORMATS:
        padded = padded.float()
        if not bool(padded.isfinite().all()):
            raise ValueError(f"weight holds values that are not finite, which {format} cannot")
    if format == "int4":
        return PackedWeight(keep(_int4_data(padded)), None, format, (n, k))
    if format == "int8":
        q, scale = integers(padded, format)
        padded = (q + 128).to(torch.uint8)
    if depth == 1:
        data = padded.view(panels, PANEL, columns).transpose(1, 2)
    else:
        data = padded.view(panels, PANEL, columns // depth, depth).transpose(1, 2)
    return PackedWeight(keep(data), scale, format, (n, k))


def integers(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """The integers that ``weight [N, K]`` (float32, finite; K whole groups for int4) becomes, as float32 ``[N, K]``, and their scales: int8
    float32 ``[N]``, int4 float16 ``[N, K / 32]``. The rules are those of ``pack``."""
    if format == "int8":
        scale = weight.abs().amax(dim=1) / 127
        return (weight / torch.where(scale > 0, scale, 1)[:, None]).round_().clamp_(-127, 127), scale
    grouped = weight.view(len(weight), -1, INT4_GROUP)
    extreme = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))  # with its sign: it takes the longer side of -8..7
    scale = (extreme / -8).half()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"weight holds {float(extreme.abs().max()):g}, and int4 takes at most {8 * 65504}: its scales are float16")
    divisor = torch.where(scale == 0, 1, scale).float()
    q = torch.where(scale == 0, 0, (grouped / divisor).round_().clamp_(-8, 7))
    return q.view_as(weight), scale[..., 0]


def _int4_data(padded: Tensor) -> Tensor:
    rows, columns = padded.shape
    panels, groups = rows // PANEL, columns // INT4_GROUP
    integral, scale = integers(padded, "int4")
    q = integral + 8
    # [panel, half, i, group, nibble, j, b] -> [panel, group, half, j, i, b, nibble]
    q = q.to(torch.uint8).view(panels, 2, 16, groups, 2, 4, 4).permute(0, 3, 1, 5, 2, 6, 4)
    nibbles = (q[..., 0] | q[..., 1] << 4).reshape(panels, groups, PANEL * INT4_GROUP // 2)
    scales = scale.view(panels, PANEL, groups).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat([nibbles, scales], dim=2).contiguous()


def _int4_dense(data: Tensor) -> Tensor:
    panels, groups, _ = data.shape
    nibbles = data[..., : PANEL * INT4_GROUP // 2].view(panels, groups, 2, 4, 16, 4)
    q = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).to(torch.float32) - 8  # [panel, group, half, j, i, b, nibble]
    q = q.permute(0, 2, 4, 1, 6, 3, 5).reshape(panels * PANEL, groups, INT4_GROUP)
    scale = data[..., PANEL * INT4_GROUP // 2 :].contiguous().view(torch.float16).transpose(1, 2).reshape(panels * PANEL, groups, 1)
    return (q * scale.float()).reshape(panels * PANEL, groups * INT4_GROUP)
