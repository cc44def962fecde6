"""Copies within the KV cache on a GPU in Triton: ``copy_blocks`` and ``move_tokens`` (contracts in ``api``).

Elements are moved as integers of their size, so every dtype moves by its bits. Both depend on shapes alone for their grids and can be
captured in a CUDA graph; blocks and slots out of range, which are not read before the launch, are not followed: their entry copies
nothing, so -1 pads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .launch import Launch, check_device, launch, power_of_two, run
from .sample_row import kernel

_WORDS = 4096  # of 32 bits that a program of `copy_blocks` copies: 32 a thread, 16 bytes a load
_ENTRIES = 16  # tokens of a program of `move_tokens`
_SUB_BLOCK = tl.constexpr(checks.SUB_BLOCK)
_SCALE_BYTES = tl.constexpr(checks.SCALE_BYTES)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@kernel
def blocks_copy(keys, values, source, target, num_blocks, layers, words, BLOCK: tl.constexpr):
    """Grid: copies, parts of a block, keys and then values of each layer. Reads and writes every byte of the blocks once."""
    entry, part, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, to = tl.load(source + entry), tl.load(target + entry)
    if (first >= 0) & (first < num_blocks) & (to >= 0) & (to < num_blocks):
        at = part * BLOCK + tl.arange(0, BLOCK)
        if layer < layers:
            base = layer.to(tl.int64) * num_blocks
            tl.store(keys + (base + to) * words + at, tl.load(keys + (base + first) * words + at, mask=at < words), mask=at < words)
        else:
            base = (layer - layers).to(tl.int64) * num_blocks
            tl.store(values + (base + to) * words + at, tl.load(values + (base + first) * words + at, mask=at < words), mask=at < words)


@kernel
def tokens_move(
    keys, values, key_scales, value_scales, source, target, held, held_scales, entries, num_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """One of two passes: 0 copies the tokens from their slots into ``held``, 1 from there into their new slots.

    Grid: blocks of the entries, KV heads, keys and values of each layer. A token's keys lie in sectors of their own, 16 elements apart, and
    its values side by side.
    """
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    head, layer, is_value = tl.program_id(1), tl.program_id(2) // 2, tl.program_id(2) % 2
    num_heads = tl.num_programs(1)
    old = tl.load(source + entry, mask=entry < entries, other=-1)
    new = tl.load(target + entry, mask=entry < entries, other=-1)
    moves = (old >= 0) & (old // BLOCK_SIZE < num_blocks) & (new >= 0) & (new // BLOCK_SIZE < num_blocks)
    slot = new if PASS == 1 else old
    block = layer.to(tl.int64) * num_blocks + slot // BLOCK_SIZE
    sub_block = (block * num_heads + head) * (BLOCK_SIZE // _SUB_BLOCK) + slot % BLOCK_SIZE // _SUB_BLOCK
    lane = slot % _SUB_BLOCK
    d = tl.arange(0, BLOCK_D)
    moved = moves[:, None] & (d < HEAD_DIM)[None, :]
    width: tl.constexpr = _SUB_BLOCK * (HEAD_DIM if key_scales is None else HEAD_DIM + _SCALE_BYTES)
    kept = (entry.to(tl.int64) * num_heads + head) * tl.num_programs(2) + tl.program_id(2)
    holding = held + kept[:, None] * HEAD_DIM + d[None, :]
    if is_value == 0:
        _pass(keys + (sub_block * width + lane)[:, None] + d[None, :] * _SUB_BLOCK, holding, moved, PASS)
    else:
        _pass(values + (sub_block * width + lane * HEAD_DIM)[:, None] + d[None, :], holding, moved, PASS)
    if key_scales is not None:
        place = sub_block * (width // _SCALE_BYTES) + _SUB_BLOCK * HEAD_DIM // _SCALE_BYTES + lane
        if is_value == 0:
            _pass(key_scales + place, held_scales + kept, moves, PASS)
        else:
            _pass(value_scales + place, held_scales + kept, moves, PASS)


@triton.jit
def _pass(slots, held, moves, PASS: tl.constexpr):
    if PASS == 0:
        tl.store(held, tl.load(slots, mask=moves, other=0), mask=moves)
    else:
        tl.store(slots, tl.load(held, mask=moves, other=0), mask=moves)


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
