"""The step loop in a thread of its own, for programs built on asyncio: ``AsyncDecoder``.

Three kinds of threads meet here. The *loop's thread* alone touches the decoder: it takes commands, steps while there is work, and sleeps
when there is none. The *admission's thread* turns prompts and options into requests (tokenising, grammars), one call after the other.
Callers' event loops wait for neither: after a step, each of them with news for readers that wait is woken once.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import itertools
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .decoder import Decoder
from .option_checks import check_int
from .outputs import RequestOutput, StreamEvent
from .params import SamplingParams
from .prompts import Prompts
from .request import Submission
from .stats import Stats

logger = logging.getLogger("engine.async_decoder")

EXIT_SECONDS = 10.0  # how long the interpreter waits, when it ends, for a step that is being run


class QueueFull(RuntimeError):
    """As many requests wait as ``max_waiting`` allows; one may come again when others have ended."""


class DecoderClosed(RuntimeError):
    """The decoder takes no more requests: it drains, is closed, or its loop has stopped (then ``__cause__`` says why)."""


@dataclass(eq=False)
class _Call:
    """One call of ``stream`` or ``generate``, as its threads share it. Each field is written by one of them."""

    request_id: str
    event_loop: asyncio.AbstractEventLoop
    prepare: Callable[[], Submission] | None  # until it has been admitted
    submission: Submission | None = None  # the loop's thread's alone until done
    ready: deque[StreamEvent] = field(default_factory=deque)  # events handed over, not read yet
    admitted: bool = False
    aborted: bool = False
    error: Exception | None = None  # why there is nothing to read after ``ready``
    done: bool = False  # written last: whatever there will be is in ``ready``, ``submission.outputs`` and ``error``
    waiter: asyncio.Future[None] | None = None  # where its reader waits; the reader's


class AsyncDecoder:
    """A decoder for asyncio programs, and for any number of threads and event loops at once.

    Args:
        decoder: a ``Decoder``, which is this one's from now on (its attributes may be read, its methods not called), or what ``Decoder``
            takes as a model.
        max_waiting: most requests that are unfinished and do not run; a call that finds so many raises ``QueueFull``.
        **decoder_options: as for ``Decoder``, where ``decoder`` is a model.

    Attributes:
        decoder: its ``tokenizer``, ``config`` and ``name`` may be read.

    ``async with AsyncDecoder(...) as decoder`` closes it at the end.
    """

    def __init__(self, decoder: Any, *, max_waiting: int = 256, **decoder_options: Any) -> None:
        check_int("max_waiting", max_waiting, 1)
        if isinstance(decoder, Decoder) and decoder_options:
            raise TypeError(f"AsyncDecoder got a Decoder and {', '.join(decoder_options)}; give these to the Decoder")
        self.decoder: Decoder = decoder if isinstance(decoder, Decoder) else Decoder(decoder, **decoder_options)
        self._worker = _Worker(self.decoder, max_waiting)
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

    def __init__(self, decoder: AsyncDecoder, call: _Call) -> None:
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


class _Worker:
    """The two threads and what they share with callers. It knows nothing of the ``AsyncDecoder``, which may so be collected.

    Args:
        decoder: stepped by the loop's thread.
        max_waiting: see ``AsyncDecoder``.
    """

    def __init__(self, decoder: Decoder, max_waiting: int) -> None:
        self.decoder = decoder
        self.max_waiting = max_waiting
        self.calls: dict[str, _Call] = {}  # all that are unfinished, by id; changed under the lock
        self._active: dict[_Call, None] = {}  # those that are admitted; the loop's thread's
        self._lock = threading.Lock()
        # What a destructor may do, it does without the lock: it may run in a thread that holds it.
        self._admissions: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: stop
        self._num_entering = 0  # calls that the scheduler does not know yet
        self._names = (f"request-{i}" for i in itertools.count(1))
        self._refusal: str | None = None  # why no more calls are taken
        self._failure: BaseException | None = None  # what the loop has stopped by
        self._draining = self._stopping = False
        self._asked: set[concurrent.futures.Future[None]] = set()  # questions to the loop's thread; changed under the lock
        self._drained: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._stopped: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=target, name=f"engine-{name}", daemon=True)
            for name, target in (("loop", self._run), ("admission", self._run_admission))
        ]
        for thread in self._threads:
            thread.start()
        _workers.add(self)

    # ---- called from any thread ----

    def start(self, request_id: str | None, event_loop: asyncio.AbstractEventLoop, prepare: Callable[[], Submission]) -> _Call:
        """Take up a call, or raise why not."""
        if os.getpid() != self._process:
            raise DecoderClosed("this AsyncDecoder was made before the process forked, and its threads are the parent's; make one after")
        with self._lock:
            if self._refusal is not None:
                raise DecoderClosed(self._refusal) from self._failure
            if request_id in self.calls:
                raise ValueError(f"request_id is {request_id!r}, which an unfinished call has; it must be another")
            num_waiting = self._num_entering + self.decoder.loop.scheduler.num_waiting
            if num_waiting >= self.max_waiting:
                raise QueueFull(f"{num_waiting} requests are waiting, and max_waiting is {self.max_waiting}; try again later")
            if request_id is None:
                request_id = next(name for name in self._names if name not in self.calls)
            call = self.calls[request_id] = _Call(request_id, event_loop, prepare)
            self._num_entering += 1
            self._admissions.put(call)
            return call

    def abort(self, call: _Call) -> None:
        """End a call, if it has not ended. Takes no lock."""
        call.aborted = True
        self._commands.put(functools.partial(self._abort, call))

    def ask(self, function: Callable[[], None]) -> concurrent.futures.Future[None]:
        """Have the loop's thread call it between two steps."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            if self._stopping:
                raise DecoderClosed(self._refusal) from self._failure
            self._asked.add(future)
            self._commands.put(functools.partial(self._answer, future, function))
        return future

    def drain(self) -> concurrent.futures.Future[None]:
        """Refuse further calls; resolved when all have ended."""
        with self._lock:
            self._refusal = self._refusal or "this AsyncDecoder is draining; it takes no more requests"
            self._draining = True
        self._commands.put(lambda: None)  # the loop may be asleep
        return self._drained

    def stop(self) -> concurrent.futures.Future[None]:
        """Abort all calls and end the threads; resolved when the loop's has ended. Takes no lock."""
        self._refusal = self._refusal or "this AsyncDecoder is closed; it takes no more requests"
        self._commands.put(None)
        return self._stopped

    def join(self, timeout: float) -> None:
        """Wait so many seconds at most for both threads."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # ---- the admission's thread ----

    def _run_admission(self) -> None:
        while self._admit_next():
            pass

    def _admit_next(self) -> bool:
        call = self._admissions.get()
        if call is None:
            return False
        assert call.prepare is not None
        try:
            call.submission = call.prepare()
        except Exception as error:
            call.error = error
        except BaseException as error:  # a panic of a tokenizer written in Rust
            call.error = RuntimeError(f"the request could not be admitted: {error!r}")
            call.error.__cause__ = error
        call.prepare = None
        self._commands.put(functools.partial(self._enqueue, call))
        return True

    # ---- the loop's thread ----

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while self._take_commands():
                if self.decoder.has_work:
                    self.decoder.step()
                self._publish()
        except BaseException as error:
            failure = error
            logger.exception("the decoding loop has stopped")
        self._finish(failure)

    def _take_commands(self) -> bool:
        """Carry out all that are there, and where there is nothing else to do wait for one; False: stop."""
        wait = not self.decoder.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _enqueue(self, call: _Call) -> None:
        if call.submission is not None:
            self.decoder.loop.enqueue(call.submission.requests)
            self._active[call] = None
            call.admitted = True
            if call.aborted:
                self.decoder.abort(call.submission)
        with self._lock:
            self._num_entering -= 1
            if call.submission is None:
                del self.calls[call.request_id]
                call.done = True
        _wake([call])

    def _answer(self, future: concurrent.futures.Future[None], function: Callable[[], None]) -> None:
        with self._lock:
            self._asked.remove(future)
        if future.set_running_or_notify_cancel():
            try:
                function()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _abort(self, call: _Call) -> None:
        if call.admitted and not call.done and call.submission is not None:
            self.decoder.abort(call.submission)

    def _publish(self) -> None:
        """Hand over what has come since the last time, and wake those who wait for it."""
        news = [call for call in self._active if call.submission is not None and call.submission.events]
        for call in news:
            submission = call.submission
            assert submission is not None
            call.ready.extend(submission.events)
            submission.events.clear()
            if submission.finished:
                del self._active[call]
                with self._lock:
                    del self.calls[call.request_id]
                call.done = True
        for call in _wake(news):
            self.abort(call)
        if self._draining:
            with self._lock:
                if not self.calls and not self._drained.done():
                    self._drained.set_result(None)

    def _finish(self, failure: BaseException | None) -> None:
        """End every call, so that nobody waits for what will not come."""
        reason = "this AsyncDecoder is closed; it takes no more requests"
        try:
            for call in self._active:
                self._abort(call)
            if failure is None:
                self._publish()
        except BaseException as error:
            failure = failure or error
        if failure is not None:
            reason = f"the decoding loop has stopped: {type(failure).__name__}: {failure}"
        with self._lock:
            self._refusal, self._failure, self._stopping = reason, failure, True
            left = list(self.calls.values())
            self.calls.clear()
        for future in self._asked:
            if future.set_running_or_notify_cancel():
                future.set_exception(DecoderClosed(reason))
        for call in left:
            call.error = DecoderClosed(reason if failure else "this AsyncDecoder was closed before the request was admitted")
            call.error.__cause__ = failure
            call.done = True
        _wake(left)
        self._admissions.put(None)
        if not self._drained.done():
            self._drained.set_result(None)
        self._stopped.set_result(None)


def _wake(calls: list[_Call]) -> list[_Call]:
    """Resume the readers that wait, those of one event loop together; returns those whose event loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
    for call in calls:
        if call.waiter is not None:
            by_loop.setdefault(call.event_loop, []).append(call)
    gone = []
    for event_loop, waiting in by_loop.items():
        try:
            event_loop.call_soon_threadsafe(_resume, waiting)
        except RuntimeError:
            gone += waiting
    return gone


def _resume(calls: list[_Call]) -> None:
    for call in calls:
        if call.waiter is not None and not call.waiter.done():
            call.waiter.set_result(None)


async def _outcome(future: concurrent.futures.Future[None]) -> None:
    """Await a future that others await too: who is cancelled does not cancel it."""
    await asyncio.shield(asyncio.wrap_future(future))


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _stop_workers() -> None:
    """Before the interpreter goes: a thread that comes out of a kernel afterwards would have nowhere to return to."""
    workers = list(_workers)
    for worker in workers:
        worker.stop()
    end = time.monotonic() + EXIT_SECONDS
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
