"""The tensors behind the blocks: keys and values of every layer, in the layout the kernels read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .device import upload
from .kernels.checks import CACHE_DTYPES, SCALE_BYTES, SCALED_DTYPES, SUB_BLOCK, device_has
from .kernels.registry import Ops

# By default the cache may come to this share of what is free. On a CPU it takes memory as it fills. On a GPU it takes it at once, and what
# is left is for activations and graphs.
DEFAULT_SHARE = {"cpu": 0.25, "cuda": 0.85}


class KVCache:
    """Paged keys and values of all layers.

    Args:
        num_layers, num_kv_heads, head_dim: the model's.
        num_blocks: blocks of ``block_size`` tokens; each exists once per layer.
        block_size: a positive multiple of 16.
        dtype: ``torch.float32``, ``torch.bfloat16``, or with a scale for each token and KV head of keys and of values ``torch.int8`` or, on
            a GPU of compute capability 8.9 or later, ``torch.float8_e4m3fn``.
        device: where the tensors are.

    Memory is reserved at once and, on a CPU, taken page by page as blocks are first written.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        check_kv_dtype(dtype, device)
        blocks = (num_layers, num_blocks, num_kv_heads)
        sub_blocks = (*blocks, block_size // SUB_BLOCK, _sub_block_rows(head_dim, dtype), SUB_BLOCK)
        self._keys = torch.empty(sub_blocks, dtype=dtype, device=device)
        values = sub_blocks if dtype in SCALED_DTYPES else (*blocks, block_size, head_dim)
        self._values = torch.empty(values, dtype=dtype, device=device)
        # Views made once: indexing a tensor in the hot path costs more than a list does.
        self._key_layers = list(self._keys.unbind(0))
        self._value_layers = list(self._values.unbind(0))

    def key(self, layer: int) -> Tensor:
        """``[num_blocks, num_kv_heads, block_size // 16, head_dim, 16]``, of int8 and float8 with scales (``kernels/api.py``)."""
        return self._key_layers[layer]

    def value(self, layer: int) -> Tensor:
        """``[num_blocks, num_kv_heads, block_size, head_dim]``, of int8 and float8 as the keys."""
        return self._value_layers[layer]

    def copy_blocks(self, ops: Ops, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks ``(source, target)`` in every layer, one after the other."""
        for sources, targets in _unordered(copies):
            ops.copy_blocks(self._keys, self._values, *self._int32(sources, targets))

    def move_tokens(self, ops: Ops, sources: list[int], targets: list[int]) -> None:
        """Copy the keys and values of single tokens between slots (``block * block_size + offset``) in every layer, all read before any is
        written."""
        ops.move_tokens(self._keys, self._values, *self._int32(sources, targets))

    def _int32(self, *columns: list[int]) -> Tensor:
        """Numbers of the host on the cache's device."""
        return upload(torch.tensor(columns, dtype=torch.int32), self._keys.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


def _unordered(copies: list[tuple[int, int]]) -> Iterator[tuple[list[int], list[int]]]:
    """The copies, cut so that the sources and targets of a part may be copied in any order, as the op does. A second part is rare: a block
    that one copy left to the prefix cache is taken for another."""
    sources: list[int] = []
    targets: list[int] = []
    for source, target in copies:
        if source in targets or target in targets or target in sources:
            yield sources, targets
            sources, targets = [], []
        sources.append(source)
        targets.append(target)
    if sources:
        yield sources, targets


def check_kv_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ``ValueError`` unless a cache on ``device`` can hold ``dtype``."""
    if dtype not in CACHE_DTYPES:
        raise ValueError(
            f"kv_dtype is {dtype}; the cache can hold torch.float32, torch.bfloat16 or torch.int8, on a GPU also torch.float8_e4m3fn"
        )
    if dtype == torch.float8_e4m3fn and device.type == "cpu":
        raise ValueError("kv_dtype is torch.float8_e4m3fn, which is for GPUs; on a CPU torch.int8 takes the same memory")
    device_has(device, dtype)


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values, scales included."""
    return 2 * num_layers * num_kv_heads * _sub_block_rows(head_dim, dtype) * block_size * dtype.itemsize


def _sub_block_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Rows of 16 elements of a sub-block: of ``head_dim``, and in a cache with scales those that they take."""
    return head_dim + SCALE_BYTES if dtype in SCALED_DTYPES else head_dim


def available_memory(device: torch.device) -> int:
    """Bytes of memory that can be taken without swapping, or a careful guess where the system does not say; of a GPU what is free, and what
    PyTorch holds without using it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
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


def size_cache(
    cache_tokens: int | None,
    wanted_tokens: int,
    block_size: int,
    bytes_per_block: int,
    device: torch.device | str = "cpu",
    share: float | None = None,
) -> int:
    """How many blocks the cache gets: room for ``cache_tokens``, or for ``wanted_tokens`` as far as a ``share`` (default:
    ``DEFAULT_SHARE``) of the free memory of ``device`` allows.

    Raises ``ValueError`` for less than one block and ``MemoryError`` where memory does not suffice.
    """
    device = torch.device(device)
    available = available_memory(device)
    if cache_tokens is None:
        share = DEFAULT_SHARE[device.type] if share is None else share
        budget = int(available * share)
        if budget < bytes_per_block:
            raise MemoryError(
                f"one cache block of {block_size} tokens takes {bytes_per_block} bytes, and the cache may take {budget}, {share:.0%} of "
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
