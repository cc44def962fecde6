"""The engine's kernels, usable on their own: ``from engine import kernels; kernels.sample(...)``."""

from .api import (
    STATUS_BAD_PARAMETER,
    STATUS_NAN,
    STATUS_NOTHING_ALLOWED,
    STATUS_OK,
    EndTokens,
    LogitBias,
    Penalties,
    SampleResult,
    embed,
    linear,
    paged_attention,
    rms_norm,
    rope_append,
    sample,
    silu_mul,
)
from .registry import BACKENDS, OP_NAMES, Ops, backends, cuda_reason, select

__all__ = [
    "BACKENDS",
    "OP_NAMES",
    "STATUS_BAD_PARAMETER",
    "STATUS_NAN",
    "STATUS_NOTHING_ALLOWED",
    "STATUS_OK",
    "EndTokens",
    "LogitBias",
    "Ops",
    "Penalties",
    "SampleResult",
    "backends",
    "cuda_reason",
    "embed",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope_append",
    "sample",
    "select",
    "silu_mul",
]
