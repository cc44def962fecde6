"""The benchmark's end of a peer's pipe."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import ALL, NAMES, Timing

BENCHMARKS = Path(__file__).resolve().parent.parent


class PeerError(RuntimeError):
    """A peer said that it could not do something, or died."""


class Remote:
    """A peer in its own process. ``unavailable``, ``version``, ``dtypes``, ``beams`` are what it says of itself."""

    def __init__(self, name: str, num_threads: int) -> None:
        self.name, self._num_threads = name, num_threads
        self._loaded: tuple[Path, str] | None = None
        python = os.environ.get(f"ENGINE_PEERS_{name.upper()}", sys.executable)
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(num_threads)}
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, "-m", "peers.worker", name], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log,
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{name}: cannot start {python}: {error}") from error
        about = self._ask(do="describe")
        self.unavailable: str | None = about["unavailable"]
        self.version: str | None = about["version"]
        self.dtypes: tuple[str, ...] = tuple(about["dtypes"])
        self.beams: bool = about["beams"]

    def load(self, folder: Path, dtype: str) -> None:
        if self._loaded != (folder, dtype):
            self._loaded = None
            self._ask(do="load", folder=str(folder), dtype=dtype, num_threads=self._num_threads)
            self._loaded = (folder, dtype)

    def decode(self, prompts: Sequence[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        return Timing(**self._ask(do="decode", prompts=list(prompts), new_tokens=new_tokens, num_beams=num_beams))

    def prefill(self, tokens: list[int]) -> float:
        return self._ask(do="prefill", tokens=tokens)

    def another(self) -> Remote:
        """A second process of the same peer, for a second model."""
        return Remote(self.name, self._num_threads)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of a request that it did not live to read
                    pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise PeerError(f"{self.name} died: {''.join(last) or 'it said nothing'}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self.name}: {reply['error']}")
        return reply["result"]


def wanted_names(wanted: str) -> tuple[str, ...]:
    """The peers that ``--peers`` asks for: all where it is auto, none where it is none, or names with commas."""
    if wanted in ("auto", "none"):
        return ALL if wanted == "auto" else ()
    names = tuple(wanted.split(","))
    for name in names:
        if name not in ALL:
            raise ValueError(f"--peers {wanted}: {name!r} must be one of {', '.join(ALL)}, or the whole auto or none")
    return names


def find(names: Sequence[str], num_threads: int) -> tuple[list[Remote], dict[str, str]]:
    """Of these peers those that decode here, started; and of those that are not there, why."""
    found, absent = [], {}
    for name in names:
        if name not in NAMES:
            continue
        try:
            peer = Remote(name, num_threads)
        except PeerError as error:
            absent[name] = str(error)
            continue
        if peer.unavailable is None:
            found.append(peer)
        else:
            absent[name] = peer.unavailable
            peer.close()
    return found, absent
