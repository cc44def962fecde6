"""The GPU backend in Triton (inside this package ``import triton`` is the compiler). Contracts in ``api``.

Importing this module does not import Triton, which takes a second; using an op does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

OPS = (
    "embed", "linear", "rms_norm", "silu_mul", "rope_append", "paged_attention", "move_tokens", "copy_blocks", "feed_tokens", "sample",
    "sample_head", "beam_select", "verify_drafts", "masses", "verify_block",
)  # fmt: skip
# Where they and what belongs to them are.
_MODULES = {
    "embed": "elementwise",
    "rms_norm": "elementwise",
    "silu_mul": "elementwise",
    "feed_tokens": "elementwise",
    "rope_append": "rope",
    "paged_attention": "attention",
    "move_tokens": "cache",
    "copy_blocks": "cache",
    "sample": "sampler",
    "Workspace": "sampler",
    "beam_select": "beam",
    "BeamWorkspace": "beam",
    "verify_drafts": "verify",
    "verify_block": "verify",
    "masses": "row_masses",
    "linear": "linear_launch",
    "sample_head": "head",
}


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, for tests: what Triton itself asks when it decorates them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type``, else the reason it cannot."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cpu":
        return None if _interpreted() else "Triton's kernels run on a GPU, and on cpu only in its interpreter (TRITON_INTERPRET=1)"
    if device_type != "cuda":
        return f"these kernels run on cuda, not on {device_type}"
    return None if torch.cuda.is_available() else "torch finds no CUDA GPU"


def describe() -> str:
    """What runs the kernels, as one line."""
    return "Triton's interpreter" if _interpreted() else f"Triton, compiled for {torch.cuda.get_device_name()}"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
