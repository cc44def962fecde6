"""A server process: its socket, its loop, its logs, and how it ends."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..async_decoder import AsyncDecoder
from ..decoder import Decoder
from .app import create_app
from .errors import ApiError
from .gate import LogLines, logger
from .settings import Settings
from .state import ServerState

# Seconds that replies have to leave after the last request has ended, or been ended.
FLUSH_SECONDS = 3


class Connection(H11Protocol):
    """uvicorn's, with an end to connections that send nothing or read nothing, and errors in the form of all others."""

    timer: asyncio.TimerHandle | None = None
    stalled: asyncio.TimerHandle | None = None

    @property
    def _settings(self) -> Settings:
        settings: Settings = self.config.app.state.server.settings  # type: ignore[union-attr]
        return settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            transport.abort()
            return
        # asyncio does that itself only for sockets that were made with the number of the protocol. Without it the body of a reply waits for
        # the client to acknowledge the head, which takes it 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timers("timer")
        elif self.timer is None:
            self._await_head()

    def _await_head(self) -> None:
        self.timer = self.loop.call_later(self._settings.head_timeout, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(self._settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timers("stalled")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers("timer", "stalled")
        super().connection_lost(exc)

    def _stop_timers(self, *names: str) -> None:
        for name in names:
            if (timer := getattr(self, name)) is not None:
                timer.cancel()
                setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is not h11.IDLE:  # a reply is under way; all that is left is to break it off
            self.transport.close()
            return
        reply = ApiError(400, "the request is not HTTP", close=True).response()
        headers = [(name, value) for name, value in reply.raw_headers]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which on a signal first lets requests end.

    Args:
        config: of uvicorn.
        drain: begun by the first signal; the server ends after it. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._signalled = True
            self._loop.call_soon_threadsafe(self._drain)


def server_config(app: FastAPI) -> uvicorn.Config:
    """How the app is to be run, whoever runs it."""
    return uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=math.ceil(app.state.server.settings.head_timeout), timeout_graceful_shutdown=FLUSH_SECONDS,
        h11_max_incomplete_event_size=32 * 1024,
    )  # fmt: skip


def _run(main: Coroutine[Any, Any, int]) -> int:
    """``asyncio.run``, by uvloop where it is installed: each token is a write of its own, and its writes cost half."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def serve(arguments: argparse.Namespace, settings: Settings, load: Callable[[], Decoder]) -> int:
    """Listen, load the model, serve until a signal, let requests end, and return the exit status."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines(arguments.log_format))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)
    with _listen(arguments.host, arguments.port) as listener, _left_by_signals():
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on http://{shown}:{port}", flush=True)
        if not settings.api_keys and host not in ("127.0.0.1", "::1"):
            logger.warning("other machines can reach this server and no API key is asked for; see --api-key")
        return _run(_Process(settings, arguments, load).run(listener))


@contextlib.contextmanager
def _left_by_signals() -> Iterator[None]:
    """Before uvicorn listens to signals, and when it does no more, nothing is left to wait for."""
    before = {sig: signal.signal(sig, lambda *_: _leave(0)) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


class _Process:
    def __init__(self, settings: Settings, arguments: argparse.Namespace, load: Callable[[], Decoder]) -> None:
        self._app = create_app(settings)
        self._state: ServerState = self._app.state.server
        self._arguments = arguments
        self._load = load
        self._server = Server(server_config(self._app), self._begin_drain)
        self._draining: asyncio.Task[None] | None = None
        self._decoder: AsyncDecoder | None = None

    async def run(self, listener: socket.socket) -> int:
        loading = asyncio.create_task(self._load_model())
        await self._server.serve([listener])
        if self._draining is not None:
            self._draining.cancel()
        if not loading.done():  # in a thread, which nothing can stop: the process has nothing to lose
            loading.cancel()
            logger.info("stopped while the model was being loaded")
            _leave(0)
        if self._decoder is not None:
            await self._decoder.close()
        self._state.prompts.shutdown(wait=False, cancel_futures=True)
        if not loading.cancelled() and (error := loading.exception()) is not None:
            raise error
        logger.info("stopped")
        return 0

    async def _load_model(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            decoder = await loop.run_in_executor(None, self._load)
            self._decoder = AsyncDecoder(decoder, max_waiting=self._arguments.max_waiting)
            self._state.serve(self._decoder)
        except BaseException:
            self._server.should_exit = True
            raise
        logger.info("ready")

    def _begin_drain(self) -> None:
        self._state.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Let requests end, for so long as is allowed; end the others; and then the server."""
        logger.info("draining: no more requests are taken")
        try:
            if self._decoder is not None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._decoder.drain(), self._arguments.drain_timeout)
                await self._decoder.close()
        finally:
            self._server.should_exit = True


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
