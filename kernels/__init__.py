"""The engine's kernels, usable on their own: ``from engine import kernels; kernels.sample(...)``.

Importing this loads no backend: transformers asks for another distribution named ``kernels`` and, where this folder is in sight, imports it
under that name as well, while a compiled module can be loaded only once.
"""

from .api import (
    GREEDY_BELOW,
    STATUS_BAD_PARAMETER,
    STATUS_NAN,
    STATUS_NOTHING_ALLOWED,
    STATUS_OK,
    BeamResult,
    EndTokens,
    HeadDraw,
    LogitBias,
    Penalties,
    SampleResult,
    VerifyResult,
    beam_select,
    copy_blocks,
    embed,
    feed_tokens,
    linear,
    masses,
    move_tokens,
    paged_attention,
    rms_norm,
    rope_append,
    sample,
    sample_head,
    silu_mul,
    verify_block,
    verify_drafts,
)
from .head_draws import merge_draws
from .huge_pages import HugePages
from .packed import PackedWeight, pack
from .quantized import QuantizedWeight, quantize
from .registry import BACKENDS, OP_NAMES, Ops, backends, cuda_reason, select
from .threads import get_num_threads, set_num_threads, threads_pinned

__all__ = [
    "BACKENDS",
    "BeamResult",
    "HeadDraw",
    "HugePages",
    "OP_NAMES",
    "PackedWeight",
    "QuantizedWeight",
    "STATUS_BAD_PARAMETER",
    "STATUS_NAN",
    "STATUS_NOTHING_ALLOWED",
    "STATUS_OK",
    "EndTokens",
    "GREEDY_BELOW",
    "LogitBias",
    "Ops",
    "Penalties",
    "SampleResult",
    "VerifyResult",
    "backends",
    "beam_select",
    "copy_blocks",
    "cuda_reason",
    "embed",
    "feed_tokens",
    "get_num_threads",
    "linear",
    "masses",
    "merge_draws",
    "move_tokens",
    "pack",
    "paged_attention",
    "quantize",
    "rms_norm",
    "rope_append",
    "sample",
    "sample_head",
    "select",
    "set_num_threads",
    "silu_mul",
    "threads_pinned",
    "verify_block",
    "verify_drafts",
]
