"""What the built CUDA module has in it, without a GPU: registers, shared memory and spills of each kernel on each architecture."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

cuda = pytest.importorskip("engine.kernels._cuda", reason="engine.kernels._cuda is not built here (no nvcc)")
triton = pytest.importorskip("triton")  # which brings cuobjdump

ARCHITECTURES = ("sm_80", "sm_90a")
KERNELS = {"noise_kernel"} | {f"{op}_kernel<{dtype}>" for op in ("sample", "beam") for dtype in ("float", "Bfloat16", "Float16")}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Usage(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    shared: int  # bytes known when compiling; `sample` and `beam_select` ask for more when they are launched
    stack: int  # bytes of local memory: a register that is spilled is there


def read_usages(told: str) -> list[Usage]:
    """What cuobjdump told."""
    usages = []
    for part in told.split("arch = ")[1:]:
        architecture = part.split()[0]
        for name, numbers in re.findall(r"Function (\S+):\s+(REG:.*)", part):
            used = dict(re.findall(r"([A-Z]+):(\d+)", numbers))
            kernel = re.findall(r"\d([a-z]+_kernel)", name)[0]
            if element := re.findall(r"_kernelI(?:f|NS0_\d+(\w+?)E)E", name):
                kernel += f"<{element[0] or 'float'}>"
            usages.append(Usage(kernel, architecture, int(used["REG"]), int(used["SHARED"]), int(used["STACK"])))
    return usages


def test_no_kernel_spills(capsys: pytest.CaptureFixture[str]) -> None:
    told = subprocess.run([str(CUOBJDUMP), "-res-usage", cuda.__file__], capture_output=True, text=True, check=True).stdout
    usages = [usage for usage in read_usages(told) if usage.architecture in ARCHITECTURES]
    with capsys.disabled():
        print()
        for row in (Usage._fields, *usages):
            print(f"{row[0]:24}", *(f"{value:>13}" for value in row[1:]))
    for architecture in ARCHITECTURES:
        assert {u.kernel for u in usages if u.architecture == architecture} == KERNELS
    assert [u for u in usages if u.stack] == []


def test_the_table_can_see_spills() -> None:
    told = """
arch = sm_80
 Function _ZN6engine4cuda44_GLOBAL__N__x13sample_kernelINS0_8Bfloat16EEEvNS0_10SampleArgsE:
  REG:64 STACK:48 SHARED:32 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert read_usages(told) == [Usage("sample_kernel<Bfloat16>", "sm_80", 64, 32, 48)]
