"""The tensors behind the blocks: keys and values of every layer, in the layout the kernels read."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .kernels.checks import CACHE_DTYPES, SCALE_BYTES, SUB_BLOCK
from .kernels.registry import Ops

# The cache takes memory as it fills; by default it may come to this share of what is free.
DEFAULT_SHARE = 0.25


class KVCache:
    """Paged keys and values of all layers.

    Args:
        num_layers, num_kv_heads, head_dim: the model's.
        num_blocks: blocks of ``block_size`` tokens; each exists once per layer.
        block_size: a positive multiple of 16.
        dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.int8`` (a scale for each token and KV head of keys and of values).

    Memory is reserved at once and, on a CPU, taken page by page as blocks are first written.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_dtype is {dtype}; the cache can hold torch.float32, torch.bfloat16 or torch.int8")
        blocks = (num_layers, num_blocks, num_kv_heads)
        sub_blocks = (*blocks, block_size // SUB_BLOCK, _sub_block_rows(head_dim, dtype), SUB_BLOCK)
        self._keys = torch.empty(sub_blocks, dtype=dtype)
        self._values = torch.empty(sub_blocks if dtype == torch.int8 else (*blocks, block_size, head_dim), dtype=dtype)
        # Views made once: indexing a tensor in the hot path costs more than a list does.
        self._key_layers = list(self._keys.unbind(0))
        self._value_layers = list(self._values.unbind(0))
        self._bytes = [tensor.view(torch.uint8).numpy() for tensor in (self._keys, self._values)]

    def key(self, layer: int) -> Tensor:
        """``[num_blocks, num_kv_heads, block_size // 16, head_dim, 16]``, of int8 with its scales (``kernels/api.py``)."""
        return self._key_layers[layer]

    def value(self, layer: int) -> Tensor:
        """``[num_blocks, num_kv_heads, block_size, head_dim]``, of int8 as the keys."""
        return self._value_layers[layer]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks ``(source, destination)`` in every layer."""
        # By NumPy: torch wakes OpenMP's threads for this, and they then spin on the cores that the kernels want.
        for source, destination in copies:
            for tensor in self._bytes:
                tensor[:, destination] = tensor[:, source]

    def move_tokens(self, ops: Ops, sources: list[int], targets: list[int]) -> None:
        """Copy the keys and values of single tokens between slots (``block * block_size + offset``) in every layer, all read before any is
        written."""
        source, target = torch.tensor([sources, targets], dtype=torch.int32)
        ops.move_tokens(self._keys, self._values, source, target)

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values, scales included."""
    return 2 * num_layers * num_kv_heads * _sub_block_rows(head_dim, dtype) * block_size * dtype.itemsize


def _sub_block_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Rows of 16 elements of a sub-block: of ``head_dim``, and in an int8 cache those that the scales take."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping, or a careful guess where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 4 << 30


def size_cache(cache_tokens: int | None, wanted_tokens: int, block_size: int, bytes_per_block: int) -> int:
    """How many blocks the cache gets: room for ``cache_tokens``, or for ``wanted_tokens`` as far as memory allows.

    Raises ``ValueError`` for less than one block and ``MemoryError`` where memory does not suffice.
    """
    available = available_memory()
    if cache_tokens is None:
        budget = int(available * DEFAULT_SHARE)
        if budget < bytes_per_block:
            raise MemoryError(
                f"one cache block of {block_size} tokens takes {bytes_per_block} bytes, and the cache may take {budget}, a quarter of "
                "what is free; free memory or choose a smaller block_size"
            )
        return max(1, min(-(-wanted_tokens // block_size), budget // bytes_per_block))
    num_blocks = cache_tokens // block_size
    if num_blocks < 1:
        raise ValueError(f"cache_tokens is {cache_tokens}; it must be at least one block of {block_size} tokens")
    if num_blocks * bytes_per_block > available:
        raise MemoryError(
            f"cache_tokens is {cache_tokens}, which takes {num_blocks * bytes_per_block} bytes; {available} are free, enough for "
            f"{available // bytes_per_block * block_size} tokens"
        )
    return num_blocks
