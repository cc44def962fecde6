"""The engine inside a FastAPI application: one decoder for all requests, tokens streamed as they come.

    python examples/fastapi_app.py --port 8000 [--model PATH]
    curl -N localhost:8000/complete -H 'content-type: application/json' -d '{"prompt": "def read_csv(path):", "max_new_tokens": 40}'

Needs fastapi and uvicorn (``pip install decoding-engine[server]``). ``python -m engine serve`` is a whole server; this is for applications
that have one.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from engine import AsyncDecoder, Decoder, DecoderClosed, QueueFull, RequestStream


class Completion(BaseModel):
    prompt: str
    max_new_tokens: int = Field(100, ge=1, le=1000)
    temperature: float = Field(0.0, ge=0.0)
    seed: int | None = None
    timeout: float = Field(60.0, gt=0.0, le=600.0)


def make_app(model: str | None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncDecoder(Decoder(model) if model else Decoder.bundled(), max_waiting=64) as decoder:
            app.state.decoder = decoder
            yield
            await decoder.drain()  # those that are there end as they should

    app = FastAPI(lifespan=lifespan)

    @app.post("/complete")
    async def complete(completion: Completion) -> StreamingResponse:
        decoder: AsyncDecoder = app.state.decoder
        try:
            stream = decoder.stream(completion.prompt, **completion.model_dump(exclude={"prompt"}))
            await stream.admitted()  # whatever is wrong with the request shows before the reply begins
        except QueueFull as error:
            raise HTTPException(429, str(error), {"retry-after": "1"}) from None
        except DecoderClosed as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return StreamingResponse(text_of(stream), media_type="text/plain; charset=utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        stats = app.state.decoder.stats()
        return {"model": app.state.decoder.decoder.name, "running": stats.num_running, "waiting": stats.num_waiting}

    return app


async def text_of(stream: RequestStream) -> AsyncIterator[str]:
    """A client that goes away closes this generator, and that ends its request within a step."""
    async with aclosing(stream):
        async for event in stream:
            if event.text:
                yield event.text
            if event.output is not None and event.output.error is not None:
                yield f"\n[{event.output.error}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The engine inside a FastAPI application.")
    parser.add_argument("--model", help="a path (default: the model that comes with the package)")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(make_app(arguments.model), port=arguments.port)
