"""Builds ``engine.kernels._cpu`` (with any C++17 compiler) and ``engine.kernels._cuda`` (where nvcc is found).

The modules see no torch headers: pybind11 over raw pointers, so that one build serves every torch version. ninja rebuilds what changed.

``ENGINE_BUILD``: ``auto`` (default: a module that cannot be built costs one sentence, and its ops come from the next backend), ``none``
(compile nothing), ``cpu`` (fail where _cpu cannot be built), ``cuda`` (fail where either cannot). ``CXX``, ``NVCC``: the compilers.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/native")  # relative: a copy of the tree with its build folder rebuilds nothing

WARNINGS = "-Wall -Wextra"
CXX_FLAGS = f"-O3 -std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fvisibility=hidden -pthread {WARNINGS}"  # never -ffast-math
NVCC_FLAGS = (
    "-O3 -std=c++17 --fmad=false -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall"
)
ISA_FLAGS = {"portable": ""}
VNNI_FLAGS: dict[str, str] = {}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = ISA_FLAGS["avx2"] + " -mavx512f -mavx512bw -mavx512vl -mavx512dq"
    # GCC 12 finds fault with its own AVX-512 header (GCC bug 105593); the third is for clang, which knows no second.
    ISA_FLAGS["avx512"] += " -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
    # The integer products once more, with the instruction that adds four of them (csrc/cpu/dispatch.cpp puts them into a table of their own).
    VNNI_FLAGS = {"avx512vnni": ISA_FLAGS["avx512"] + " -mavx512vnni"}


class CannotBuild(Exception):
    """Why a module is not built, as one sentence."""


class Job(NamedTuple):
    """One command of the build: ``{depfile}`` in it is where the compiler lists the headers it read."""

    command: str
    inputs: list[Path]
    output: Path


def _executable(names: list[str]) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _cxx() -> str:
    """The C++ compiler's command: $CXX (which may hold options or a launcher such as ccache), else the first known name on the PATH."""
    if wanted := os.environ.get("CXX"):
        if not shutil.which(shlex.split(wanted)[0]):
            raise CannotBuild(f"the C++ compiler named by CXX={wanted} was not found")
        return wanted
    found = _executable(["c++", "g++", "clang++"])
    if not found:
        raise CannotBuild("no C++ compiler was found (looked for $CXX, c++, g++, clang++)")
    return shlex.quote(found)


def _nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = _executable([os.environ.get("NVCC", ""), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)])
    if not found:
        raise CannotBuild("nvcc was not found (looked for $NVCC, the PATH, $CUDA_HOME/bin)")
    return shlex.quote(found)


def _include_flags() -> str:
    """Python's headers and pybind11's: the package's own, else the copy inside torch. Nothing is imported."""
    found = None
    for package, sub in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            folder = Path(spec.origin).parent / sub
            if (folder / "pybind11" / "pybind11.h").exists():
                found = folder
                break
    if not found:
        raise CannotBuild("pybind11's headers were not found (neither the pybind11 package nor torch is installed)")
    if "torch" in found.parts:  # only pybind11 must be in sight, no torch header
        link = ROOT / BUILD / "pybind11-of-torch"
        link.mkdir(parents=True, exist_ok=True)
        if not (link / "pybind11").exists():
            (link / "pybind11").symlink_to(found / "pybind11")
        found = link
    folders = [found, Path(sysconfig.get_paths()["include"])]
    return "-Icsrc " + " ".join(f"-isystem {shlex.quote(str(folder))}" for folder in folders)


def _sources(pattern: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted(ROOT.glob(pattern))]


def _plan(name: str, output: Path) -> list[Job]:
    """Compile jobs and, last, the link job of a module; raises CannotBuild when a tool is missing."""
    folder = BUILD / name
    compile_tail = "-MD -MF {depfile} -c"
    cxx = _cxx()
    cpp = f"{cxx} {CXX_FLAGS} {_include_flags()}"
    jobs = []

    def add(source: Path, command: str, suffix: str = "") -> None:
        target = folder / f"{source.name}{suffix}.o"
        jobs.append(Job(f"{command} {compile_tail} {source} -o {target}", [source], target))

    if name == "_cpu":
        linker = f"{cxx} -shared -pthread" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")
        for source in _sources("csrc/cpu/*.cpp"):
            add(source, cpp)
        for source in _sources("csrc/cpu/isa/*.cpp"):
            for isa, flags in (ISA_FLAGS | VNNI_FLAGS if source.stem == "linear_int" else ISA_FLAGS).items():
                add(source, f"{cpp} {flags} -DENGINE_ISA={isa}", f".{isa}")
    else:
        nvcc = f"{_nvcc()} -ccbin {cxx}"
        linker = f"{nvcc} -shared"  # nvcc links the CUDA runtime statically
        for source in _sources("csrc/cuda/*.cpp"):
            add(source, cpp)
        for source in _sources("csrc/cuda/*.cu"):
            add(source, f"{nvcc} {NVCC_FLAGS} -Icsrc")
    if not jobs:
        raise CannotBuild("there are no sources")
    objects = [job.output for job in jobs]
    jobs.append(Job(f"{linker} {' '.join(map(str, objects))} -o {output}", objects, output))
    return jobs


def _run_with_ninja(ninja: str, jobs: list[Job]) -> bool:
    """Only what changed, headers included. True when every command succeeded."""
    lines = ["builddir = " + str(jobs[-1].output.parent), "rule run", "  command = $cmd", "  description = $out"]
    lines += ["rule compile", "  command = $cmd", "  description = $in", "  depfile = $out.d", "  deps = gcc"]
    for job in jobs:
        rule = "compile" if "{depfile}" in job.command else "run"
        command = job.command.replace("{depfile}", f"{job.output}.d").replace("$", "$$")
        lines += [f"build {job.output}: {rule} {' '.join(map(str, job.inputs))}", f"  cmd = {command}"]
    script = jobs[-1].output.parent / "build.ninja"
    text = "\n".join(lines) + "\n"
    if not (ROOT / script).exists() or (ROOT / script).read_text() != text:
        (ROOT / script).write_text(text)
    return subprocess.run([ninja, "-f", str(script), "--quiet"], cwd=ROOT).returncode == 0


def _run_without_ninja(jobs: list[Job]) -> bool:
    """Everything, on a few threads. True when every command succeeded."""

    def run(job: Job) -> bool:
        return subprocess.run(job.command.replace("{depfile}", f"{job.output}.d"), shell=True, cwd=ROOT).returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(list(pool.map(run, jobs[:-1]))) and run(jobs[-1])


def _ninja() -> str | None:
    """ninja's binary: beside this Python (a virtual environment need not be active), else on the PATH."""
    return shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")


def _build(name: str, output: Path) -> None:
    """Bring ``output`` up to date or raise CannotBuild. A lock keeps two builds of one tree apart."""
    (ROOT / output.parent).mkdir(parents=True, exist_ok=True)
    with (ROOT / output.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = _plan(name, output)
        ninja = _ninja()
        if not (_run_with_ninja(ninja, jobs) if ninja else _run_without_ninja(jobs)):
            raise CannotBuild("its compilation failed (the compiler's messages are above)")


class NativeBuild(build_ext):
    """``build_ext`` that leaves the compiling to ninja and never lets a missing tool end an installation."""

    def run(self) -> None:
        mode = os.environ.get("ENGINE_BUILD", "auto")
        if mode not in ("auto", "none", "cpu", "cuda"):
            raise SystemExit(f"ENGINE_BUILD is {mode!r}; it may be auto, none, cpu or cuda")
        required = {"cpu": ("_cpu",), "cuda": ("_cpu", "_cuda")}.get(mode, ())
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            if mode == "none":
                print(f"engine.kernels.{name} is not built: ENGINE_BUILD=none")
                continue
            destination = Path(self.get_ext_fullpath(extension.name))
            output = BUILD / name / destination.name
            try:
                _build(name, output)
            except CannotBuild as reason:
                if name in required:
                    raise SystemExit(f"engine.kernels.{name} cannot be built: {reason}.") from None
                other = "the engine uses its PyTorch backend" if name == "_cpu" else "GPU kernels written in CUDA are left out"
                print(f"engine.kernels.{name} is not built, and {other}: {reason}.", file=sys.stderr)
                (ROOT / destination).unlink(missing_ok=True)  # an older one would not be what the sources say
                continue
            self._place(ROOT / output, ROOT / destination)

    @staticmethod
    def _place(built: Path, destination: Path) -> None:
        """Copy by renaming, so that a process that has the old module mapped keeps it."""
        if destination.exists() and destination.stat().st_mtime_ns == built.stat().st_mtime_ns:
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(f"{destination.name}.{os.getpid()}")
        shutil.copy2(built, partial)
        partial.replace(destination)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


# The folder kernels/ is the package engine.kernels: a top-level package `kernels` would shadow another distribution of that name, which
# transformers imports.
kernels = ["engine.kernels", *(f"engine.kernels.{name}" for name in find_packages("kernels"))]
setup(
    packages=[*find_packages(include=["engine", "engine.*"]), *kernels],
    package_dir={"engine.kernels": "kernels"},
    ext_modules=[Extension(f"engine.kernels.{name}", sources=[]) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": NativeBuild},
)
