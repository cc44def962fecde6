"""Weight matrices quantised for a GPU, row-major or in blocks that its kernels read in one piece: int8, int4, fp8.

``data`` of an ``[N, K]`` matrix W, padded with zeros along K to ``B`` blocks of 64 (int4) or to a multiple of 64:

* int8: int8 ``[N, 64 B]``, ``W[n, k] ~ scale[n] * data[n, k]``, from -127 to 127; ``scale`` float32 ``[N]``.
* fp8: float8_e4m3fn ``[N, 64 B]``, likewise.
* int4: uint8 ``[B, N, 32]``: byte ``[b, n, j]`` has ``q + 8`` at k = 64 b + j in its low nibble and that 32 further in its high one;
  ``scale`` float16 ``[B, N, 2]``, one for each of its groups of 32: ``W[n, k] ~ scale[k // 64, n, k // 32 % 2] * q``, q from -8 to 7.
  A tile of outputs is one piece of memory, and so are its scales.

Activations stay as they are: only the weights have fewer bytes to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import FLOAT_FORMATS, INT4_GROUP, integers

FORMATS = ("int8", "int4", "fp8")
BLOCK = 64  # of K
LARGEST_FP8 = 448.0


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix ``[N, K]``; see the module for the order. Made by ``quantize``."""

    data: Tensor  # contiguous; shape and dtype by format
    scale: Tensor  # contiguous; likewise
    format: str  # one of FORMATS
    shape: tuple[int, int]  # N, K

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dense(self) -> Tensor:
        """The matrix that this stands for, float32 ``[N, K]``."""
        n, k = self.shape
        if self.format != "int4":
            return (self.data.float() * self.scale[:, None])[:, :k].contiguous()
        q = torch.stack([self.data & 15, self.data >> 4], dim=2).float() - 8  # [block, output, half, 32]
        return (q * self.scale.float()[..., None]).transpose(0, 1).reshape(n, -1)[:, :k].contiguous()


@torch.no_grad()
def quantize(weight: Tensor, format: str) -> QuantizedWeight:
    """Quantise ``weight [N, K]`` (fp32, bf16 or fp16) where it lies.

    int8 and int4 by the rules of ``packed.pack``. fp8: per output, ``scale = max|w| / 448``, weight / scale rounded to the nearest (ties
    to even). Weights that are not finite raise ``ValueError``, in int4 also those above 524,032.
    """
    if weight.dtype not in FLOAT_FORMATS or weight.dim() != 2:
        raise TypeError(f"weight must be [N, K] of float32, bfloat16 or float16, got {weight.dtype} {tuple(weight.shape)}")
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if not weight.numel():
        raise ValueError(f"weight is {list(weight.shape)}; it must have at least one output and one input")
    n, k = weight.shape
    blocks = -(-k // BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, blocks * BLOCK - k))
    if not bool(padded.isfinite().all()):
        raise ValueError(f"weight holds values that are not finite, which {format} cannot")
    if format == "fp8":
        scale = padded.abs().amax(dim=1) / LARGEST_FP8
        data = (padded / torch.where(scale > 0, scale, 1)[:, None]).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        return QuantizedWeight(data, scale, format, (n, k))
    q, scale = integers(padded, format)
    if format == "int8":
        return QuantizedWeight(q.to(torch.int8), scale, format, (n, k))
    halves = (q + 8).to(torch.uint8).view(n, blocks, 2, INT4_GROUP)
    data = (halves[:, :, 0] | halves[:, :, 1] << 4).transpose(0, 1).contiguous()
    return QuantizedWeight(data, scale.view(n, blocks, 2).transpose(0, 1).contiguous(), format, (n, k))
