"""The cases of ``triton_cases`` and ``triton_beam_cases`` for the CUDA kernels on the emulated grid. As a program: ``library group...``,
which prints what is wrong (a kernel with a mistake planted in it may crash, so it needs a process of its own)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import triton_beam_cases
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
BEAM_GROUPS = {
    "shared": (2, 2, emulated.SHUFFLED),
    "ties": (3, 1, emulated.FORWARD),
    "bounds": (3, 3, emulated.BACKWARD),
    "top_k": (3, 2, emulated.SHUFFLED),
    "edges": (1, 6, emulated.BACKWARD),
    "group_positions": (2, 3, emulated.SHUFFLED),
    "bad_parameters": (1, 4, emulated.SHUFFLED),
    "workspaces": (3, 2, emulated.SHUFFLED),
}
_WHOLE = ("batch_positions", "group_positions", "statuses_of_bad_parameters", "bad_parameters", "workspaces")  # they compare by themselves


def run(library: ctypes.CDLL, name: str, patch: Callable[[Any, str, Any], None] = setattr) -> dict[str, Any]:
    """A group, as ``triton_cases.run``."""
    kernel = emulated.Emulated(library, *GROUPS[name])
    patch(triton_cases, "backend", SimpleNamespace(sample=kernel.sample, Workspace=kernel.workspace))
    group = getattr(triton_cases, name)
    outcome: dict[str, Any] = group() if name in _WHOLE else triton_cases.run(group(), kernel.sample)
    return outcome


def run_beams(library: ctypes.CDLL, name: str, patch: Callable[[Any, str, Any], None] = setattr) -> dict[str, Any]:
    """Likewise of ``triton_beam_cases``."""
    kernel = emulated.Emulated(library, *BEAM_GROUPS[name])
    patch(triton_beam_cases, "backend", SimpleNamespace(beam_select=kernel.beam_select, BeamWorkspace=kernel.beam_workspace))
    group = getattr(triton_beam_cases, name)
    outcome: dict[str, Any] = group() if name in _WHOLE else triton_beam_cases.run(group(), kernel.beam_select)
    return outcome


def mistake_is_found(folder: Path, file: str, right: str, wrong: str, group: str) -> bool:
    """Whether a group of cases fails with a mistake planted in the source."""
    shutil.copytree(emulated.ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    emulated.build(folder, source_root=folder / "csrc")
    program = [sys.executable, __file__, str(folder / "emulated_kernels.so"), group]
    done = subprocess.run(program, capture_output=True, text=True)
    return "the oracle's" in done.stdout or "every thread waits" in done.stderr or done.returncode < 0


if __name__ == "__main__":
    for group in sys.argv[2:]:
        run_group = run_beams if group in BEAM_GROUPS else run
        print(*run_group(ctypes.CDLL(sys.argv[1]), group)["wrong"], sep="\n")
