"""How the kernels of an op are launched: what the modules of the ops share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from ..api import EndTokens, LogitBias, Penalties
from .sample_row import CHUNK as _CHUNK
from .sample_scan import sample_scan

CHUNK = _CHUNK.value
# Threads of each kernel / 32, tuned for registers: see `compile`.
WARPS = {
    "attention_walk": 8,
    "attention_splits": 8,
    "attention_merge": 1,
    "sample_adjust": 4,
    "sample_scan": 8,
    "sample_settle": 16,
    "sample_masses": 4,
    "sample_gather": 8,
    "sample_resolve": 16,
    "sample_race": 8,
    "sample_finish": 4,
    "beam_scan": 8,
    "beam_filter": 16,
    "beam_mass": 8,
    "beam_best": 16,
    "beam_bound": 16,
    "beam_gather": 8,
    "beam_finish": 8,
    "verify_walk": 1,
    "masses_write": 8,
    "chain_totals": 4,
    "chain_weights": 1,
    "chain_residuals": 4,
    "chain_accept": 1,
    "chain_draw": 4,
    "chain_tokens": 1,
    "embed_rows": 4,
    "quantized_rows": 4,
    "norm_rows": 4,
    "silu_rows": 4,
    "feed_rows": 4,
    "rope_heads": 8,
    "tokens_move": 4,
    "blocks_copy": 4,
    "linear_tiles": 4,
    "linear_finish": 4,
    "head_tiles": 4,
    "head_merge": 4,
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")  # of a launch that are no arguments of its kernel
_PENALTIES = ("repetition", "presence", "frequency", "penalty_token", "penalty_count", "penalty_start")

Launch = tuple[Any, tuple[int, ...], dict[str, Any]]  # a kernel, its grid and its arguments


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def check_device(device: torch.device, name: str = "logits") -> None:
    """Raise ``ValueError`` unless the kernels run on ``device``, that of the argument ``name``."""
    if not (device.type == "cuda" or isinstance(sample_scan, InterpretedFunction)):
        raise ValueError(f"{name} is on {device}; these kernels run on cuda (on cpu only in Triton's interpreter)")


def check_same_device(workspace: torch.device, device: torch.device) -> None:
    """Raise ``ValueError`` unless a workspace is on the device of the logits."""
    if workspace.type != device.type or (workspace.index is not None and workspace != device):
        raise ValueError(f"workspace is on {workspace} while logits is on {device}")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: dict[str, Any]) -> Launch:
    """A launch with the arguments of all the dictionaries."""
    merged: dict[str, Any] = {"num_warps": WARPS[kernel.__name__], "enable_fp_fusion": False}
    for part in arguments:
        merged |= part
    return kernel, grid, merged


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch one after the other; a grid without programs is none."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for kernel, grid, arguments in launches:
            if all(grid):
                kernel[grid](**arguments)


def list_arguments(penalties: Penalties | None, bias: LogitBias | None, end_tokens: EndTokens | None) -> dict[str, Any]:
    """The lists as ``sample_adjust`` takes them."""
    p, b, e = penalties, bias, end_tokens
    return {
        **dict(zip(_PENALTIES, p or [None] * 6, strict=True)),
        "penalty_size": p.token.numel() if p else 0,
        **dict(zip(("bias_token", "bias_value", "bias_start"), b or [None] * 3, strict=True)),
        "bias_size": b.token.numel() if b else 0,
        **dict(zip(("end_token", "end_position", "end_start"), e or [None] * 3, strict=True)),
        "end_size": e.token.numel() if e else 0,
    }
