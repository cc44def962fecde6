"""A real server in a thread of the test's own process, so that tests can look behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn

from engine import AsyncDecoder, Decoder
from engine.server.app import create_app
from engine.server.main import server_config
from engine.server.settings import Settings
from engine.server.state import ServerState

SECONDS = 120  # what "hangs" means here: a busy machine takes seconds
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{{ lead | default('') }}{% endif %}"
)


class Running:
    """Attributes:
    url: without a slash at its end.
    decoder: of the server; its loop's thread steps it.
    """

    def __init__(self, port: int, state: ServerState, decoder: AsyncDecoder, loop: asyncio.AbstractEventLoop) -> None:
        self.port, self.url, self.state, self.decoder = port, f"http://127.0.0.1:{port}", state, decoder
        self._loop = loop
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def run(self, coroutine: Any) -> Any:
        """A coroutine in the server's own event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)

    @property
    def idle(self) -> bool:
        loop = self.decoder.decoder.loop
        return not self.decoder._worker.calls and not loop.has_work and loop.pool.num_free == loop.pool.num_blocks

    def until_idle(self) -> None:
        """Wait until nothing is left of any call, and every block is free."""
        until(lambda: self.idle)
        self.decoder.decoder.loop.scheduler.check()

    @contextlib.contextmanager
    def slow_steps(self, seconds: float = 0.005) -> Iterator[list[int]]:
        """Each step takes so much longer; gives the number of running and waiting requests after each."""
        decoder, seen = self.decoder.decoder, []
        step = decoder.step

        def slow() -> None:
            step()
            seen.append(len(decoder.loop.scheduler.running) + len(decoder.loop.scheduler.waiting))
            time.sleep(seconds)

        decoder.step = slow  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            del decoder.step


def until(condition: Callable[[], bool], pause: float = 0.002) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come to be"
        time.sleep(pause)


@contextlib.contextmanager
def running(*, max_waiting: int = 256, decoder_options: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """A server of the bundled model on a free port; on leaving nothing may be left in its cache."""
    app = create_app(Settings(**{"model": ("bundled",), "chat_template": TEMPLATE, **settings}))
    decoder = AsyncDecoder(Decoder.bundled(**{"cache_tokens": 8192, **(decoder_options or {})}), max_waiting=max_waiting)
    app.state.server.serve(decoder)
    server = uvicorn.Server(server_config(app))
    listener = socket.create_server(("127.0.0.1", 0))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve([listener])
        await decoder.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        until(lambda: server.started)
        one = Running(listener.getsockname()[1], app.state.server, decoder, loops[0])
        yield one
        one.http.close()
        one.until_idle()
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def is_error(response: httpx.Response, status: int, *words: str, param: str | None = None) -> None:
    """The reply is an error in OpenAI's form whose one sentence has these words."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and all(word in error["message"] for word in words), error
    if param is not None:
        assert error["param"] == param, error
