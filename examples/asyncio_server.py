"""The engine inside a plain asyncio server: JSON objects, one a line, over TCP. No framework.

    python examples/asyncio_server.py --port 8001 [--model PATH]
    echo '{"id": "a", "prompt": "def read_csv(path):", "max_new_tokens": 40}' | nc localhost 8001

A line ``{"id": ..., "prompt": ..., options of SamplingParams}`` begins a request, ``{"abort": id}`` ends one early. Requests of a
connection run at the same time. Each is answered by lines ``{"id": ..., "text": ...}`` and a last one with ``finish_reason``, or with
``error`` alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from typing import Any

from engine import AsyncDecoder, Decoder, DecoderClosed, QueueFull, RequestStream

MAX_LINE = 1 << 20  # bytes
MAX_REQUESTS = 32  # of a connection at the same time


class Connection:
    """One client: reads its lines, and runs a task for each of its requests."""

    def __init__(self, decoder: AsyncDecoder, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.decoder, self.reader, self.writer = decoder, reader, writer
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.ids: dict[str, str] = {}  # the client's ids to the decoder's

    async def serve(self) -> None:
        try:
            while line := await self.reader.readline():
                await self.handle(line)
            await asyncio.gather(*self.tasks.values())  # it will send no more, and may still read
        except (ConnectionError, ValueError):  # gone, or a line that is too long
            pass
        finally:
            for task in self.tasks.values():
                task.cancel()  # which aborts its request
            self.writer.close()

    async def handle(self, line: bytes) -> None:
        try:
            asked = json.loads(line)
            if not isinstance(asked, dict):
                raise ValueError("a line must be a JSON object")
        except ValueError as error:
            await self.send({"error": f"that was no request: {error}"})
            return
        if "abort" in asked:
            self.decoder.abort(self.ids.get(str(asked["abort"]), ""))
            return
        name, prompt = asked.pop("id", None), asked.pop("prompt", None)
        if not isinstance(name, str) or not isinstance(prompt, str):
            await self.send({"id": name, "error": "id and prompt must be given, and be strings"})
        elif name in self.tasks or len(self.tasks) == MAX_REQUESTS:
            await self.send({"id": name, "error": f"the id is in use, or {MAX_REQUESTS} requests are"})
        else:
            try:
                stream = self.decoder.stream(prompt, **asked)
            except (ValueError, TypeError, QueueFull, DecoderClosed) as error:
                await self.send({"id": name, "error": str(error)})
                return
            self.ids[name] = stream.request_id
            task = self.tasks[name] = asyncio.create_task(self.answer(name, stream))
            task.add_done_callback(lambda _: (self.tasks.pop(name), self.ids.pop(name)))

    async def answer(self, name: str, stream: RequestStream) -> None:
        try:
            async for event in stream:
                if event.text:
                    await self.send({"id": name, "text": event.text})
                if (output := event.output) is not None:
                    await self.send({"id": name, "finish_reason": output.finish_reason, "error": output.error})
        except (ValueError, TypeError, DecoderClosed) as error:
            await self.send({"id": name, "error": str(error)})
        except ConnectionError:
            pass

    async def send(self, answer: dict[str, Any]) -> None:
        self.writer.write(json.dumps(answer).encode() + b"\n")
        await self.writer.drain()  # a client that does not read holds up nobody but itself


async def main(model: str | None, port: int) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncDecoder(Decoder(model) if model else Decoder.bundled(), max_waiting=64) as decoder:
        connections: set[Connection] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(decoder, reader, writer)
            connections.add(connection)
            try:
                await connection.serve()
            finally:
                connections.remove(connection)

        server = await asyncio.start_server(connected, "127.0.0.1", port, limit=MAX_LINE)
        print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
        await stopping.wait()
        server.close()
        await decoder.drain()
        if answers := [task for connection in connections for task in connection.tasks.values()]:
            await asyncio.wait(answers, timeout=5)  # their last lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The engine inside a plain asyncio server.")
    parser.add_argument("--model", help="a path (default: the model that comes with the package)")
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.model, arguments.port))
