"""``python -m engine serve`` as a process: it says where it listens, lets requests end when told to leave, and leaves with 0."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from server.server_helpers import SECONDS, until

from engine.cli import main
from engine.server import command


class Process:
    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve", "--port", "0", "--cache-tokens", "16384", "--log-format", "json", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        match = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", first)
        assert match, first
        self.http = httpx.Client(base_url=match[1], timeout=SECONDS)

    def until_ready(self) -> None:
        until(lambda: self.http.get("/ready").status_code == 200, pause=0.1)

    def end(self, sent: int = signal.SIGTERM) -> tuple[int, list[dict]]:
        """Its status and its log."""
        self.process.send_signal(sent)
        _, log = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Process]:
    one = Process(*arguments, **environment)
    try:
        yield one
    finally:
        one.http.close()
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


LONG = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "n": 4}


def test_told_to_leave_under_load_it_lets_requests_end(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    with serving("--chat-template", str(template), "--served-model-name", "mine", "--drain-timeout", "50", ENGINE_API_KEY="k") as one:
        loading = one.http.get("/ready")
        assert loading.status_code in (200, 503)
        assert one.http.get("/health").status_code == 200
        one.until_ready()
        assert one.http.post("/v1/completions", json=LONG).status_code == 401
        one.http.headers["authorization"] = "Bearer k"
        chat = one.http.post(
            "/v1/chat/completions", json={"model": "mine", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        )
        assert chat.status_code == 200
        replies: list[httpx.Response | str] = []

        def ask(stream: bool) -> None:
            try:
                replies.append(httpx.post(f"{one.http.base_url}/v1/completions", json={**LONG, "stream": stream}, timeout=SECONDS,
                                          headers={"authorization": "Bearer k"}))  # fmt: skip
            except Exception as error:
                replies.append(repr(error))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: one.http.get("/stats").json()["decoder"]["num_running"] == 16, pause=0.01)
        one.process.send_signal(signal.SIGTERM)
        until(lambda: one.http.get("/ready").status_code == 503, pause=0.01)
        late = one.http.post("/v1/completions", json={"prompt": "x"})
        assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down" and "retry-after" in late.headers
        for thread in threads:
            thread.join(SECONDS)
        assert [reply if isinstance(reply, str) else reply.status_code for reply in replies] == [200] * 4
        whole = [reply.json() for reply in replies if reply.headers["content-type"] == "application/json"]
        assert len(whole) == 2 and all(choice["finish_reason"] == "length" for reply in whole for choice in reply["choices"])
        streamed = [reply.text for reply in replies if reply.headers["content-type"].startswith("text/event-stream")]
        assert len(streamed) == 2 and all(text.endswith("data: [DONE]\n\n") for text in streamed)
        _, log = one.process.communicate(timeout=SECONDS)
        assert one.process.returncode == 0
        lines = [json.loads(line) for line in log.splitlines()]
        assert [line["message"] for line in lines if "message" in line] == ["ready", "draining: no more requests are taken", "stopped"]


def test_what_does_not_end_in_time_is_ended() -> None:
    with serving("--drain-timeout", "0.2") as one:
        one.until_ready()
        with one.http.stream("POST", "/v1/completions", json={**LONG, "n": 64, "stream": True}) as reply:
            pieces = reply.iter_text()
            assert next(pieces)
            begun = time.monotonic()
            one.process.send_signal(signal.SIGINT)
            text = "".join(pieces)
        assert "shutting down" in text and text.endswith("data: [DONE]\n\n")
        one.process.communicate(timeout=SECONDS)
        assert one.process.returncode == 0 and time.monotonic() - begun < SECONDS


def test_told_to_leave_before_it_is_ready() -> None:
    with serving() as one:
        status, log = one.end()
    assert status == 0 and all(line["level"] == "info" for line in log)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "engine", "serve", "--port", "0", "--model", str(tmp_path)], capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 2 and "error: " in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "--port is 99999"),
        (["--max-waiting", "0"], "--max-waiting is 0"),
        (["--api-key", ""], "--api-key is empty"),
        (["--chat-template", "no such file"], "no such file"),
        (["--host", "no.such.host.invalid"], "cannot listen on"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments, **options):
        if name == "main" and arguments and (arguments[0] or {}).get("__package__") == "engine.server":
            raise ImportError("No module named 'fastapi'")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'decoding-engine[server]'" in capsys.readouterr().err


def test_options_reach_decoder_and_settings() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    command.add_arguments(parser)
    given = (
        "--model a/b --kv-dtype int8 --max-batch-size 3 --cache-tokens 64 --no-prefix-cache --api-key k --cors-origin o "
        "--max-prompt-tokens 5 --max-body-bytes 6 --request-timeout 7"
    )
    arguments = parser.parse_args(given.split())
    import torch

    options = {"max_batch_size": 3, "cache_tokens": 64, "prefix_cache": False, "kv_dtype": torch.int8}
    assert command.decoder_options(arguments) == options
    settings = command.settings(arguments)
    assert (settings.model, settings.api_keys, settings.cors_origins) == (("b",), ("k",), ("o",))
    assert (settings.max_prompt_tokens, settings.max_body_bytes, settings.request_timeout) == (5, 6, 7)
    assert command.decoder_options(parser.parse_args([])) == {}
