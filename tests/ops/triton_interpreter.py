"""What the interpreter of Triton does otherwise than a GPU, put right for the programs that compare bits under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


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


def exact_products() -> None:
    """Products are of the values (the interpreter multiplies the bits of bfloat16), summed in float64 and rounded once, so that where an
    element lies in a tile makes no difference, as on a GPU (to NumPy's BLAS it does). Integers become bfloat16 by their value."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def wide(t: Any) -> Any:
        if t.dtype.scalar == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(t.data).view(np.int16)).view(torch.bfloat16).double().numpy()
        return t.data.astype(np.float64)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(wide(a), wide(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def bounds_of_loops() -> None:
    """They are arrays of one element, of which numpy 2.4 makes no integer."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
