"""Copies within the KV cache on a GPU in Triton: ``copy_blocks`` and ``move_tokens`` (contracts in ``api``; the kernels in
``cache_copies``).

Grids depend on shapes alone and calls can be captured in a CUDA graph. Blocks and slots out of range, which are not read before the launch,
are not followed: their entry copies nothing, so -1 pads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import checks
from .cache_copies import blocks_copy, tokens_move
from .launch import Launch, check_device, launch, power_of_two, run

_WORDS = 4096  # of 32 bits that a program of `copy_blocks` copies: 32 a thread, 16 bytes a load
_ENTRIES = 16  # tokens of a program of `move_tokens`
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def copy_blocks(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """See ``api.copy_blocks``."""
    checks.copies(key_cache, value_cache, source, target)
    check_device(key_cache.device, "key_cache")
    run(copy_launches(key_cache, value_cache, source, target), key_cache.device)


def copy_launches(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> Sequence[Launch]:
    layers, num_blocks = key_cache.shape[:2]
    words = key_cache[0, 0].nbytes // 4 if num_blocks else 0
    given = {
        "keys": key_cache.view(torch.int32), "values": value_cache.view(torch.int32), "source": source, "target": target,
        "num_blocks": num_blocks, "layers": layers, "words": words, "BLOCK": _WORDS,
    }  # fmt: skip
    return [launch(blocks_copy, (len(source), triton.cdiv(words, _WORDS), 2 * layers), given)]


def move_tokens(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """See ``api.move_tokens``."""
    sizes = checks.copies(key_cache, value_cache, source, target)
    check_device(key_cache.device, "key_cache")
    run(move_launches(key_cache, value_cache, source, target, sizes), key_cache.device)


def move_launches(key_cache: Tensor, value_cache: Tensor, source: Tensor, target: Tensor, sizes: checks.CacheShape) -> Sequence[Launch]:
    entries, parts = len(source), 2 * len(key_cache)
    bits = _BITS[key_cache.element_size()]
    held = torch.empty((entries, sizes.num_kv_heads, parts, sizes.head_dim), dtype=bits, device=key_cache.device)
    scaled = key_cache.dtype in checks.SCALED_DTYPES
    given = {
        "keys": key_cache.view(bits), "values": value_cache.view(bits), "source": source, "target": target, "held": held,
        "key_scales": key_cache.view(torch.int32) if scaled else None, "value_scales": value_cache.view(torch.int32) if scaled else None,
        "held_scales": held.new_empty((entries, sizes.num_kv_heads, parts), dtype=torch.int32) if scaled else None,
        "entries": entries, "num_blocks": sizes.num_blocks,
        "HEAD_DIM": sizes.head_dim, "BLOCK_SIZE": sizes.block_size, "BLOCK_D": power_of_two(sizes.head_dim), "ENTRIES": _ENTRIES,
    }  # fmt: skip
    grid = (triton.cdiv(entries, _ENTRIES), sizes.num_kv_heads, parts)
    return [launch(tokens_move, grid, given, {"PASS": n}) for n in (0, 1)]
