"""The threads behind ``AsyncDecoder``.

The *loop's thread* alone touches the decoder: it takes commands, steps while there is work, and sleeps when there is none. The *admission's
thread* turns prompts and options into requests (tokenising, grammars), one call after the other. Callers' event loops wait for neither:
after a step, each of them with news for readers that wait is woken once.
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
from collections.abc import Callable
from dataclasses import dataclass, field

from .decoder import Decoder
from .outputs import StreamEvent
from .request import Submission

logger = logging.getLogger("engine.step_threads")

EXIT_SECONDS = 10.0  # how long the interpreter waits, when it ends, for a step that is being run


class QueueFull(RuntimeError):
    """As many requests wait as ``max_waiting`` allows; one may come again when others have ended."""


class DecoderClosed(RuntimeError):
    """The decoder takes no more requests: it drains, is closed, or its loop has stopped (then ``__cause__`` says why)."""


@dataclass(eq=False)
class Call:
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


class Worker:
    """The two threads and what they share with callers. It knows nothing of the ``AsyncDecoder``, which may so be collected.

    Args:
        decoder: stepped by the loop's thread.
        max_waiting: see ``AsyncDecoder``.
    """

    def __init__(self, decoder: Decoder, max_waiting: int) -> None:
        self.decoder = decoder
        self.max_waiting = max_waiting
        self.calls: dict[str, Call] = {}  # all that are unfinished, by id; changed under the lock
        self._active: dict[Call, None] = {}  # those that are admitted; the loop's thread's
        self._lock = threading.Lock()
        # What a destructor may do, it does without the lock: it may run in a thread that holds it.
        self._admissions: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
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

    def start(self, request_id: str | None, event_loop: asyncio.AbstractEventLoop, prepare: Callable[[], Submission]) -> Call:
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
            call = self.calls[request_id] = Call(request_id, event_loop, prepare)
            self._num_entering += 1
            self._admissions.put(call)
            return call

    def abort(self, call: Call) -> None:
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

    def _enqueue(self, call: Call) -> None:
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

    def _abort(self, call: Call) -> None:
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


def _wake(calls: list[Call]) -> list[Call]:
    """Resume the readers that wait, those of one event loop together; returns those whose event loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Call]] = {}
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


def _resume(calls: list[Call]) -> None:
    for call in calls:
        if call.waiter is not None and not call.waiter.done():
            call.waiter.set_result(None)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _stop_workers() -> None:
    """Before the interpreter goes: a thread that comes out of a kernel afterwards would have nowhere to return to."""
    workers = list(_workers)
    for worker in workers:
        worker.stop()
    end = time.monotonic() + EXIT_SECONDS
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
