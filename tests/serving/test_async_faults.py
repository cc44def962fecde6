"""What goes wrong around ``AsyncDecoder``, and that nothing hangs or leaks by it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import pytest
from serving.async_helpers import SECONDS, Gate, baseline, read, results, run, slowly, until_idle

from engine import AsyncDecoder, Decoder, DecoderClosed

Make = Callable[..., AsyncDecoder]


def broken(token_ids, logits):
    raise ZeroDivisionError("a processor's own")


def test_a_processor_that_raises_is_its_requests_alone(served: Make, alone: Decoder) -> None:
    decoder = served()

    async def both() -> None:
        bad, good = await asyncio.gather(
            decoder.generate([1, 2], max_new_tokens=5, logits_processor=broken),
            decoder.generate([3, 4], max_new_tokens=25, ignore_eos=True),
        )
        assert bad[0].finish_reason == "error" and "ZeroDivisionError" in bad[0].error
        assert results(good) == results(alone.generate([3, 4], max_new_tokens=25, ignore_eos=True))
        await until_idle(decoder)

    run(both())


def test_a_processor_that_sleeps_runs_into_its_timeout(served: Make) -> None:
    decoder, gate = served(), Gate()

    async def late() -> None:
        task = asyncio.create_task(decoder.generate([1], timeout=0.01, max_new_tokens=5, logits_processor=gate))
        await gate.until_reached()
        await asyncio.sleep(0.02)
        gate.open()
        (output,) = await task
        assert output.finish_reason == "abort" and "timeout of 0.01 seconds" in output.error
        await until_idle(decoder)

    run(late())


def test_time_spent_before_admission_counts(served: Make) -> None:
    decoder, gate = served(), Gate()
    prepare = decoder.decoder.prepare

    def slow(*args, **options):
        gate(None, None)
        return prepare(*args, **options)

    decoder.decoder.prepare = slow  # type: ignore[method-assign]

    async def late() -> None:
        task = asyncio.create_task(decoder.generate([1], timeout=0.01, max_new_tokens=5))
        await gate.until_reached()
        other = decoder.stream([1], max_new_tokens=5)
        assert decoder.abort(other.request_id)  # it is in the same queue
        await asyncio.sleep(0.02)
        gate.open()
        (output,) = await task
        assert output.finish_reason == "abort" and output.token_ids == [] and output.metrics.total_time >= 0.02
        assert [e.output.finish_reason for e in await read(other) if e.output] == ["abort"]
        await until_idle(decoder)

    run(late())


class Panic(BaseException):
    """What a tokenizer written in Rust raises when it panics is no ``Exception`` either."""


def test_a_tokenizer_that_fails(bundled: Decoder, served: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = served(bundled)
    tokenizer = decoder.decoder.tokenizer
    encode, decode = tokenizer.encode, tokenizer.decode

    def failing_encode(text: str) -> list[int]:
        if "panic" in text:
            raise Panic("in the tokenizer")
        if "bad" in text:
            raise OverflowError("too long for it")
        return encode(text)

    def failing_decode(ids: list[int]) -> str:
        if threading.current_thread().name == "engine-loop" and failing:
            raise OverflowError("no such text")
        return decode(ids)

    monkeypatch.setattr(tokenizer, "encode", failing_encode)
    monkeypatch.setattr(tokenizer, "decode", failing_decode)
    failing: list[bool] = []

    async def all_of_them() -> None:
        with pytest.raises(OverflowError, match="too long for it"):
            await decoder.generate("bad")
        with pytest.raises(RuntimeError, match="could not be admitted: Panic") as raised:
            await decoder.generate("panic")
        assert isinstance(raised.value.__cause__, Panic)
        assert (await decoder.generate("good", max_new_tokens=3))[0].finish_reason in ("length", "stop")
        failing.append(True)
        (output,) = await decoder.generate("good", max_new_tokens=3)
        assert output.finish_reason == "error" and "cannot decode token" in output.error
        failing.clear()
        assert (await decoder.generate("good", max_new_tokens=3))[0].finish_reason in ("length", "stop")
        await until_idle(decoder)

    run(all_of_them())


def test_a_cache_too_small_for_all(served: Make, alone: Decoder) -> None:
    decoder = served(cache_tokens=16 * 12, max_batch_size=8)
    prompts = [[i + 1, i + 2, i + 3] for i in range(10)]
    expected = [results(alone.generate(p, max_new_tokens=100, ignore_eos=True, do_sample=True, seed=1)) for p in prompts]

    async def crowded() -> None:
        with pytest.raises(ValueError, match="needs 16 cache blocks of 16 tokens; the whole cache has 12"):
            await decoder.generate([1], max_new_tokens=250)
        outputs = await asyncio.gather(*(decoder.generate(p, max_new_tokens=100, ignore_eos=True, do_sample=True, seed=1) for p in prompts))
        assert [results(o) for o in outputs] == expected
        assert sum(o.metrics.num_preemptions for (o,) in outputs) > 0
        await until_idle(decoder)

    run(crowded())


def test_a_step_that_fails_ends_its_requests_and_no_others(served: Make, alone: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = served()
    runner = decoder.decoder.loop.runner
    run_plan, failing = runner.run, threading.Event()

    def failing_run(plan):
        if failing.is_set():
            failing.clear()
            raise MemoryError("a kernel's")
        return run_plan(plan)

    monkeypatch.setattr(runner, "run", failing_run)

    async def failed() -> None:
        options = {"max_new_tokens": 250, "ignore_eos": True, "num_return_sequences": 2, "logits_processor": slowly}
        streams = [decoder.stream([i + 1], **options) for i in range(2)]
        for stream in streams:
            await anext(stream)
        failing.set()
        for stream in streams:
            ends = [event.output for event in await read(stream) if event.output]
            assert [output.finish_reason for output in ends] == ["error"] * 2
            assert all("MemoryError: a kernel's" in output.error for output in ends)
        await until_idle(decoder)
        assert results(await decoder.generate([5], max_new_tokens=9)) == results(alone.generate([5], max_new_tokens=9))

    run(failed())


@pytest.mark.parametrize("error", [RuntimeError("a planner's own"), KeyboardInterrupt("in the loop's thread")])
def test_a_loop_that_stops_fails_everybody(llama, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    decoder = AsyncDecoder(llama, cache_tokens=512, max_batch_size=2)
    scheduler, gate = decoder.decoder.loop.scheduler, Gate()

    def failing_plan(*_):
        raise error

    said = f"the decoding loop has stopped: {type(error).__name__}: {error}"

    async def stopped() -> None:
        held = decoder.stream([1], max_new_tokens=50, logits_processor=gate, ignore_eos=True)
        await gate.until_reached()
        unread = decoder.stream([2], max_new_tokens=50)
        readers = [asyncio.create_task(decoder.generate([3], max_new_tokens=50)) for _ in range(4)]
        readers.append(asyncio.create_task(read(held)))
        draining = asyncio.create_task(decoder.drain())
        await asyncio.sleep(0.01)
        monkeypatch.setattr(scheduler, "plan", failing_plan)
        gate.open()
        for reader in readers:
            with pytest.raises(DecoderClosed, match=said) as raised:
                await reader
            assert raised.value.__cause__ is error
        with pytest.raises(DecoderClosed, match=said):
            await read(unread)
        for _ in range(2):
            with pytest.raises(DecoderClosed, match=said) as raised:
                await decoder.generate([1])
            assert raised.value.__cause__ is error
            await decoder.drain()
            await decoder.close()
        await draining

    run(stopped())
    monkeypatch.undo()
    baseline(decoder)
    for thread in decoder._worker._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_closed_event_loops_hold_nothing(served: Make) -> None:
    decoder, gate = served(), Gate()
    loop = asyncio.new_event_loop()

    async def begin():
        read_in_vain = decoder.stream([1], max_new_tokens=250, ignore_eos=True, logits_processor=gate)
        unread = decoder.stream([1], max_new_tokens=10, ignore_eos=True)
        return read_in_vain, unread, asyncio.create_task(read(read_in_vain))

    read_in_vain, unread, task = loop.run_until_complete(begin())
    loop.run_until_complete(gate.until_reached())
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    gate.open()

    async def others() -> None:
        assert len((await decoder.generate([2], max_new_tokens=5, ignore_eos=True))[0].token_ids) == 5
        await until_idle(decoder)

    run(others())
    assert read_in_vain.outputs[0].finish_reason == "abort" and unread.outputs[0].finish_reason == "length"


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=SECONDS)


BEGIN = """
import asyncio, os, sys, threading, time
from engine import AsyncDecoder, Decoder, step_threads
decoder = AsyncDecoder(Decoder.bundled(cache_tokens=4096))
kept = []
async def main():
    for i in range(20):
        kept.append(decoder.stream("def f(", max_new_tokens=500, ignore_eos=True))
    async for event in kept[0]:
        break
"""


def test_the_interpreter_ends_without_close() -> None:
    """In the middle of steps, with a thread that comes out of a kernel again and again."""
    for _ in range(3):
        done = python(BEGIN + "asyncio.run(main()); print('end')")
        assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_the_interpreter_waits_only_so_long_for_a_step() -> None:
    done = python(
        BEGIN
        + """
step_threads.EXIT_SECONDS = 0.2
reached = threading.Event()
def sleeps(token_ids, logits):
    reached.set()
    time.sleep(1000)
async def held():
    await main()
    kept.append(decoder.stream("x", logits_processor=sleeps))
    await asyncio.to_thread(reached.wait)
asyncio.run(held())
print("end")
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork_it_says_so() -> None:
    done = python(
        BEGIN
        + """
asyncio.run(main())
child = os.fork()
if not child:
    try:
        asyncio.run(decoder.generate("x"))
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    )
    assert "before the process forked" in done.stdout and done.stdout.endswith("7\n") and done.returncode == 0, done


def test_sleeping_costs_nothing(served: Make) -> None:
    """With nothing to do the threads wait; they do not look again and again."""
    decoder = served()
    run(decoder.generate([1], max_new_tokens=2))
    taken = []
    get = decoder._worker._commands.get

    class Counted:
        put = decoder._worker._commands.put

        def get(self, block: bool):
            taken.append(block)
            return get(block=block)

    decoder._worker._commands = Counted()  # type: ignore[assignment]
    run(decoder.generate([1], max_new_tokens=1))
    while not (taken and taken[-1]):  # it goes to sleep
        time.sleep(0.001)
    before = len(taken)
    time.sleep(0.3)
    assert len(taken) == before
