"""The cases of ``triton_cases`` for the CUDA kernel of ``sample`` on the emulated grid. As a program: ``library group...``, which prints
what is wrong (a kernel with a mistake planted in it may crash, so it needs a process of its own)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import emulated
import triton_cases

# Group of cases: blocks to a row, rows at a time, order of threads.
GROUPS = {
    "controls": (3, 2, emulated.SHUFFLED),
    "crossing": (2, 3, emulated.BACKWARD),
    "hostile": (2, 1, emulated.SHUFFLED),
    "search": (3, 1, emulated.BACKWARD),
    "flat_boundaries": (3, 1, emulated.SHUFFLED),
    "hard_boundaries": (2, 1, emulated.FORWARD),
    "large": (3, 2, emulated.FORWARD),
    "many_draws": (1, 4, emulated.SHUFFLED),
    "batch_positions": (3, 2, emulated.BACKWARD),
    "statuses_of_bad_parameters": (2, 2, emulated.SHUFFLED),
    "workspaces": (3, 2, emulated.SHUFFLED),
}
_WHOLE = ("batch_positions", "statuses_of_bad_parameters", "workspaces")  # they compare by themselves


def run(library: ctypes.CDLL, name: str, patch: Callable[[Any, str, Any], None] = setattr) -> dict[str, Any]:
    """A group, as ``triton_cases.run``."""
    kernel = emulated.Emulated(library, *GROUPS[name])
    patch(triton_cases, "backend", SimpleNamespace(sample=kernel.sample, Workspace=kernel.workspace))
    group = getattr(triton_cases, name)
    outcome: dict[str, Any] = group() if name in _WHOLE else triton_cases.run(group(), kernel.sample)
    return outcome


if __name__ == "__main__":
    for group in sys.argv[2:]:
        print(*run(ctypes.CDLL(sys.argv[1]), group)["wrong"], sep="\n")
