"""Compiles every kernel ahead of time, without a GPU, and reports what the code uses: ``python -m engine.kernels.triton.compile``.

Registers spilled to memory make a kernel slow, fused multiply-adds make it wrong in the last bit: the tests fail on either. (Products of
float32 are made of fused multiply-adds, explicitly and so always alike; no test compiles them.) A module
``cases_*`` for each family of ops names the ways in which calls specialise its kernels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import cases_attention, cases_decide, cases_forward, cases_head, cases_linear
from .launch import OPTIONS, WARPS, Launch

ARCHITECTURES = (80, 90)
# Of each family of ops: the name of a variant, and the launches of calls on meta tensors.
CASES: tuple[Callable[[], Iterator[tuple[str, Iterable[Launch]]]], ...] = (
    cases_decide.cases, cases_forward.cases, cases_linear.cases, cases_head.cases, cases_attention.cases,
)  # fmt: skip
_DTYPE = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Usage(NamedTuple):
    """What one kernel's code uses."""

    kernel: str
    variant: str
    architecture: int
    warps: int
    registers: int
    shared: int  # bytes
    stack: int  # bytes of local memory
    spills: int  # instructions that access local memory
    fused: int  # multiplications and additions that do not round by themselves


def _source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel specialised to arguments as a launch would specialise it."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        number = isinstance(value, int)
        if parameter.is_constexpr or value is None or (number and value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _DTYPE[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        aligned = isinstance(value, Tensor) or (number and value % 16 == 0)  # the allocator aligns tensors to more than 16 bytes
        if aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _serves(architecture: int, arguments: dict[str, Any]) -> bool:
    """Whether the architecture has the dtypes of a call, and attention's wide tiles."""
    if architecture < 90 and arguments.get("SPLIT_TILES") == 0:
        return False
    return architecture >= 89 or not any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments.values())


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / tool), *arguments], check=True, capture_output=True, text=True).stdout


def _usage(kernel: Any, variant: str, architecture: int, warps: int, compiled: Any, folder: Path) -> Usage:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    used = _run("cuobjdump", "-res-usage", str(cubin))
    code = _run("nvdisasm", "-c", str(cubin))
    registers, stack = (int(re.findall(rf"{word}:(\d+)", used)[-1]) for word in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Usage(kernel.__name__, variant, architecture, warps, registers, compiled.metadata.shared, stack, spills, _fused(compiled, code))


def _fused(compiled: Any, code: str) -> int:
    """How many multiplications and additions are, or may be, one operation. In PTX each must be rounded by itself (`.rn` forbids fusing).
    The code has FFMA only where it divides: five for each reciprocal, and those of the division's slow path behind the kernel; none for
    the reciprocal of an approximate division, and one in each of float64."""
    ptx = compiled.asm["ptx"]
    loose = re.findall(r"\bfma\.|\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)", ptx)
    body = re.split(r"^\S*__cuda_\w*div\w*:", code, maxsplit=1, flags=re.MULTILINE)[0]
    reciprocals = len(re.findall(r"\bMUFU\.RCP\b", body)) - len(re.findall(r"\bdiv\.full\.", ptx))
    divisions = 5 * reciprocals + len(re.findall(r"\bdiv\.rn\.f64\b", ptx))
    return len(loose) + abs(len(re.findall(r"\bFFMA\b", body)) - divisions)


def table(
    variants: Collection[str] | None = None,
    architectures: tuple[int, ...] = ARCHITECTURES,
    kernels: Collection[str] = tuple(WARPS),
    *,
    fusion: bool = False,
) -> list[Usage]:
    """Compile kernels in every variant, or those named, for every architecture; ``fusion`` as no launch has it, to see what it would do."""
    rows = []
    named = [case for cases in CASES for case in cases() if variants is None or case[0] in variants]
    with tempfile.TemporaryDirectory() as folder:
        for variant, launches in named:
            for kernel, _grid, arguments in launches:
                if kernel.__name__ not in kernels:
                    continue
                options = {name: arguments[name] for name in OPTIONS if name in arguments} | {"enable_fp_fusion": fusion}
                for architecture in (a for a in architectures if _serves(a, arguments)):
                    compiled = triton.compile(_source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
                    rows.append(_usage(kernel, variant, architecture, arguments["num_warps"], compiled, Path(folder)))
    return rows


def show(usages: list[Usage]) -> None:
    """Print the table."""
    print()
    for row in (Usage._fields, *usages):
        print(f"{row[0]:14} {row[1]:24}", *(f"{value:>12}" if i == 0 else f"{value:>9}" for i, value in enumerate(row[2:])))


if __name__ == "__main__":
    show(table())
