"""A peer in a process of its own: ``python -m peers.worker NAME``, one JSON object a line on its input and on its output.

``{"do": "decode", ...}`` calls that method with the other fields as arguments. The answer is ``{"result": ...}`` or ``{"error": "..."}``.
It comes when the peer's threads have come to rest, so that they do not spin while somebody else is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from peers import Peer, make

REST_WINDOW, REST_SHARE, REST_LIMIT = 0.01, 0.05, 2.0  # seconds, of a core, seconds


def rest() -> float:
    """Wait until the process does nothing, at most REST_LIMIT; the seconds it took."""
    start = time.perf_counter()
    while time.perf_counter() - start < REST_LIMIT:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(REST_WINDOW)
        if time.process_time() - cpu < REST_SHARE * (time.perf_counter() - wall):
            break
    return time.perf_counter() - start


def answer(peer: Peer, do: str, arguments: dict[str, Any]) -> Any:
    if do == "describe":
        why = peer.unavailable()
        version = peer.version() if why is None else None
        return {"unavailable": why, "version": version, "dtypes": peer.dtypes, "beams": peer.beams}
    if do == "load":
        return peer.load(Path(arguments.pop("folder")), **arguments)
    if do == "decode":
        return dataclasses.asdict(peer.decode(**arguments))
    if do == "prefill":
        return peer.prefill(**arguments)
    raise ValueError(f"do {do!r}: must be describe, load, decode or prefill")


def main() -> None:
    # What libraries print must not get among the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = make(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": answer(peer, request.pop("do"), request)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        reply["rest"] = rest()
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
