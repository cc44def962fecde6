"""One signature for every op, and the choice of a backend."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from engine import kernels
from engine.kernels import api, registry


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


@pytest.mark.parametrize("op", registry.OP_NAMES)
@pytest.mark.parametrize("backend", registry.BACKENDS)
def test_signatures_are_those_of_the_api(backend: str, op: str) -> None:
    assert inspect.signature(getattr(_backend(backend), op)) == inspect.signature(getattr(api, op))


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


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend is 'fast'; known backends are auto, .*cpu.*reference"):
        kernels.select("cpu", "fast")


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
    with pytest.raises(ValueError, match="backend is 'quick'; known backends are auto, cpu, reference"):
        kernels.select("cpu")
