"""A device whose work is done at times that the host does not know, for the runner of GPUs: as late as it may be, or at once."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine import Decoder
from engine.device import Graph, Mark
from engine.graph_runner import GraphRunner


class FakeDevice:
    """See ``engine.device.StepDevice``. Kernels run at once, in the order of the device's work. Memory that is given out holds garbage.

    What the device copies to the host arrives when a later mark is waited for, or at once, as ``rng`` will have it. Host memory that it
    copies from must not have changed by then: a GPU may read it as late as that.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.host: set[int] = set()  # where memory of the host begins
        self.queue: deque[Callable[[], None]] = deque()  # what is seen to be done when it is waited for
        self.done = 0  # of all that ever were in the queue
        self.asked = 0
        self.num_captures = 0
        self.num_replays = 0

    def memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.full((size,), 77 if dtype.is_floating_point else -7777, dtype=dtype)

    def host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        memory = self.memory(size, dtype)
        self.host.add(memory.untyped_storage().data_ptr())
        return memory

    def _later(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        self.asked += 1
        if self.rng.random() < 0.3:
            _FakeMark(self, self.asked).wait()

    def copy(self, target: Tensor, source: Tensor) -> None:
        to_host, from_host = (t.untyped_storage().data_ptr() in self.host for t in (target, source))
        assert to_host != from_host, "a copy goes from the host to the device or back"
        assert target.shape == source.shape and target.dtype == source.dtype
        then = source.clone()
        if to_host:
            self._later(lambda: target.copy_(then))  # type: ignore[arg-type,return-value]
            return

        def unchanged() -> None:
            assert torch.equal(source, then), "host memory has changed before the device can be known to have read it"

        target.copy_(then)
        self._later(unchanged)

    def mark(self) -> Mark:
        return _FakeMark(self, self.asked)

    def capture(self, run: Callable[[], Tensor | None]) -> Graph:
        self.num_captures += 1
        return _FakeGraph(self, run)


class _FakeMark:
    def __init__(self, device: FakeDevice, place: int) -> None:
        self._device, self._place = device, place

    def wait(self) -> None:
        while self._device.done < self._place:
            self._device.done += 1
            self._device.queue.popleft()()


class _FakeGraph:
    """Replays write their result where the first one did."""

    def __init__(self, device: FakeDevice, run: Callable[[], Tensor | None]) -> None:
        self._device, self._run = device, run
        self.result: Tensor | None = None

    def replay(self) -> None:
        self._device.num_replays += 1
        result = self._run()
        if self.result is None or result is None:
            self.result = result
        else:
            self.result.copy_(result)


def on_fake_device(decoder: Decoder, seed: int = 0) -> FakeDevice:
    """Let a decoder run its steps as on a GPU, over the kernels that it has."""
    loop = decoder.loop
    device = FakeDevice(random.Random(seed))
    scheduler = loop.scheduler
    runner: Any = GraphRunner(
        decoder.model,
        loop.cache,
        loop.pool.block_size,
        device,
        max_batch_size=scheduler.max_batch_size,
        max_batch_tokens=scheduler.max_batch_tokens,
        max_blocks=loop.pool.blocks_for(decoder.config.max_position),
    )
    loop.runner = runner
    return device
