"""Which backend serves each op: an ordered table, asked once, each backend able to say why it cannot."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

logger = logging.getLogger("engine.kernels")

# Fastest first. A backend is a module of this package whose `unavailable(device_type)` returns None or the reason it cannot serve.
BACKENDS = ("cpu", "reference")


@dataclass(frozen=True)
class Ops:
    """The chosen function of every op (contracts in ``api``), and the backend each came from."""

    embed: Callable[..., Any]
    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope_append: Callable[..., Any]
    paged_attention: Callable[..., Any]
    silu_mul: Callable[..., Any]
    sample: Callable[..., Any]
    chosen: dict[str, str]  # op name -> backend name


OP_NAMES = tuple(f.name for f in fields(Ops) if f.name != "chosen")


def _module(backend: str) -> Any:
    return importlib.import_module(f".{backend}", __package__)


def backends(device_type: str = "cpu") -> dict[str, str | None]:
    """Every backend with None if it can serve ``device_type``, else the reason it cannot."""
    return {name: _module(name).unavailable(device_type) for name in BACKENDS}


def cuda_reason() -> str | None:
    """None if the compiled CUDA module can run here, else why not."""
    try:
        module = importlib.import_module("._cuda", __package__)
    except ImportError as error:
        return f"engine.kernels._cuda cannot be imported: {error}"
    reason: str | None = module.unavailable()
    return reason


@functools.cache
def select(device_type: str = "cpu", backend: str = "auto") -> Ops:
    """Choose a backend for every op.

    ``backend="auto"`` is the backend ``ENGINE_KERNELS`` names, or else the first that can serve, with one line logged where a faster one
    is absent. What was asked for by name and cannot be had (also the instruction set of ``ENGINE_CPU_ISA``) raises ``RuntimeError``.
    """
    if backend == "auto":
        backend = os.environ.get("ENGINE_KERNELS") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; known backends are auto, {', '.join(BACKENDS)}")
    reasons = backends(device_type)
    if backend != "auto":
        if reasons[backend] is not None:
            raise RuntimeError(f"backend {backend!r} was asked for but cannot run on {device_type}: {reasons[backend]}")
        name = backend
    else:
        if device_type == "cpu" and os.environ.get("ENGINE_CPU_ISA") and reasons["cpu"] is not None:
            raise RuntimeError(f"ENGINE_CPU_ISA asks for the C++ kernels, which cannot run: {reasons['cpu']}")
        name = next((n for n in BACKENDS if reasons[n] is None), "")
        if not name:
            raise RuntimeError(f"no backend can serve device {device_type!r}: {reasons}")
        for faster in BACKENDS[: BACKENDS.index(name)]:
            logger.warning("kernels: using %r on %s because %r is absent: %s", name, device_type, faster, reasons[faster])
    module = _module(name)
    return Ops(**{op: getattr(module, op) for op in OP_NAMES}, chosen=dict.fromkeys(OP_NAMES, name))


def default_ops(device: torch.device) -> Ops:
    """The ops of ``api``'s functions for a device."""
    return select(device.type)
