"""Every CUDA source compiled ahead of time, without a GPU: registers, shared memory, spills of each kernel on each architecture."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = re.search(r'NVCC_FLAGS = \(\s*"([^"]*)"', (ROOT / "setup.py").read_text())
KERNELS = {"noise_kernel", "sample_kernel<float>", "sample_kernel<Bfloat16>", "sample_kernel<Float16>"}

nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(nvcc is None, reason="nvcc is not installed")


class Usage(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    shared: int  # bytes known when compiling; `sample` asks for more when it is launched
    stack: int  # bytes of local memory
    spills: int  # bytes stored to it


def compile_source(source: Path, folder: Path) -> list[Usage]:
    """The kernels of one source, with the flags of the build."""
    assert FLAGS is not None
    command = [str(nvcc), *shlex.split(FLAGS[1]), "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-fatbin"]
    done = subprocess.run([*command, str(source), "-o", str(folder / f"{source.stem}.fatbin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return read_usages(done.stderr)


def read_usages(told: str) -> list[Usage]:
    """What the assembler told."""
    usages = []
    for part in told.split("Compiling entry function")[1:]:
        name, architecture = re.findall(r"'(\S+)' for '(\w+)'", part)[0]
        kernel = re.findall(r"\d([a-z]+_kernel)", name)[0]
        if element := re.findall(r"_kernelI(?:f|NS0_\d+(\w+?)E)E", name):
            kernel += f"<{element[0] or 'float'}>"
        numbers = {
            what: int(found) for found, what in re.findall(r"(\d+) (registers|bytes smem|bytes stack frame|bytes spill stores)", part)
        }
        usages.append(
            Usage(
                kernel, architecture, numbers["registers"], numbers.get("bytes smem", 0), numbers["bytes stack frame"],
                numbers["bytes spill stores"],
            )
        )  # fmt: skip
    return usages


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        return [usage for usages in pool.map(lambda source: compile_source(source, folder), SOURCES) for usage in usages]


def test_every_kernel_compiles_without_spills(compiled: list[Usage], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print()
        for row in (Usage._fields, *compiled):
            print(f"{row[0]:26}", *(f"{value:>13}" for value in row[1:]))
    for architecture in ARCHITECTURES:
        assert {u.kernel for u in compiled if u.architecture == architecture} == KERNELS
    assert [u for u in compiled if u.spills or u.stack] == []


def test_the_table_can_see_spills() -> None:
    told = """ptxas info    : Compiling entry function '_ZN6engine4cuda44_GLOBAL__N__x13sample_kernelINS0_8Bfloat16EEEvNS0_10SampleArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN6engine4cuda44_GLOBAL__N__x13sample_kernelINS0_8Bfloat16EEEvNS0_10SampleArgsE
    48 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 48 bytes cumulative stack size, 32 bytes smem, 688 bytes cmem[0]
"""  # noqa: E501 as ptxas prints it
    assert read_usages(told) == [Usage("sample_kernel<Bfloat16>", "sm_80", 64, 32, 48, 16)]
