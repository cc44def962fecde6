"""The engine inside a synchronous program: many threads ask, one thread owns the decoder and runs all their requests in the same steps.

    printf '%s\n' '{"prompt": "def f(", "max_new_tokens": 20}' '{"prompt": "class A:", "max_new_tokens": 20}' | python examples/worker.py

Reads one JSON object a line (``prompt`` and options of SamplingParams) and prints one a line, in the order of the input. ``Worker`` is what
a program would take from here: ``worker.submit(prompt, **options)`` gives a ``concurrent.futures.Future`` of the outputs.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from engine import Decoder, RequestOutput
from engine.request import Submission

Job = tuple[str, dict[str, Any], "Future[list[RequestOutput]]"]


class Worker:
    """A decoder and the one thread that uses it. ``with Worker(decoder) as worker`` ends it, when its requests have ended."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, prompt: str, **options: Any) -> Future[list[RequestOutput]]:
        """From any thread. Bad input is the future's exception; cancelling it before it has begun leaves it out."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker has ended")
        future: Future[list[RequestOutput]] = Future()
        self._jobs.put((prompt, options, future))
        return future

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        unfinished: dict[Submission, Future[list[RequestOutput]]] = {}
        closing = False
        while not closing or unfinished:
            while not closing:
                try:
                    job = self._jobs.get(block=not unfinished)  # asleep while there is nothing to do
                except queue.Empty:
                    break
                if job is None:
                    closing = True
                else:
                    self._begin(job, unfinished)
            try:
                if self._decoder.has_work:
                    self._decoder.step()
            except BaseException as error:  # no request's fault: nothing can go on
                for future in unfinished.values():
                    future.set_exception(error)
                raise
            for submission in [submission for submission in unfinished if submission.finished]:
                unfinished.pop(submission).set_result(submission.outputs)

    def _begin(self, job: Job, unfinished: dict[Submission, Future[list[RequestOutput]]]) -> None:
        prompt, options, future = job
        if future.set_running_or_notify_cancel():
            try:
                unfinished[self._decoder.submit(prompt, **options)] = future
            except (ValueError, TypeError, ImportError) as error:
                future.set_exception(error)


def answer(worker: Worker, line: str) -> str:
    """What one of many threads does: ask, wait, go on with the result."""
    try:
        (output, *_) = worker.submit(**json.loads(line)).result()
    except (ValueError, TypeError) as error:
        return json.dumps({"error": str(error)})
    return json.dumps({"text": output.text, "finish_reason": output.finish_reason, "error": output.error})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The engine inside a synchronous program.")
    parser.add_argument("--model", help="a path (default: the model that comes with the package)")
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    decoder = Decoder(arguments.model) if arguments.model else Decoder.bundled()
    with Worker(decoder) as worker, ThreadPoolExecutor(arguments.threads) as threads:
        for line in threads.map(lambda line: answer(worker, line), sys.stdin):
            print(line, flush=True)
