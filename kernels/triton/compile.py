"""Compiles every kernel ahead of time, without a GPU, and reports what the code uses: ``python -m engine.kernels.triton.compile``.

Registers spilled to memory make a kernel slow, fused multiply-adds make it wrong in the last bit: the tests fail on either. The variants
are those that calls of ``sample`` and ``beam_select`` specialise to: argument dtypes, what is absent, and whether sizes are multiples of
16. ``verify_drafts`` knows no others.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..api import EndTokens, LogitBias, Penalties, VerifyResult
from . import beam, sampler, verify
from .launch import WARPS, Launch

ARCHITECTURES = (80, 90)
_DTYPE = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Variant(NamedTuple):
    """A way to call ``sample`` and ``beam_select``."""

    name: str
    dtype: torch.dtype
    vocab: int
    lists: bool = False
    mask: bool = False
    logprobs: int | None = None  # of `sample`
    noise: bool = False  # of `beam_select`


VARIANTS = (
    Variant("plain bf16", torch.bfloat16, 128256),
    Variant("plain fp32", torch.float32, 151936),
    Variant("everything fp32", torch.float32, 128256, lists=True, mask=True, logprobs=5, noise=True),
    Variant("everything fp16, odd V", torch.float16, 50257, lists=True, mask=True, logprobs=5, noise=True),
    Variant("V = 1", torch.float32, 1, lists=True, mask=True, logprobs=1, noise=True),
    Variant("V = 2^22", torch.bfloat16, 1 << 22),
)


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


def _launches(v: Variant) -> Iterator[Launch]:
    """The launches of all calls on meta tensors."""

    def make(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, entries, groups, candidates = 2, 32, 1, 8
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    logits = make(v.dtype, rows, v.vocab)
    floats, ints, seed = make(f32, rows), make(i32, rows), make(i64, rows)
    lists: list[Any] = [None] * 3
    if v.lists:
        ids, starts = make(i32, entries), make(i32, rows + 1)
        lists = [
            Penalties(floats, floats, floats, ids, ids, starts),
            LogitBias(ids, make(f32, entries), starts),
            EndTokens(ids, ints, starts),
        ]
    lists.append(make(i32, rows, -(-v.vocab // 32)) if v.mask else None)
    workspace = sampler.Workspace(rows, v.vocab, "meta", v.logprobs or 0, lists=v.lists)
    call: list[Any] = [workspace, logits, floats, ints, floats, floats, seed, ints, ints, *lists, v.logprobs]
    yield from sampler.launches(*call)
    draw = (seed, ints) if v.noise else (None, None)
    beams = beam.BeamWorkspace(rows, v.vocab, groups, candidates, "meta", lists=v.lists)
    call = [beams, logits, floats, make(i32, groups + 1), candidates, floats, ints, ints, *draw, *lists]
    yield from beam.launches(*call)
    yield from verify.launches(VerifyResult(ints, ints), seed, ints, ints, ints, make(i32, rows + 1))


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
        else:
            signature[name] = "i32"
        aligned = not number or value % 16 == 0  # the allocator aligns tensors to more than 16 bytes
        if aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


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
    The code has FFMA only where it divides: five for each reciprocal, and those of the division's slow path behind the kernel."""
    loose = re.findall(r"\bfma\.|\b(?:mul|add|sub)\.(?:ftz\.)?f32", compiled.asm["ptx"])
    body = re.split(r"^\S*__cuda_\w*div\w*:", code, maxsplit=1, flags=re.MULTILINE)[0]
    return len(loose) + abs(len(re.findall(r"\bFFMA\b", body)) - 5 * len(re.findall(r"\bMUFU\.RCP\b", body)))


def table(
    variants: tuple[Variant, ...] = VARIANTS,
    architectures: tuple[int, ...] = ARCHITECTURES,
    kernels: Collection[str] = tuple(WARPS),
    *,
    fusion: bool = False,
) -> list[Usage]:
    """Compile kernels in every variant for every architecture; ``fusion`` as no launch has it, to see what it would do."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            for kernel, _grid, arguments in _launches(variant):
                if kernel.__name__ not in kernels:
                    continue
                options = {"num_warps": arguments["num_warps"], "enable_fp_fusion": fusion}
                for architecture in architectures:
                    compiled = triton.compile(_source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
                    rows.append(_usage(kernel, variant.name, architecture, options["num_warps"], compiled, Path(folder)))
    return rows


def show(usages: list[Usage]) -> None:
    """Print the table."""
    print()
    for row in (Usage._fields, *usages):
        print(f"{row[0]:14} {row[1]:24}", *(f"{value:>12}" if i == 0 else f"{value:>9}" for i, value in enumerate(row[2:])))


if __name__ == "__main__":
    show(table())
