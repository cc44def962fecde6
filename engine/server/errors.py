"""What can go wrong with a call, in the form in which OpenAI's API says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..outputs import RequestOutput

# How the reasons of failed requests begin that lie in what the request asks for. All other failures are the server's.
_OWN_FAULT = ("no token can be drawn", "the search found only", "the grammar cannot go on")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A call that is answered with an error.

    Args:
        status: the HTTP status, 4xx or 5xx.
        message: one sentence.
        param: the field that it is about, if any.
        code: a word for programs, as in "model_not_found".
        retry_after: seconds after which it may be worth another try.
        close: the connection ends with the reply, since the rest of the request has not been read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if close:
            self.headers["connection"] = "close"

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: what a client sent may come back in it, and that need not be Unicode text."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text, status, dict(headers or {}), "application/json")


def failure(output: RequestOutput) -> ApiError | None:
    """The error that a request ended with, or None."""
    if output.finish_reason == "error":
        reason = output.error or "the request failed"
        return ApiError(400 if reason.startswith(_OWN_FAULT) else 500, reason)
    if output.finish_reason == "abort" and output.error is None:  # with an error it ran out of the time that it asked for
        return shutting_down()
    return None


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; try another, or later", code="shutting_down", retry_after=5)
