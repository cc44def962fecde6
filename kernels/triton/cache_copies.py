"""The kernels of ``copy_blocks`` and ``move_tokens``, which ``KVCache`` calls: before a step for blocks that are about to be written, after
one for drafts that were accepted out of a tree. Elements are moved as integers of their size, so every dtype moves by its bits.

``copy_blocks`` reads and writes every byte of the blocks once. ``move_tokens`` does it twice: all tokens are read, into memory of the call,
before any is written, which takes a second launch where a grid cannot wait for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import checks
from .sample_row import kernel

_SUB_BLOCK = tl.constexpr(checks.SUB_BLOCK)
_SCALE_BYTES = tl.constexpr(checks.SCALE_BYTES)


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
