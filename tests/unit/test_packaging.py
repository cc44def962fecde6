"""The package as people meet it: beside transformers, without compiled modules, without a compiler, and as a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
HAS_CPU = (ROOT / "kernels" / f"_cpu{SUFFIX}").exists()


def _python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def _succeed(code: str, cwd: Path = ROOT, **env: str) -> str:
    done = _python("-c", code, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_generates_from_the_repository_root() -> None:
    """The folder kernels/ has the import name of another distribution, which transformers looks for; nothing may come of it."""
    pytest.importorskip("transformers")
    output = _succeed("""
import importlib.util, sys, torch
print(importlib.util.find_spec("kernels").origin)  # in sight
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0))
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape[1])
import engine, engine.kernels
print(engine.kernels.__name__, engine.kernels.backends()["reference"])
print([name for name in sys.modules if name.startswith("kernels.") and "cpu" in name])  # compiled modules cannot be loaded twice
""")
    assert output.split() == [str(ROOT / "kernels" / "__init__.py"), "7", "engine.kernels", "None", "[]"]


def test_engine_works_without_compiled_modules() -> None:
    output = _succeed(
        """
import sys
sys.modules["engine.kernels._cpu"] = sys.modules["engine.kernels._cuda"] = None  # as if they were not built
import torch, engine
from engine import kernels
from engine.kernels import api, registry
x = torch.arange(4.0)[None]
assert torch.equal(api.linear(x, [torch.eye(4)]), x)
print(registry.select("cpu").chosen["linear"])
print(kernels.backends()["cpu"])
""",
        ENGINE_KERNELS="reference",
    )
    chosen, reason = output.splitlines()
    assert chosen == "reference"
    assert "_cpu" in reason  # and so says why


def test_sources_see_no_torch_headers() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 5
    for path in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)\b", path.read_text()), path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, objects included, so that only what is out of date compiles again."""
    copy = tmp_path_factory.mktemp("package") / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "lock")
    for name in ("engine", "kernels", "csrc", "build/native"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=None if name == "build/native" else ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    return copy


def _build_in_place(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return _python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, **env)


def test_a_missing_compiler_costs_one_sentence(tree: Path) -> None:
    done = _build_in_place(tree, ENGINE_BUILD="auto", CXX="/nonexistent")
    assert done.returncode == 0
    sentence = "_cpu is not built, and the engine uses its PyTorch backend: the C++ compiler named by CXX=/nonexistent was not found."
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr and not list((tree / "kernels").glob("*.so"))


def test_a_missing_compiler_is_fatal_where_asked(tree: Path) -> None:
    done = _build_in_place(tree, ENGINE_BUILD="cpu", CXX="/nonexistent")
    assert done.returncode != 0
    assert "_cpu cannot be built: the C++ compiler" in done.stderr and "Traceback" not in done.stderr


def test_a_compiler_that_fails_costs_one_sentence(tree: Path) -> None:
    done = _build_in_place(tree, ENGINE_BUILD="auto", CXX="false", NVCC="false")
    assert done.returncode == 0
    assert "_cpu is not built, and the engine uses its PyTorch backend: its compilation failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_wheel(tree: Path, tmp_path: Path) -> None:
    """Built offline, it holds every Python file and data file of both folders and the compiled module, and works where it lies."""
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    built = _python("-m", "pip", "wheel", *offline, "-w", str(tmp_path), ".", cwd=tree, ENGINE_BUILD="auto")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("decoding_engine-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder, package in (("engine", "engine"), ("kernels", "engine/kernels")):
        for path in (tree / folder).rglob("*"):
            if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(tree / folder)}" in names
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/"))]
    assert any(name.endswith("LICENSE") for name in names)
    assert (f"engine/kernels/_cpu{SUFFIX}" in names) == HAS_CPU

    code = "import engine, engine.kernels as k; print(k.__file__); print(k.backends()['cpu'])"
    file, reason = _succeed(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert Path(file) == tmp_path / "site" / "engine" / "kernels" / "__init__.py"
    assert (reason == "None") == HAS_CPU


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CPU, reason="_cpu is not built here (no C++ compiler)")
def test_only_what_changed_is_rebuilt(tree: Path) -> None:
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if not ninja:
        pytest.skip("ninja is not installed")
    assert _build_in_place(tree, ENGINE_BUILD="cpu").returncode == 0

    def would_build() -> set[str]:
        command = [ninja, "-n", "-f", "build/native/_cpu/build.ninja"]
        output = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
        return {Path(line.split()[-1]).name for line in output.splitlines() if line.startswith("[")}

    assert not would_build()
    (tree / "csrc" / "cpu" / "thread_pool.cpp").touch()
    assert would_build() == {"thread_pool.cpp", f"_cpu{SUFFIX}"}
    (tree / "csrc" / "cpu" / "bind.h").touch()
    assert {"module.cpp", "thread_pool.cpp"} < would_build() and "dispatch.cpp" not in would_build()
