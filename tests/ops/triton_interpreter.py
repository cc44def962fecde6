"""What Triton's interpreter gets wrong about bfloat16 and loops, put right for the programs that run kernels in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def repair_bfloat16() -> None:
    """Its own conversions lose subnormal values, do not round to the nearest and take integers for bits, and its products multiply bits."""
    builder = interpreter.InterpreterBuilder
    convert, dot, cast = interpreter._convert_float, builder.create_dot, builder.cast_impl

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return _bfloat16(values).float().numpy().view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            # by way of bytes, as the original: what comes may have any strides
            wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
            return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, rounding)  # type: ignore[no-any-return]

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_bfloat16(t.data).float().numpy(), tl.float32) for t in (a, b))
        elif a.dtype.scalar == tl.float16:  # exact, and numpy has a fast product for it
            a, b = (interpreter.TensorHandle(t.data.astype(np.float32), tl.float32) for t in (a, b))
        return dot(self, a, b, d, precision, imprecise)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.cast_impl = cast_impl


def repair_ranges() -> None:
    """Bounds of loops are arrays of one element to it, which numpy 2.4 takes for no integer."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
