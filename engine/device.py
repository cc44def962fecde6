"""The GPU as a step sees it: memory, copies that nobody waits for, marks to wait for, graphs; and small tensors on their way there and
back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Mark(Protocol):
    """A place in the order of the device's work."""

    def wait(self) -> None:
        """Return when all work before it is done."""


class Graph(Protocol):
    """Work that was captured: the same kernels with the same addresses at each replay."""

    result: Tensor | None  # what the captured function returned, written anew by each replay

    def replay(self) -> None: ...


class StepDevice(Protocol):
    """What a runner needs of a GPU. Work is done in the order in which it is asked for, some time later, until a mark is waited for."""

    def memory(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of the device, ``[size]``."""

    def host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device can copy from and to while the host goes on, ``[size]``."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between the two; host memory must stay as it is until a later mark has been waited for."""

    def mark(self) -> Mark: ...

    def capture(self, run: Callable[[], Tensor | None]) -> Graph:
        """The work of ``run``, which is not done now. It must depend on nothing but what is in tensors."""


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device, result: Tensor | None) -> None:
        self._graph, self._device, self.result = graph, device, result

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, for cuBLAS keeps memory for each stream that it has worked on."""
    return torch.cuda.Stream(device)


class CudaDevice:
    """A CUDA GPU; work goes to its current stream. The thread that asks for it may have another GPU as its current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # graphs share their memory: each is done with it before the next is replayed

    def memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        return _CudaMark(self.device)

    def capture(self, run: Callable[[], Tensor | None]) -> Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server may use CUDA meanwhile. Torch's own stream for captures is on the GPU that had the first.
        stream = _capture_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            result = run()
        return _CudaGraph(graph, self.device, result)


class _Done:
    def wait(self) -> None:
        pass


class _Again:
    """What is not captured, but done again."""

    def __init__(self, run: Callable[[], Tensor | None]) -> None:
        self._run = run
        self.result: Tensor | None = None

    def replay(self) -> None:
        self.result = self._run()


class HostDevice:
    """A CPU in the form of a device: all is done when it is asked for."""

    def memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    host_memory = memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Mark:
        return _Done()

    def capture(self, run: Callable[[], Tensor | None]) -> Graph:
        return _Again(run)


def upload(value: T, device: torch.device) -> T:
    """Tensors of the host, alone or in tuples, dicts and dataclasses, on ``device``; nobody waits. On a CPU they are what they were."""
    return value if device.type == "cpu" else _map(value, lambda t: t.pin_memory().to(device, non_blocking=True) if t.is_cpu else t)


def fetch(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors on the host, when they are there: the copies of all are waited for together. On a CPU they are what they were."""
    found = list(tensors)
    if all(t.is_cpu for t in found):
        return found
    copies = [t if t.is_cpu else torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in found]
    for device in {t.device for t in found if not t.is_cpu}:
        _CudaMark(device).wait()
    return copies


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(one, change) for name, one in value.items()}
    if isinstance(value, tuple):
        parts = [_map(one, change) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return value
