"""What the interpreter of Triton does otherwise than a GPU, put right for the programs that compare bits under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


def exact_conversions() -> None:
    """Conversions between float32, bfloat16 and float8 round to the nearest, ties to even, and keep subnormal values, as those of a GPU do
    (PTX: ``cvt.rn``, and ``cvt.rn.satfinite`` to float8, here of values within its range); the interpreter's own cut off the rest."""

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        del rounding  # nothing asks for another
        bits = np.ascontiguousarray(data)
        size = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
        x = torch.from_numpy(bits.view(f"u{bits.itemsize}")).view(_TORCH[source])
        y = x.to(_TORCH[target])
        return y.view(size[y.element_size()]).numpy()

    interpreter._convert_float = convert
