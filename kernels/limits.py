"""The machine's limits, measured on the spot: the yardstick every speed is held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import cpu, huge_pages


def _best_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(num_bytes: int = 512 << 20, repeats: int = 5) -> float:
    """Bytes per second at which all threads together read ``num_bytes`` (in huge pages, as packed weights lie) over and over; the best
    of ``repeats``.

    Give the size of what a step reads: what fits a cache is read at the cache's speed.
    """
    count = max(num_bytes // 4, 1 << 14)
    data = huge_pages.reserve(4 * count)[: 4 * count].view(torch.float32).zero_()
    # Short reads are timed several at once, so that the clock's own cost does not show.
    inner = max(1, (64 << 20) // data.nbytes)
    if cpu.unavailable("cpu") is None:
        address = data.data_ptr()

        def read() -> None:
            for _ in range(inner):
                cpu._cpu.read_floats(address, count)
    else:

        def read() -> None:
            for _ in range(inner):
                data.sum()

    read()
    return data.nbytes * inner / _best_seconds(read, repeats)


def flop_rate(repeats: int = 5) -> float:
    """Floating-point operations per second of all threads together, multiply-adds from registers in float32; the best of ``repeats``."""
    if cpu.unavailable("cpu") is None:
        tasks = 4 * cpu._cpu.num_threads()
        operations = cpu._cpu.multiply_adds(tasks, 1000)
        rounds = 200_000
        operations = operations * rounds // 1000
        return operations / _best_seconds(lambda: cpu._cpu.multiply_adds(tasks, rounds), repeats)
    a = torch.ones(1024, 1024)
    return 2 * 1024**3 / _best_seconds(lambda: a @ a, repeats)
