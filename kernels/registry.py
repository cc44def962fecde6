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

from . import crossover

logger = logging.getLogger("engine.kernels")

# Fastest first. A backend is a module of this package whose `unavailable(device_type)` returns None or the reason it cannot serve. It
# serves the ops it has functions for; the last has all.
BACKENDS = ("cpu", "cuda", "fast", "triton", "reference")


@dataclass(frozen=True)
class Ops:
    """The chosen function of every op (contracts in ``api``), and the backend each came from."""

    embed: Callable[..., Any]
    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope_append: Callable[..., Any]
    paged_attention: Callable[..., Any]
    move_tokens: Callable[..., Any]
    copy_blocks: Callable[..., Any]
    feed_tokens: Callable[..., Any]
    silu_mul: Callable[..., Any]
    sample: Callable[..., Any]
    sample_head: Callable[..., Any]
    beam_select: Callable[..., Any]
    verify_drafts: Callable[..., Any]
    masses: Callable[..., Any]
    verify_block: Callable[..., Any]
    chosen: dict[str, str]  # op name -> backend name

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step of a model: no op of it is the oracle's, which reads numbers on the host."""
        apart = ("beam_select", "verify_drafts", "masses", "verify_block", "move_tokens")
        return all(name != BACKENDS[-1] for op, name in self.chosen.items() if op not in apart)

    def sample_workspace(self) -> Any:
        """What a caller of ``sample`` can keep between its calls (``api.sample``); None where its backend has nothing to be kept."""
        workspace = getattr(_module(self.chosen["sample"]), "SampleWorkspace", None)
        return None if workspace is None else workspace()


def _automatic(backend: str, op: str, device_type: str) -> bool:
    """Whether the automatic choice may take a backend that can serve. Triton's interpreter is exact, and a thousand times too slow."""
    return crossover.automatic(op) if backend == "cuda" else (backend, device_type) != ("triton", "cpu")


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
def select(device_type: str = "cpu", backend: str = "auto", deterministic: bool = False) -> Ops:
    """Choose a backend for every op.

    ``deterministic`` leaves out the backend ``fast``, so that every row of every result has the same bits whatever else is in the call.

    ``backend="auto"`` is the backend ``ENGINE_KERNELS`` names, or else for each op the first that has it and can serve (on a CPU never
    Triton's interpreter), with one line logged where that leaves ops to the oracle. A backend asked for by name serves the ops it has,
    and the automatic choice the others: ``chosen`` says which. What was asked for by name and cannot run at all (also the instruction
    set of ``ENGINE_CPU_ISA``) raises ``RuntimeError``.
    """
    if backend == "auto":
        backend = os.environ.get("ENGINE_KERNELS") or "auto"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; known backends are auto, {', '.join(BACKENDS)}")
    reasons = backends(device_type)
    order = [name for name in BACKENDS if reasons[name] is None]
    if deterministic and "fast" in order:
        order.remove("fast")
    if backend != "auto":
        if reasons[backend] is not None:
            raise RuntimeError(f"backend {backend!r} was asked for but cannot run on {device_type}: {reasons[backend]}")
        if backend == "fast" and deterministic:
            raise RuntimeError("backend 'fast' was asked for, and deterministic=True, which leaves it out")
        order.insert(0, order.pop(order.index(backend)))
    elif device_type == "cpu" and os.environ.get("ENGINE_CPU_ISA") and reasons["cpu"] is not None:
        raise RuntimeError(f"ENGINE_CPU_ISA asks for the C++ kernels, which cannot run: {reasons['cpu']}")
    if not order:
        raise RuntimeError(f"no backend can serve device {device_type!r}: {reasons}")
    modules = {name: _module(name) for name in order}
    if "cpu" in order:
        modules["cpu"].check_environment()  # here rather than in the midst of a step
    chosen = {
        op: next(name for name in order if hasattr(modules[name], op) and (name == backend or _automatic(name, op, device_type)))
        for op in OP_NAMES
    }
    slow = [op for op, name in chosen.items() if name == BACKENDS[-1]]
    if backend == "auto" and slow:
        faster = "; ".join(f"{name}: {reasons[name] or 'has none of them'}" for name in BACKENDS[:-1] if name not in ("cuda", "fast"))
        logger.warning("kernels: %r serves %s on %s (%s)", BACKENDS[-1], ", ".join(slow), device_type, faster)
    elif backend == "auto" and device_type == "cuda" and reasons["cuda"] is not None:
        logger.warning("kernels: 'triton' serves on cuda what 'cuda' would (cuda: %s)", reasons["cuda"])
    return Ops(**{op: getattr(modules[name], op) for op, name in chosen.items()}, chosen=chosen)


def default_ops(name: str, first: Any) -> Ops:
    """The ops of ``api``'s functions for the device of their first argument, a tensor called ``name``."""
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(first).__name__}")
    return select(first.device.type)
