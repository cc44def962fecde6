"""What the interpreter of Triton does otherwise than a GPU, put right for the programs that compare bits under TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterable
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


def accesses_outside(launches: Iterable[tuple[Any, tuple[int, ...], dict[str, Any]]]) -> list[str]:
    """Run the launches; each kind of access to memory that belongs to none of a launch's tensors, which then is not made."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    outside: dict[str, None] = {}
    ranges: list[tuple[int, int]] = []

    def check(kind: str, kernel: str, pointers: Any, mask: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data.astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not (inside | ~mask.data).all():
            outside[f"{kernel} {kind} outside of its tensors"] = None
        return interpreter.TensorHandle(mask.data & inside, mask.dtype)

    for kernel, grid, arguments in launches:
        ranges[:] = [
            (t.data_ptr(), t.data_ptr() + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size())
            for t in arguments.values()
            if isinstance(t, torch.Tensor) and t.numel()
        ]
        name = kernel.__name__

        def checked_load(self: Any, pointers: Any, mask: Any, *how: Any, name: str = name) -> Any:
            return load(self, pointers, check("reads", name, pointers, mask), *how)

        def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any, name: str = name) -> Any:
            return store(self, pointers, value, check("writes", name, pointers, mask), *how)

        builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
        try:
            if all(grid):
                kernel[grid](**arguments)
        finally:
            builder.create_masked_load, builder.create_masked_store = load, store
    return list(outside)
