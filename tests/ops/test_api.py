"""One signature for every op, and the choice of a backend."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from engine import kernels
from engine.kernels import api, registry

TRITON_OPS = importlib.import_module("engine.kernels.triton").OPS


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    registry.select.cache_clear()
    yield
    registry.select.cache_clear()


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the module was not built."""
    monkeypatch.setattr(importlib.import_module("engine.kernels.cpu"), "unavailable", lambda device_type: "it was not built")


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"engine.kernels.{name}")


def _has(backend: str, op: str) -> bool:
    return backend not in ("cuda", "fast", "triton") or op in _backend(backend).OPS


@pytest.mark.parametrize(("backend", "op"), [(b, op) for b in registry.BACKENDS for op in registry.OP_NAMES if _has(b, op)])
def test_signatures_are_those_of_the_api(backend: str, op: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    assert inspect.signature(getattr(_backend(backend), op)) == inspect.signature(getattr(api, op))


def test_backends_have_the_ops_they_are_asked_for() -> None:
    """The GPU's have some, and what they have not they do not pretend to have."""
    for name in ("cuda", "fast", "triton"):
        backend = _backend(name)
        assert set(backend.OPS) <= set(registry.OP_NAMES)
        assert not [op for op in registry.OP_NAMES if op not in backend.OPS and hasattr(backend, op)]


@pytest.mark.parametrize("op", registry.OP_NAMES)
def test_ops_have_a_contract(op: str) -> None:
    assert inspect.getdoc(getattr(api, op))
    assert op in kernels.__all__


@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_unavailable_says_why(backend: str) -> None:
    assert inspect.signature(_backend(backend).unavailable) == inspect.signature(_backend("reference").unavailable)
    for device_type in ("cpu", "cuda", "meta"):
        reason = _backend(backend).unavailable(device_type)
        assert reason is None or (isinstance(reason, str) and reason)
    assert _backend("reference").unavailable("cuda") is None


def test_the_compiled_backend_is_chosen_where_it_exists() -> None:
    expected = "cpu" if kernels.backends("cpu")["cpu"] is None else "reference"
    ops = kernels.select("cpu")
    assert ops.chosen == dict.fromkeys(registry.OP_NAMES, expected)
    for op in registry.OP_NAMES:
        assert getattr(ops, op) is getattr(_backend(expected), op)


def test_api_calls_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(_backend("reference"), "silu_mul", lambda x: calls.append(x))
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    x = torch.zeros(1, 2)
    kernels.silu_mul(x)
    assert calls == [x]


def test_absent_backend_is_replaced_with_one_line(no_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="engine.kernels"):
        ops = kernels.select("cpu")
        kernels.select("cpu")
    assert set(ops.chosen.values()) == {"reference"}
    assert len(caplog.records) == 1 and "it was not built" in caplog.text


def test_absent_backend_asked_for_by_name_is_an_error(no_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="'cpu' was asked for but cannot run on cpu: it was not built"):
        kernels.select("cpu", "cpu")
    monkeypatch.setenv("ENGINE_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match="it was not built"):
        kernels.silu_mul(torch.zeros(1, 2))


def test_backend_that_cannot_serve_a_device() -> None:
    with pytest.raises(RuntimeError, match="cannot run on cuda"):
        kernels.select("cuda", "cpu")
    with pytest.raises(RuntimeError, match="'triton' was asked for but cannot run on meta: these kernels run on cuda"):
        kernels.select("meta", "triton")


def test_triton_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    unavailable = _backend("triton").unavailable
    assert "only in its interpreter" in unavailable("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable("cuda") == "torch finds no CUDA GPU"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert unavailable("cuda") == "the package triton is not installed"


def test_a_backend_asked_for_by_name_serves_the_ops_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest comes from the automatic choice, which on a CPU takes no interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(_backend("triton"), "_interpreted", lambda: True)  # the variable would stick to the kernels imported here
    expected = "cpu" if kernels.backends("cpu")["cpu"] is None else "reference"
    assert kernels.select("cpu").chosen == dict.fromkeys(registry.OP_NAMES, expected)
    ops = kernels.select("cpu", "triton")
    assert ops.chosen == {op: "triton" if op in TRITON_OPS else expected for op in registry.OP_NAMES}
    assert ops.sample is _backend("triton").sample


def test_a_gpu_has_kernels_of_its_own_for_every_op(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend("cuda"), "unavailable", lambda device_type: None)
    fast = set(_backend("fast").OPS)
    with caplog.at_level(logging.WARNING, logger="engine.kernels"):
        ops, deterministic = kernels.select("cuda"), kernels.select("cuda", deterministic=True)
    assert ops.chosen == {op: "fast" if op in fast else "triton" for op in registry.OP_NAMES}
    assert deterministic.chosen == dict.fromkeys(registry.OP_NAMES, "triton")
    assert not caplog.records
    with pytest.raises(RuntimeError, match="'fast' was asked for, and deterministic=True, which leaves it out"):
        kernels.select("cuda", "fast", deterministic=True)


def test_a_gpu_without_the_cuda_module_gets_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend("cuda"), "unavailable", lambda device_type: "it was not built")
    with caplog.at_level(logging.WARNING, logger="engine.kernels"):
        ops = kernels.select("cuda")
    assert "reference" not in ops.chosen.values() and ops.capturable
    assert [r.getMessage() for r in caplog.records] == ["kernels: 'triton' serves on cuda what 'cuda' would (cuda: it was not built)"]


def test_a_gpu_without_triton_gets_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend("triton"), "unavailable", lambda device_type: "the package triton is not installed")
    with caplog.at_level(logging.WARNING, logger="engine.kernels"):
        kernels.select("cuda")
    assert len(caplog.records) == 1
    assert "'reference' serves embed, " in caplog.text and "triton: the package triton is not installed" in caplog.text


def test_importing_the_engine_imports_no_triton() -> None:
    code = "import sys, engine, engine.kernels; engine.kernels.select('cpu'); assert 'triton' not in sys.modules, 'triton was imported'"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ENGINE_KERNELS")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("op", registry.OP_NAMES)
def test_a_first_argument_that_is_no_tensor(op: str) -> None:
    parameters = inspect.signature(getattr(api, op)).parameters.values()
    needed = [None for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    with pytest.raises(TypeError, match=" must be a tensor, got NoneType"):
        getattr(api, op)(*needed, **{p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty})


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend is 'quick'; known backends are auto, .*cpu.*reference"):
        kernels.select("cpu", "quick")


def test_tensors_of_another_device_are_refused() -> None:
    if kernels.backends("cpu")["cpu"] is not None:
        pytest.skip("the compiled backend is absent")
    cpu = _backend("cpu")
    with pytest.raises(ValueError, match="x is on meta"):
        cpu.silu_mul(torch.zeros(1, 2, device="meta"))
    with pytest.raises(ValueError, match="weight is on meta"):
        cpu.rms_norm(torch.zeros(1, 2), torch.zeros(2, device="meta"), 1e-6)


def test_an_instruction_set_that_cannot_be_had_is_an_error(no_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_CPU_ISA", "avx512")
    with pytest.raises(RuntimeError, match="ENGINE_CPU_ISA asks for the C\\+\\+ kernels, which cannot run: it was not built"):
        kernels.select("cpu")


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    assert set(kernels.select("cpu").chosen.values()) == {"reference"}
    registry.select.cache_clear()
    monkeypatch.setenv("ENGINE_KERNELS", "quick")
    with pytest.raises(ValueError, match="backend is 'quick'; known backends are auto, cpu, cuda, fast, triton, reference"):
        kernels.select("cpu")
