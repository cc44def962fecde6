"""What the tests of ``AsyncDecoder`` share: nothing is awaited without a limit, and a step can be held."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from torch import Tensor

from engine import AsyncDecoder, RequestOutput, RequestStream, StreamEvent

T = TypeVar("T")
SECONDS = 60  # what "hangs" means here: a busy machine takes seconds


def run(coroutine: Coroutine[Any, Any, T], seconds: float = SECONDS) -> T:
    """The coroutine's result, or ``TimeoutError``."""

    async def limited() -> T:
        return await asyncio.wait_for(coroutine, seconds)

    return asyncio.run(limited())


def result(output: RequestOutput) -> tuple:
    """What the token law promises of an output."""
    return output.prompt_index, output.index, output.token_ids, output.text, output.finish_reason, output.logprobs, output.beam_score


def results(outputs: Sequence[RequestOutput]) -> list[tuple]:
    return [result(output) for output in outputs]


async def read(stream: RequestStream) -> list[StreamEvent]:
    return [event async for event in stream]


async def until_idle(decoder: AsyncDecoder) -> None:
    """Wait until nothing is left of any call, and check that every block is free."""
    while decoder._worker.calls or decoder.decoder.has_work:
        await asyncio.sleep(0.001)
    baseline(decoder)


def baseline(decoder: AsyncDecoder) -> None:
    """Every block is free, nothing is queued."""
    loop = decoder.decoder.loop
    assert not loop.has_work
    loop.scheduler.check()
    loop.pool.check([])
    assert loop.pool.num_free == loop.pool.num_blocks


def slowly(token_ids: Any, logits: Tensor) -> Tensor:
    """A logits processor that leaves others time: without it, 250 tokens of the small model take ten milliseconds."""
    time.sleep(0.002)
    return logits


class Gate:
    """A logits processor that holds its step, and the loop's thread with it, until ``open`` is called."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, token_ids: Any, logits: Tensor) -> Tensor:
        self.reached.set()
        if not self._open.wait(SECONDS):
            raise TimeoutError("nobody opened the gate")
        return logits

    def open(self) -> None:
        self._open.set()

    async def until_reached(self) -> None:
        while not self.reached.is_set():
            await asyncio.sleep(0.001)
