"""The threads of the C++ kernels: one pool for the process, apart from PyTorch's."""

from __future__ import annotations

import importlib
from typing import Any


def set_num_threads(n: int, *, pin: bool | None = None) -> None:
    """Let the C++ kernels use ``n`` threads, the caller of a kernel among them, from now on. Waits for a running kernel to end.

    Args:
        n: 1 to 1024. No result depends on it. More than the machine has cores is slower.
        pin: keep each thread but the caller on one CPU, the i-th of those that the process may run on (Linux). It pays where the system
            moves threads about: on machines with many cores or several memory nodes that run nothing else. Where other programs want the
            same CPUs it costs, as a pinned thread waits for its own. None: as before; at first as ``ENGINE_PIN_THREADS`` says (0 or 1).

    ``TypeError`` or ``ValueError`` for other arguments, ``RuntimeError`` where the C++ kernels are absent.
    """
    native = _native()
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n is {n!r}; it must be a whole number from 1 to {native.MAX_THREADS}")
    if not 1 <= n <= native.MAX_THREADS:
        raise ValueError(f"n is {n}; it must be a whole number from 1 to {native.MAX_THREADS}")
    if pin is not None and not isinstance(pin, bool):
        raise TypeError(f"pin is {pin!r}; it must be True, False or None")
    native.set_num_threads(n, pin)


def get_num_threads() -> int:
    """How many threads the C++ kernels use: what ``set_num_threads`` was given, else what ``ENGINE_NUM_THREADS`` says, else the CPUs that
    this process may use (its affinity mask, and its control group's quota if that is less).

    ``ValueError`` for a variable that holds no such number, ``RuntimeError`` where the C++ kernels are absent.
    """
    n: int = _native().num_threads()
    return n


def threads_pinned() -> bool:
    """Whether they are pinned: see ``set_num_threads``. Errors as of ``get_num_threads``, for ``ENGINE_PIN_THREADS``."""
    pinned: bool = _native().threads_pinned()
    return pinned


def _native() -> Any:
    cpu = importlib.import_module(".cpu", __package__)  # only now: importing the package loads no backend
    reason = cpu.unavailable("cpu")
    if reason is not None:
        raise RuntimeError(f"the C++ kernels, whose threads these are, are absent: {reason}")
    return cpu._cpu
