"""``paged_attention`` on a GPU in Triton: its launches (contract in ``api``; the kernels in ``attention_kernels``).

Grids depend on shapes alone, nothing waits for the host, and calls can be captured in a CUDA graph. Values out of range, which are not read
before the launch, do not raise: blocks are clamped to the cache, contexts to the block table, and rows of no sequence are not written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .attention_kernels import SPLIT as _SPLIT
from .attention_kernels import attention_merge, attention_splits, attention_walk
from .launch import Launch, check_device, launch, power_of_two, run

SPLIT = _SPLIT.value
LOG2_E = math.log2(math.e)
ROWS = 16  # of a query tile: the least that an MMA has
WIDE_ROWS = 64  # the least that Hopper's own MMA has
WIDE_HEAD_DIM = 128  # wide tiles of a larger head_dim, and those of earlier GPUs, would spill registers
# Splits are programs of their own while one program for each query tile would leave much of the GPU idle, or long contexts beside short
# ones would keep it waiting; their results may take this much memory.
MANY_PROGRAMS = 1024
MANY_QUERIES = 16  # for each sequence
MAX_SPLIT_BYTES = 256 << 20
_ALL_REGISTERS = {"maxnreg": 255}  # else ptxas may spill to halve them


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    *,
    scale: float,
    window: int = 0,
    tree_start: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """See ``api.paged_attention``."""
    return attend((q, key_cache, value_cache, block_table, query_start, context_len), scale, window, tree_start, ancestors)


def attend(
    step: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    window: int,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
    *,
    wide: bool = False,
) -> Tensor:
    """``paged_attention`` of its six first arguments. ``wide``: query tiles of WIDE_ROWS rows, for ``fast``."""
    q = step[0]
    checks.paged_attention(*step, window, tree_start, ancestors)
    check_device(q.device, "q")
    out = torch.empty_like(q)
    run(launches(out, *step, scale, window, tree_start, ancestors, wide=wide), q.device)
    return out


def launches(
    out: Tensor,
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    window: int,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
    *,
    split: bool | None = None,
    wide: bool = False,
) -> Sequence[Launch]:
    """The kernels of a call, with their grids and arguments. ``split``: whether splits are programs of their own; None: by the shapes."""
    tokens, heads, head_dim = q.shape
    sequences, max_blocks = block_table.shape
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2] * checks.SUB_BLOCK
    rows = WIDE_ROWS if wide else ROWS
    tile = _query_tile(heads // kv_heads, rows)
    tiles = tokens // tile["QUERIES"] + sequences
    grid = (tiles if tokens else 0, kv_heads * tile["HEAD_TILES"])
    splits = -(-max_blocks * block_size // SPLIT)
    if split is None:
        split = not wide and splits > 1 and _as_splits(tokens, sequences, heads, head_dim, splits, grid[0] * grid[1])
    given = _arguments(q, key_cache, value_cache, block_table, query_start, context_len, scale, window, tree_start, ancestors)
    shape = {**tile, **_key_tile(q, key_cache, head_dim), "ROWS": rows}
    if wide:
        shape |= {"SPLIT_TILES": 0, "TILE": 32}  # no splits: another order of sums
    if not split:
        return [launch(attention_walk, grid, given, shape, _ALL_REGISTERS, {"out": out})]
    # The split kernel fits two programs on an SM, and is compiled so, where its tiles are of 16 bits without a mask for head_dim.
    lean = head_dim == given["PADDED"] and max(q.element_size(), key_cache.element_size()) == 2
    kept = {
        "split_maximum": q.new_empty(tokens, heads, splits, dtype=torch.float32),
        "split_weight": q.new_empty(tokens, heads, splits, dtype=torch.float32),
        "split_total": q.new_empty(tokens, heads, splits, head_dim, dtype=torch.float32),
        "splits": splits,
    }
    names = (
        "query_start", "context_len", "tree_start", "ancestors", "tokens", "sequences", "max_blocks", "window",
        "HEADS", "BLOCK_SIZE", "DIM", "PADDED", "WINDOWED",
    )  # fmt: skip
    merge = {name: given[name] for name in names}
    return [
        launch(attention_splits, (*grid, splits), given, shape, {} if lean else _ALL_REGISTERS, kept),
        launch(attention_merge, (tokens, heads), merge, kept, {"out": out, "AHEAD": 8}),
    ]


def _as_splits(tokens: int, sequences: int, heads: int, head_dim: int, splits: int, programs: int) -> bool:
    few = tokens < MANY_QUERIES * sequences or programs < MANY_PROGRAMS
    return few and tokens * heads * splits * (head_dim + 2) * 4 <= MAX_SPLIT_BYTES


def _query_tile(group: int, rows: int) -> dict[str, int]:
    """How a tile of ``rows`` rows holds the queries and heads of a KV head: its heads, and how many such tiles a KV head has."""
    heads = min(group, rows)
    return {"TILE_HEADS": heads, "HEAD_TILES": -(-group // heads), "QUERIES": rows // heads}


def _key_tile(q: Tensor, key_cache: Tensor, head_dim: int) -> dict[str, int]:
    """How many positions a key tile has, and how deep their loads are pipelined: a matter of registers."""
    wide = power_of_two(max(head_dim, 16)) * max(q.element_size(), key_cache.element_size())
    if q.dtype == torch.float32:
        wide *= 2  # a product of float32 is three of halves that need registers
    tile = 64 if wide <= 256 and q.dtype != torch.float32 else 32 if wide <= 512 else 16
    return {"TILE": tile, "SPLIT_TILES": SPLIT // tile, "STAGES": 3 if q.dtype == torch.float32 else 5}


def _arguments(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    window: int,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
) -> dict[str, Any]:
    """What the kernels take, but for tiles and results."""
    tokens, heads, head_dim = q.shape
    blocks, kv_heads, sub_blocks = key_cache.shape[:3]
    scaled = key_cache.dtype in checks.SCALED_DTYPES
    return {
        "q": q,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "key_scales": key_cache.view(torch.float32) if scaled else None,
        "value_scales": value_cache.view(torch.float32) if scaled else None,
        "block_table": block_table,
        "query_start": query_start,
        "context_len": context_len,
        "tree_start": tree_start,
        "ancestors": ancestors,
        "tokens": tokens,
        "sequences": len(context_len),
        "blocks": blocks,
        "max_blocks": block_table.shape[1],
        "window": window,
        "factor": scale * LOG2_E,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": sub_blocks * checks.SUB_BLOCK,
        "DIM": head_dim,
        "PADDED": power_of_two(max(head_dim, 16)),
        "CHUNK": checks.SUB_BLOCK * (head_dim + (checks.SCALE_BYTES if scaled else 0)),
        "WINDOWED": window > 0,
    }
