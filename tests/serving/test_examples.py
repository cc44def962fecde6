"""Each file of examples/ as a process of its own, with clients as they come."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.async_helpers import SECONDS, run

from engine import Decoder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPTS = ("def read_csv(path):", "class A:\n    def", "import os\n")


@pytest.fixture(scope="module")
def texts(bundled: Decoder) -> list[str]:
    return [output.text for output in bundled.generate(list(PROMPTS), max_new_tokens=30)]


@contextlib.contextmanager
def server(name: str, port_line: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The example as a process, and the port that it says it listens on."""
    command = [sys.executable, str(EXAMPLES / name), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = []
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if found := re.search(port_line, line):
                    yield process, int(found[1])
                    break
            else:
                pytest.fail(f"{name} ended: {''.join(said)}")
        finally:
            process.kill()


def ends_well(process: subprocess.Popen[str], codes: tuple[int, ...]) -> None:
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode in codes and "Traceback" not in said, said


def request(port: int, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


def test_fastapi(texts: list[str]) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")

    async def all_prompts(port: int) -> list[str]:
        def complete(prompt: str) -> str:
            with request(port, "POST", "/complete", {"prompt": prompt, "max_new_tokens": 30}) as reply:
                text = reply.read().decode()
                assert reply.status == 200, text
                return text

        return await asyncio.gather(*(asyncio.to_thread(complete, prompt) for prompt in PROMPTS))

    with server("fastapi_app.py", r"running on http://127.0.0.1:(\d+)") as (process, port):
        assert run(all_prompts(port)) == texts
        for body, status, said in (
            ({"prompt": ""}, 400, "prompt 0 is empty"),
            ({"prompt": "x" * 5000}, 400, "the model's length"),
            ({"prompt": "x", "max_new_tokens": 0}, 422, "greater than or equal to 1"),
        ):
            with request(port, "POST", "/complete", body) as reply:
                assert reply.status == status and said in reply.read().decode()
        with request(port, "POST", "/complete", {"prompt": "x", "temperature": 1.0, "seed": 1, "max_new_tokens": 400}) as reply:
            assert reply.read(1)  # and the client goes
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            with request(port, "GET", "/health") as reply:
                health = json.loads(reply.read())
            if (health["running"], health["waiting"]) == (0, 0):
                break
        else:
            pytest.fail(f"it goes on for nobody: {health}")
        ends_well(process, (0, -signal.SIGTERM))  # uvicorn shuts down, and then raises the signal it was sent


def test_asyncio_server(texts: list[str]) -> None:
    async def client(port: int, lines: list[Any], *, until: int) -> list[dict[str, Any]]:
        """Sends lines, and reads until so many requests have ended."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for line in lines:
            writer.write((line if isinstance(line, str) else json.dumps(line)).encode() + b"\n")
        answers: list[dict[str, Any]] = []
        while sum("text" not in answer for answer in answers) < until:
            answers.append(json.loads(await reader.readline()))
        writer.close()
        return answers

    async def clients(port: int) -> None:
        asks = [{"id": str(i), "prompt": prompt, "max_new_tokens": 30} for i, prompt in enumerate(PROMPTS)]
        for answers in await asyncio.gather(client(port, asks, until=3), client(port, asks[::-1], until=3)):
            for i, text in enumerate(texts):
                assert "".join(answer.get("text", "") for answer in answers if answer["id"] == str(i)) == text
        long = {"id": "long", "prompt": PROMPTS[0], "max_new_tokens": 400, "ignore_eos": True}
        answers = await client(port, [long, {"abort": "long"}, {"abort": ["no such"]}], until=1)
        assert answers[-1] == {"id": "long", "finish_reason": "abort", "error": None}
        answers = await client(
            port,
            ["no JSON", "[1]", {"id": "a"}, {"id": "b", "prompt": "x", "tempratur": 1}, {"id": "c", "prompt": "x", "top_p": 2}],
            until=5,
        )
        said = " ".join(str(answer["error"]) for answer in answers)
        for words in (
            "that was no request",
            "must be a JSON object",
            "id and prompt must be given",
            "did you mean 'temperature'",
            "top_p is 2",
        ):
            assert words in said
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x" * (2 << 20) + b"\n")  # too long a line: the connection ends, the server does not
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()

    with server("asyncio_server.py", r"listening on port (\d+)") as (process, port):
        run(clients(port))
        ends_well(process, (0,))


def test_synchronous_worker(texts: list[str]) -> None:
    lines = [json.dumps({"prompt": prompt, "max_new_tokens": 30}) for prompt in PROMPTS]
    lines += ['{"prompt": "x", "top_p": 2}', '{"prompt": ""}', "no JSON"]
    command = [sys.executable, str(EXAMPLES / "worker.py"), "--threads", "4"]
    done = subprocess.run(command, input="\n".join(lines * 3) + "\n", capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 18
    for i, text in enumerate(texts * 3):
        assert answers[i // 3 * 6 + i % 3]["text"] == text
    assert "top_p is 2" in answers[3]["error"] and "is empty" in answers[4]["error"] and "Expecting value" in answers[5]["error"]
