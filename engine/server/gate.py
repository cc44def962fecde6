"""What every request passes before it reaches a route: request ids, keys, limits on its body; and the record of it afterwards."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .settings import Settings

logger = logging.getLogger("engine.server")

OPEN = ("/", "/health", "/ready")  # paths that need no key
WATCHING = ("/health", "/ready", "/metrics", "/stats")  # asked for every few seconds, and not logged when all is well
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
GONE = 499  # what is recorded of a client that left before its reply was whole


@dataclass
class Record:
    """What is known of one request when it has ended; a log line.

    Attributes:
        request_id: the client's own, or one made up.
        details: what routes add.
    """

    request_id: str
    method: str
    path: str
    status: int = 0
    route: str = "none"
    started: float = field(default_factory=time.perf_counter)
    details: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI middleware.

    Bodies are read here, whole, so that none that is too long or too slow reaches a route. Routes find the ``Record`` of their request in
    its state.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = Record(request_id, scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record
        whole = False

        async def send_marked(message: Message) -> None:
            nonlocal whole
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            try:
                self._check_key(scope["path"], headers)
                body = await self._read(headers, receive)
                await self._app(scope, _replay(body, receive), send_marked)
            except ApiError as error:
                record.details["error"] = error.message
                await error.response()(scope, receive, send_marked)
            except ClientGone:
                pass
            except Exception as error:
                logger.exception("request %s failed", request_id)
                record.details["error"] = repr(error)
                if record.status:  # the reply has begun: all that is left is to break it off
                    raise
                await ApiError(500, "the server has failed at this request; its log has the reason").response()(scope, receive, send_marked)
        finally:
            if not whole:
                record.status = GONE
            route = scope.get("route")
            record.route = getattr(route, "path", "none")
            self._note(record)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path in OPEN:
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if kind.lower() == b"bearer" else b""
        # All are compared, each in constant time.
        if not sum(hmac.compare_digest(key, known) for known in self._keys):
            problem = "the API key is not one of this server's" if key else "an API key is needed: Authorization: Bearer KEY"
            error = ApiError(401, problem, code="invalid_api_key", close=True)
            error.headers["www-authenticate"] = "Bearer"
            raise error

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The body, or an error as soon as it is known to be too long."""
        limit = self._settings.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {limit} bytes, which this server takes at most", close=True)
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > limit:
            raise too_long
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body.extend(message.get("body", b""))
                if len(body) > limit:
                    raise too_long
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self._settings.body_timeout)
        except asyncio.TimeoutError:
            seconds = self._settings.body_timeout
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", close=True) from None
        return bytes(body)

    def _note(self, record: Record) -> None:
        seconds = time.perf_counter() - record.started
        self._metrics.calls.labels(record.route, str(record.status)).inc()
        self._metrics.call_seconds.labels(record.route).observe(seconds)
        level = logging.DEBUG if record.path in WATCHING and record.status == 200 else logging.INFO
        logger.log(level, "request", extra={"record": record, "seconds": seconds})


class ClientGone(Exception):
    """The client has left before its reply was whole; there is nobody to tell."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that has been read, then what comes after it: the news that the client has gone."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


class LogLines(logging.Formatter):
    """One line for each request and message: JSON, or words.

    Args:
        form: "json" or "text".
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, entry: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(entry.created)) + f".{int(entry.msecs):03d}Z"
        line: dict[str, Any] = {"time": moment, "level": entry.levelname.lower()}
        record: Record | None = getattr(entry, "record", None)
        if record is None:
            line |= {"logger": entry.name, "message": entry.getMessage()}
            if entry.exc_info:
                line["exception"] = self.formatException(entry.exc_info)
        else:
            line |= {"request_id": record.request_id, "method": record.method, "path": record.path, "status": record.status}
            line |= {"seconds": round(entry.__dict__["seconds"], 6), **record.details}
        if self._json:
            return json.dumps(line, ensure_ascii=True, default=str)
        if record is None:
            return f"{moment} {line['level']}: {line['message']}" + (f"\n{line['exception']}" if "exception" in line else "")
        return " ".join(f"{name}={_word(value)}" for name, value in line.items() if name != "level")


def _word(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not any(c in text for c in ' "=') else json.dumps(text)
