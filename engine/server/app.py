"""The routes."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import re
import time
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..async_decoder import RequestStream
from ..outputs import RequestOutput, StreamEvent
from ..step_threads import DecoderClosed, QueueFull
from .convert import bad_request, check_limits, to_params
from .errors import ApiError, failure, json_response, shutting_down
from .gate import Gate, Record
from .replies import ChatReply, CompletionReply, Reply
from .schema import ChatCall, CompletionCall, DetokenizeCall, ErrorReply, TokenizeCall
from .settings import Settings
from .state import VERSION, ServerState
from .stream import DONE, EventStream, sse, while_connected

PAGE = Path(__file__).parent / "page.html"


def create_app(settings: Settings) -> FastAPI:
    """A server without a model: ``app.state.server.serve(decoder)`` gives it one."""
    app = FastAPI(
        title="decoding-engine", version=VERSION, redirect_slashes=False, docs_url=None, redoc_url=None,
        responses={"default": {"model": ErrorReply, "description": "What is wrong, in one sentence."}},
    )  # fmt: skip
    state = app.state.server = ServerState(settings)
    app.add_middleware(Gate, settings=settings, metrics=state.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    _add_routes(app, state)
    _add_watching_routes(app, state)
    return app


def _add_routes(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/completions")
    async def completions(call: CompletionCall, request: Request) -> Response:
        """Continue prompts."""
        return await _decode(state, call, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(call: ChatCall, request: Request) -> Response:
        """Answer messages."""
        return await _decode(state, call, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(state, name) for name in state.settings.model]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        state.check_model(name)
        return json_response(_model(state, name))

    @app.post("/tokenize")
    async def tokenize(call: TokenizeCall) -> Response:
        """The token ids of a prompt, or of messages under the chat template."""
        state.check_model(call.model)
        if (call.prompt is None) == (call.messages is None):
            raise ApiError(400, "exactly one of prompt and messages must be given", param="prompt")
        (ids,), _ = await _in_thread(state, state.prompts_of, call)
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": state.served.decoder.decoder.config.max_position})

    @app.post("/detokenize")
    async def detokenize(call: DetokenizeCall) -> Response:
        """The text of token ids."""
        state.check_model(call.model)
        vocab_size = state.served.decoder.decoder.config.vocab_size
        for token in call.tokens:
            if not 0 <= token < vocab_size:
                raise ApiError(400, f"tokens holds {str(token):.40}; the model's vocabulary has ids 0 to {vocab_size - 1}", param="tokens")
        return json_response({"prompt": await _in_thread(state, state.served.tokenizer.decode, call.tokens)})


def _add_watching_routes(app: FastAPI, state: ServerState) -> None:
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
        return Response(page, headers={**headers, "cache-control": "no-cache"}, media_type="text/html")

    @app.get("/health")
    async def health() -> Response:
        """Whether the server works: 200, or 503 with the reason."""
        if state.failed is not None:
            raise ApiError(503, state.failed)
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether the server takes calls: 200, or 503 with the reason."""
        assert state.served
        return json_response({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats() -> Response:
        """What the page shows."""
        return json_response(_numbers(state))


def _page() -> tuple[bytes, str]:
    """The page, and what a browser may load for it: its own style and script, by their hashes, and nothing else."""
    page = PAGE.read_bytes()
    hashes = {}
    for tag in ("style", "script"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        assert match is not None
        hashes[tag] = base64.b64encode(hashlib.sha256(match[1]).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _model(state: ServerState, name: str) -> dict[str, Any]:
    served = state.served
    length = served.decoder.decoder.config.max_position
    return {"id": name, "object": "model", "created": state.created, "owned_by": "decoding-engine", "max_model_len": length}


def _numbers(state: ServerState) -> dict[str, Any]:
    stats = state.stats()
    decoder = None
    if stats is not None:
        decoder = {name: getattr(stats, name) for name in ("hit_rate", "acceptance", "cache_use")} | dataclasses.asdict(stats)
    return {"model": state.settings.model[0], "state": state.condition, "decoder": decoder}


async def _in_thread(state: ServerState, function: Any, *arguments: Any) -> Any:
    """Call it where templates and tokenising have their thread, unless too many wait for that."""
    most = state.served.decoder.max_waiting
    if state.num_preparing >= most:
        message = f"{state.num_preparing} calls wait for their prompts to be read, and at most {most} may; try again later"
        raise ApiError(429, message, code="queue_full", retry_after=1)
    future = asyncio.get_running_loop().run_in_executor(state.prompts, function, *arguments)
    state.num_preparing += 1

    def done(_: object) -> None:
        state.num_preparing -= 1

    future.add_done_callback(done)
    return await future


async def _decode(state: ServerState, call: CompletionCall | ChatCall, request: Request) -> Response:
    """What both kinds of calls have in common."""
    record: Record = request.scope["state"]["record"]
    served, settings = state.served, state.settings
    state.check_model(call.model)
    check_limits(call, settings)
    params = to_params(call)
    start = time.perf_counter()
    ids, texts = await while_connected(request.receive, _in_thread(state, state.prompts_of, call))
    request_id = f"{'chatcmpl' if isinstance(call, ChatCall) else 'cmpl'}-{uuid.uuid4().hex}"
    record.details |= {"id": request_id, "stream": call.stream, "prompt_tokens": sum(map(len, ids))}
    arguments = (call, request_id, settings.model[0], served.fingerprint, served.token_text, params.num_return_sequences)
    reply = ChatReply(*arguments) if isinstance(call, ChatCall) else CompletionReply(*arguments, prompts=texts)
    timeout = min((t for t in (call.timeout, settings.request_timeout) if t is not None), default=None)
    if timeout is not None and timeout > 0:  # it counts from the call
        timeout = max(timeout - (time.perf_counter() - start), 1e-3)
    options: dict[str, Any] = {
        "params": params, "request_id": request_id, "priority": call.priority, "timeout": timeout, "cache_salt": call.cache_salt
    }  # fmt: skip
    try:
        if call.stream:
            events = served.decoder.stream(ids, **options)
            # Its first event is waited for, so that what fails before it has an HTTP status.
            first = await while_connected(request.receive, anext(events))
        else:
            outputs = await while_connected(request.receive, served.decoder.generate(ids, **options))
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full", retry_after=1) from None
    except DecoderClosed as error:
        if error.__cause__ is None:
            raise shutting_down() from None
        state.failed = str(error)
        raise ApiError(503, str(error)) from None
    except (ValueError, TypeError, ImportError) as error:
        raise bad_request(error, call) from None
    if call.stream:
        if first.output is not None and (failed := failure(first.output)):
            events.abandon()
            _note(state, record, [first.output])
            raise failed
        return EventStream(_chunks(state, record, reply, events, first), events)
    _note(state, record, outputs)
    for output in outputs:
        if failed := failure(output):
            raise failed
    return json_response(reply.whole(outputs))


async def _chunks(
    state: ServerState, record: Record, reply: Reply, events: RequestStream, first: StreamEvent
) -> AsyncGenerator[bytes, None]:
    """The events of a call as server-sent events; one that fails is the last."""
    begun: dict[tuple[int, int], float] = {}  # when each choice was last heard of
    event: StreamEvent | None = first
    num_tokens = 0
    try:
        while event is not None:
            num_tokens += len(event.token_ids)
            choice, now = (event.prompt_index, event.index), time.perf_counter()
            if choice in begun:
                state.metrics.inter_token.observe(now - begun[choice])
                chunks = []
            else:
                chunks = reply.first_chunks(event)
            begun[choice] = now
            if event.output is not None and (failed := failure(event.output)):
                record.details["error"] = failed.message
                yield sse(failed.body) + DONE
                return
            chunks += reply.chunks(event)
            if chunks:
                yield b"".join(map(sse, chunks))
            event = await anext(events, None)
        if reply.wants_usage:
            yield sse(reply.usage_chunk(events.outputs))
        yield DONE
    except DecoderClosed as error:
        yield sse(ApiError(503, str(error)).body) + DONE
    finally:
        record.details["completion_tokens"] = num_tokens
        events.abandon()
        _note(state, record, events.outputs)


def _note(state: ServerState, record: Record, outputs: list[RequestOutput]) -> None:
    """Take in the times of what has ended, and leave its numbers for the log."""
    state.metrics.observe(outputs)
    if outputs:
        first = outputs[0].metrics
        record.details |= {
            "completion_tokens": sum(output.metrics.num_new_tokens for output in outputs),
            "cached_tokens": sum(o.metrics.num_cached_tokens for o in outputs if o.index == 0),
            "queue_seconds": _rounded(first.queue_time),
            "first_token_seconds": _rounded(first.time_to_first_token),
            "finish_reasons": ",".join(output.finish_reason for output in outputs),
        }
        errors = [output.error for output in outputs if output.error]
        if errors:
            record.details["error"] = errors[0]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["state"]["record"].details["error"] = error.message
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path:.100}",
        405: f"{request.url.path:.100} does not take {request.method:.20}",
    }.get(error.status_code, str(error.detail))
    reply = ApiError(error.status_code, message)
    reply.headers.update(error.headers or {})
    return await _api_error(request, reply)


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is not JSON, or not of the call's form: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = list(map(str, first["loc"][1:]))
    field, kind, message = ".".join(place), first["type"], str(first["msg"])
    if kind == "json_invalid":
        field, message = "", f"the body is not JSON: {first['ctx']['error']}"
    elif not place and kind != "field":
        message = "the body must be a JSON object, with content-type: application/json"
    elif kind == "missing":
        message = f"{field} is missing"
    elif kind == "field":
        field = ".".join([*place, first["ctx"]["field"]])
        message = f"{'.'.join(place)}: {message}" if place else message
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
        message = message if message.startswith(f"{field} ") else f"{field}: {message}"
    else:
        message = f"{field} is {first['input']!r:.60}; {message.replace('Input should be', 'it must be')}"
    return await _api_error(request, ApiError(400, message, param=field or None))
