"""Programs that run Triton's kernels in its interpreter, one at a time, beside the tests: they begin when the tests do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
_one_at_a_time = ThreadPoolExecutor(1)
_running: list[subprocess.Popen[str]] = []


class Interpreted:
    """What a program prints last, one JSON object: group of cases -> what was found.

    A test module has one as ``INTERPRETED``, and its tests take the fixture ``interpreted``.
    """

    def __init__(self, program: str, groups: tuple[str, ...]) -> None:
        self._command = [sys.executable, str(TESTS / program), *groups]
        self._found: Future[dict[str, Any]] | None = None

    def begin(self) -> None:
        if self._found is None:
            self._found = _one_at_a_time.submit(self._run)

    def outcome(self) -> dict[str, Any]:
        self.begin()
        assert self._found is not None
        return self._found.result()

    def _run(self) -> dict[str, Any]:
        path = os.pathsep.join([str(TESTS), str(TESTS / "ops"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        # The tests themselves go first.
        command = ["nice", "-n", "15", *self._command]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            _running.append(process)
            out, err = process.communicate()
            _running.remove(process)
        assert process.returncode == 0, err[-3000:]
        outcome: dict[str, Any] = json.loads(out.splitlines()[-1])
        return outcome


def stop() -> None:
    """When the tests end, so do programs that nobody waits for any more."""
    _one_at_a_time.shutdown(wait=False, cancel_futures=True)
    for process in tuple(_running):
        process.kill()
