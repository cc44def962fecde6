"""Servers of OpenAI's API in processes of their own: this engine's, and those of peers, in the interpreter that ENGINE_PEERS_<NAME> names.

``python -m peers.servers NAME FOLDER PORT THREADS`` becomes the server of that name: on the loopback address, with the float32 Hugging Face
model of the folder as ``MODEL``, without a cache of prompts where that can be chosen.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from peers import SERVERS, converted, missing, version_of
from peers.remote import BENCHMARKS, PeerError

HOST, MODEL = "127.0.0.1", "model"
START_SECONDS = 180


class Server:
    """A server that has loaded its model and answers at ``url``; close it.

    Args:
        name: "ours", or one of ``SERVERS``.
        folder: of the model.
        num_threads: that it computes with; ours chooses itself.
    """

    def __init__(self, name: str, folder: Path, num_threads: int) -> None:
        self.name = name
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        python = os.environ.get(f"ENGINE_PEERS_{name.upper()}", sys.executable)
        environment = dict(os.environ)
        if name != "ours":
            environment |= {"OMP_NUM_THREADS": str(num_threads)}
        environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, "-m", "peers.servers", name, str(folder), str(port), str(num_threads)], env=environment,
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{name}: cannot start {python}: {error}") from error
        self._await()

    def _await(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                    return
            except OSError:  # refused, or not ready
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                last = self._log.read().strip().splitlines()[-1:]
                self.close()
                raise PeerError(f"{self.name}: {''.join(last) or f'does not answer after {START_SECONDS} seconds'}")
            time.sleep(0.1)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


# ---- in the process of the server ----


def command(name: str, folder: Path, port: str, num_threads: str) -> list[str]:
    """What the interpreter is run with; ``SystemExit`` with one sentence where the server is not installed."""
    if name == "ours":
        return ["-m", "engine", "serve", "--model", str(folder), "--host", HOST, "--port", port, "--served-model-name", MODEL]
    if name == "vllm":
        _need("vllm")
        return [
            "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", HOST, "--port", port, "--dtype", "float32",
            "--served-model-name", MODEL, "--no-enable-prefix-caching", "--disable-log-requests",
        ]  # fmt: skip
    if name == "llama_cpp":
        _need("llama_cpp", "gguf", "safetensors", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
        from peers.llama_cpp import write_gguf

        label = f"llama_cpp-{version_of('gguf')}-words"
        path = converted(folder, label, lambda target: write_gguf(folder, target / "model.gguf", words=True)) / "model.gguf"
        # It decodes one request at a time; without the last option a new one breaks off the one before.
        return [
            "-m", "llama_cpp.server", "--model", str(path), "--host", HOST, "--port", port, "--model_alias", MODEL, "--n_ctx", "2048",
            "--n_threads", num_threads, "--n_threads_batch", num_threads, "--type_k", "0", "--type_v", "0", "--verbose", "false",
            "--interrupt_requests", "false",
        ]  # fmt: skip
    raise SystemExit(f"server {name!r}: must be one of ours, {', '.join(SERVERS)}")


def _need(*modules: str) -> None:
    if why := missing(*modules):
        raise SystemExit(why)


def main() -> None:
    name, folder, port, num_threads = sys.argv[1:]
    os.execv(sys.executable, [sys.executable, *command(name, Path(folder), port, num_threads)])


if __name__ == "__main__":
    main()
