"""How a GPU is timed: calls captured in one graph, replayed between two events; and what the GPU can do at most, measured by the same.

Steps of decoding are graphs too, so that the time of a kernel is its time in them: without Python's launches, and right behind another. On
a CPU, where these programs are tested, calls are timed one after the other by the wall clock.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import commit, interleaved

from engine import __version__, kernels

RUN_SECONDS = 0.01  # of one timing: what is shorter is repeated
MOST_REPEATS = 200
LIMIT_BYTES = 1 << 30  # that are copied, and read, to measure bandwidths: many times a cache
PRODUCT = 8192  # rows, columns and depth of the product that measures the rate of operations

Call = Callable[[], object]


class Clock:
    """Times calls on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def timed(self, calls: Sequence[Call], captured: bool = True) -> Callable[[], float]:
        """A contender (``measure.interleaved``): seconds of one call. ``calls`` is one call over as much different memory as no cache
        holds, all of them made in turn. ``captured``: all in one graph, else each by its own launches."""
        if self.device.type != "cuda":
            return lambda: self._wall(calls)
        for call in calls:
            call()  # compiles
        torch.cuda.synchronize()
        return _Replayed(calls) if captured else _Launched(calls)

    @staticmethod
    def _wall(calls: Sequence[Call]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


class _Events:
    """Seconds of one call between two events around all of them, over and over until they take RUN_SECONDS."""

    def __init__(self, num_calls: int) -> None:
        self._num_calls, self._repeats = num_calls, 0

    def run(self) -> None:
        raise NotImplementedError

    def __call__(self) -> float:
        self.run()  # brings the clocks up
        if not self._repeats:
            self._repeats = max(1, min(MOST_REPEATS, round(RUN_SECONDS / max(self._seconds(1), 1e-7))))
        return self._seconds(self._repeats) / self._repeats / self._num_calls

    def _seconds(self, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class _Replayed(_Events):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(len(calls))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def run(self) -> None:
        self._graph.replay()


class _Launched(_Events):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(len(calls))
        self._calls = calls

    def run(self) -> None:
        for call in self._calls:
            call()


@dataclass
class Limits:
    """What this run measured the device to be able to do: the yardstick of its results."""

    device: torch.device
    copy_bandwidth: float  # bytes/s read and written
    read_bandwidth: float  # bytes/s read, or copied where that is faster
    operation_rate: float  # bfloat16 multiplications and additions per second, of a large product
    kernel_seconds: float  # of a kernel that does nothing, in a graph
    commit: str  # what was checked out when the run began
    later_read_bandwidth: float = 0.0  # at the end of the run

    def seconds(self, num_bytes: float, operations: float = 0.0) -> float:
        """The least time of a kernel that moves so many bytes and does so many operations: the roofline."""
        return max(num_bytes / self.read_bandwidth, operations / self.operation_rate)

    def limits_line(self) -> str:
        return (
            f"{self.read_bandwidth / 1e9:.0f} GB/s read, {self.copy_bandwidth / 1e9:.0f} GB/s copied, {self.operation_rate / 1e12:.0f} "
            f"TFLOP/s bfloat16, {self.kernel_seconds * 1e6:.1f} us for an empty kernel"
        )

    def measure_again(self) -> None:
        self.later_read_bandwidth = max(bandwidths(Clock(self.device)))
        print(f"limits at the end: {self.later_read_bandwidth / 1e9:.0f} GB/s read, of {self.read_bandwidth / 1e9:.0f} at the beginning")

    def describe(self, peers: dict[str, str | None]) -> dict[str, Any]:
        """Device, versions and commit, for the JSON."""
        found: dict[str, Any] = {"device": platform.machine(), "capability": None, "multiprocessors": None, "memory_gb": None}
        if self.device.type == "cuda":
            p = torch.cuda.get_device_properties(self.device)
            found = {
                "device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                "memory_gb": p.total_memory / 1e9, "cuda": torch.version.cuda,
            }  # fmt: skip
        return found | {
            "backends": kernels.backends(self.device.type),
            "copy_bandwidth_gb_s": self.copy_bandwidth / 1e9,
            "read_bandwidth_gb_s": self.read_bandwidth / 1e9,
            "later_read_bandwidth_gb_s": self.later_read_bandwidth / 1e9,
            "operation_rate_tflop_s": self.operation_rate / 1e12,
            "kernel_seconds": self.kernel_seconds,
            "engine": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
            "peers": peers,
            "python": platform.python_version(),
            "commit": self.commit,
            "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        }


def bandwidths(clock: Clock, num_bytes: int = LIMIT_BYTES) -> tuple[float, float]:
    """Bytes per second that a copy moves, read and written counted, and that a sum reads; the best of five."""
    source = torch.ones(num_bytes // 4, device=clock.device)
    target = torch.empty_like(source)
    times = interleaved({"copy": clock.timed([lambda: target.copy_(source)]), "read": clock.timed([source.sum])}, 5)
    return 2 * source.nbytes / min(times["copy"]), source.nbytes / min(times["read"])


def measure_limits(device: torch.device, num_bytes: int = LIMIT_BYTES, product: int = PRODUCT) -> Limits:
    clock = Clock(device)
    copied, read = bandwidths(clock, num_bytes)
    a = torch.randn(product, product, dtype=torch.bfloat16, device=device)
    multiply = clock.timed([lambda: a @ a])
    one = torch.zeros(1, device=device)
    nothing = clock.timed([lambda: one.add_(1)] * 100)
    return Limits(
        device, copied, max(copied, read), 2 * product**3 / min(multiply() for _ in range(3)), min(nothing() for _ in range(3)), commit()
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
