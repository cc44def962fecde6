"""``AsyncDecoder``: the step loop in a thread of its own (``engine/step_threads.py``), for programs built on asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .decoder import Decoder
from .option_checks import check_int
from .outputs import RequestOutput, StreamEvent
from .params import SamplingParams
from .prompts import Prompts
from .stats import Stats
from .step_threads import Call, Worker


class AsyncDecoder:
    """A decoder for asyncio programs, and for any number of threads and event loops at once.

    Args:
        decoder: a ``Decoder``, which is this one's from now on (its attributes may be read, its methods not called), or what ``Decoder``
            takes as a model.
        max_waiting: most requests that are unfinished and do not run; a call that finds so many raises ``QueueFull``.
        **decoder_options: as for ``Decoder``, where ``decoder`` is a model.

    Attributes:
        decoder: its ``tokenizer``, ``config`` and ``name`` may be read.
        max_waiting: as given.

    ``async with AsyncDecoder(...) as decoder`` closes it at the end.
    """

    def __init__(self, decoder: Any, *, max_waiting: int = 256, **decoder_options: Any) -> None:
        check_int("max_waiting", max_waiting, 1)
        if isinstance(decoder, Decoder) and decoder_options:
            raise TypeError(f"AsyncDecoder got a Decoder and {', '.join(decoder_options)}; give these to the Decoder")
        self.decoder: Decoder = decoder if isinstance(decoder, Decoder) else Decoder(decoder, **decoder_options)
        self.max_waiting = max_waiting
        self._worker = Worker(self.decoder, max_waiting)
        weakref.finalize(self, self._worker.stop).atexit = False

    async def generate(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_id: str | None = None,
        attention_mask: Tensor | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Decode to the end: ``Decoder.generate`` without its progress bar. Cancelling it aborts its requests.

        Args:
            request_id: what ``abort`` knows the call by; no other unfinished call may have it. Default: one is made up.

        The others are those of ``Decoder.generate``; a ``timeout`` counts from this call on.

        Raises:
            ValueError, TypeError, ImportError: bad input, as ``Decoder.generate`` raises.
            QueueFull: ``max_waiting`` requests wait already.
            DecoderClosed: it takes no more requests, or was closed before these were admitted.
        """
        stream = self._start(
            "generate()", request_id, prompts, params, attention_mask, options,
            priority=priority, timeout=timeout, cache_salt=cache_salt, streams=False,
        )  # fmt: skip
        try:
            async for _ in stream:
                pass
        finally:
            stream.abandon()
        return stream.outputs

    def stream(
        self,
        prompts: Prompts,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_id: str | None = None,
        attention_mask: Tensor | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        **options: Any,
    ) -> RequestStream:
        """Like ``generate``, but tokens and text as they come: ``async for event in decoder.stream(...)``.

        The call itself, in a coroutine, queues the requests and raises ``QueueFull`` and ``DecoderClosed``; what is wrong with the input is
        raised by the first event, or by ``RequestStream.admitted``.
        """
        return self._start(
            "stream()", request_id, prompts, params, attention_mask, options,
            priority=priority, timeout=timeout, cache_salt=cache_salt, streams=True,
        )  # fmt: skip

    def _start(self, caller: str, request_id: str | None, *args: Any, **terms: Any) -> RequestStream:
        """Take up a call; the rest are the arguments of ``Decoder.prepare``."""
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise TypeError(f"request_id is {request_id!r}; it must be a non-empty string, or None")
        now = self.decoder.loop.scheduler.clock()
        prepare = functools.partial(self.decoder.prepare, caller, *args, submitted_at=now, **terms)
        return RequestStream(self, self._worker.start(request_id, asyncio.get_running_loop(), prepare))

    def abort(self, request_id: str) -> bool:
        """End a call with the tokens it has: its unfinished outputs have ``finish_reason`` "abort". From any thread.

        Returns whether there was such an unfinished call. Its blocks are free, and its last events there, within a step.
        """
        call = self._worker.calls.get(request_id)
        if call is None:
            return False
        self._worker.abort(call)
        return True

    def stats(self) -> Stats:
        """``Decoder.stats``. From any thread."""
        return self.decoder.stats()

    async def reset_prefix_cache(self) -> None:
        """``Decoder.reset_prefix_cache``, between two steps."""
        await asyncio.wrap_future(self._worker.ask(self.decoder.reset_prefix_cache))

    async def drain(self) -> None:
        """Take no more requests, and return when those that are there have ended. It may be awaited again, and ``close`` may follow."""
        await _outcome(self._worker.drain())

    async def close(self) -> None:
        """Abort what is unfinished and end the threads. It may be called again, and from any event loop."""
        await _outcome(self._worker.stop())

    async def __aenter__(self) -> AsyncDecoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class RequestStream:
    """The events of one call, for one reader at a time. It ends after the last event of its last request.

    A reader that is cancelled while it waits, and a stream that nobody holds any more, abort their requests; where that should not wait for
    the garbage collector: ``async with contextlib.aclosing(stream)``. A reader that is slow, or stops, keeps only its own events in memory.

    Attributes:
        request_id: what ``AsyncDecoder.abort`` knows it by.
    """

    def __init__(self, decoder: AsyncDecoder, call: Call) -> None:
        self._decoder = decoder  # lives as long as its streams
        self._call = call
        self.request_id = call.request_id

    @property
    def outputs(self) -> list[RequestOutput]:
        """All outputs in order, when the stream has ended; before, none."""
        call = self._call
        return call.submission.outputs if call.done and call.submission is not None else []

    async def admitted(self) -> None:
        """Return when the requests are queued; raises what ``generate`` raises for input that cannot be."""
        call = self._call
        await self._until(lambda: call.admitted or call.done)
        if call.error is not None and not call.admitted:
            raise call.error

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> StreamEvent:
        call = self._call
        await self._until(lambda: bool(call.ready) or call.done)
        if call.ready:
            return call.ready.popleft()
        if call.error is not None:
            raise call.error
        raise StopAsyncIteration

    async def _until(self, condition: Callable[[], bool]) -> None:
        call = self._call
        if call.waiter is not None:
            raise RuntimeError(f"the stream of request {call.request_id!r} is being read already; it has one reader at a time")
        try:
            while not condition():
                waiter = call.waiter = call.event_loop.create_future()
                if condition():  # the loop's thread may have looked for a waiter just before there was one
                    return
                await waiter
        except BaseException:
            self.abandon()
            raise
        finally:
            call.waiter = None

    def abandon(self) -> None:
        """Read no further: what is unfinished is aborted within a step. From any thread."""
        if not self._call.done:
            self._decoder._worker.abort(self._call)

    async def aclose(self) -> None:
        """``abandon``, by the name that ``contextlib.aclosing`` calls."""
        self.abandon()

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self.abandon()


async def _outcome(future: concurrent.futures.Future[None]) -> None:
    """Await a future that others await too: who is cancelled does not cancel it."""
    await asyncio.shield(asyncio.wrap_future(future))
