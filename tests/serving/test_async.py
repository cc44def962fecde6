"""``AsyncDecoder`` as its callers see it: results, events, ends, limits, and who waits for whom."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import aclosing

import pytest
import torch
from serving.async_helpers import Gate, baseline, read, results, run, slowly, until_idle

from engine import AsyncDecoder, BeamParams, Decoder, DecoderClosed, QueueFull, RequestStream, SamplingParams

Make = Callable[..., AsyncDecoder]

MIX = (
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=20, temperature=0.9, top_k=20, seed=3, logprobs=2),
    SamplingParams(max_new_tokens=9, do_sample=True, seed=4, num_return_sequences=3),
    BeamParams(max_new_tokens=10, num_beams=3, num_return_sequences=2),
)


def _endless(decoder: AsyncDecoder) -> RequestStream:
    return decoder.stream([1], max_new_tokens=250, ignore_eos=True, logits_processor=slowly)


PROMPTS = ([5, 9, 11], [7] * 20, [3, 4, 5, 6, 7, 8], [90, 91])


def test_results_are_those_of_the_decoder(served: Make, alone: Decoder) -> None:
    decoder = served()

    async def together() -> None:
        whole, *each = await asyncio.gather(
            decoder.generate(list(PROMPTS), params=list(MIX)),
            *(decoder.generate(prompt, params=params) for prompt, params in zip(PROMPTS, MIX, strict=True)),
        )
        assert results(whole) == results(alone.generate(list(PROMPTS), params=list(MIX)))
        for prompt, params, outputs in zip(PROMPTS, MIX, each, strict=True):
            assert results(outputs) == results(alone.generate(prompt, params=params))
        padded = await decoder.generate(torch.tensor([[0, 5, 9]]), attention_mask=torch.tensor([[0, 1, 1]]), max_new_tokens=4)
        assert results(padded) == results(alone.generate([5, 9], max_new_tokens=4))

    run(together())


@pytest.mark.parametrize("params", MIX)
def test_events_of_a_stream_add_up(served: Make, alone: Decoder, params: SamplingParams) -> None:
    decoder = served()

    async def one() -> None:
        stream = decoder.stream(PROMPTS[0], params=params)
        assert stream.outputs == []
        events = await read(stream)
        expected = alone.generate(PROMPTS[0], params=params)
        assert results(stream.outputs) == results(expected)
        assert sorted(results([e.output for e in events if e.output is not None])) == sorted(results(expected))
        for index, output in enumerate(expected):
            if not isinstance(params, BeamParams):
                assert [t for e in events if e.index == index for t in e.token_ids] == output.token_ids
        assert [e.index for e in events if e.output] and await read(stream) == []  # ended, and stays so

    run(one())


def test_text_and_options_by_keyword(bundled: Decoder, served: Make) -> None:
    expected = [bundled.generate("def f(", max_new_tokens=8, stop=")"), bundled.generate("x = ", max_new_tokens=6, regex="[0-9]{3}")]
    decoder = served(bundled)  # whose methods are not to be called from now on

    async def both() -> None:
        got = [
            await decoder.generate("def f(", max_new_tokens=8, stop=")"),
            await decoder.generate("x = ", max_new_tokens=6, regex="[0-9]{3}"),
        ]
        assert [results(o) for o in got] == [results(o) for o in expected]

    run(both())


def test_bad_input_reaches_the_caller(served: Make) -> None:
    decoder = served()

    async def refused() -> None:
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            await decoder.generate([1], max_new_tokens=0)
        with pytest.raises(TypeError, match="unknown option 'tempratur'; did you mean 'temperature'"):
            await decoder.generate([1], tempratur=1)
        with pytest.raises(ValueError, match="token id 101"):
            await read(decoder.stream([101]))
        with pytest.raises(ValueError, match="no tokenizer"):
            await decoder.stream("text").admitted()
        for bad in (7, "", b"a"):
            with pytest.raises(TypeError, match="request_id is .* must be a non-empty string"):
                await decoder.generate([1], request_id=bad)  # type: ignore[arg-type]
        good = decoder.stream([1], max_new_tokens=2)
        await good.admitted()
        await read(good)
        await good.admitted()  # as often as one likes
        await until_idle(decoder)

    run(refused())
    with pytest.raises(RuntimeError, match="no running event loop"):
        decoder.stream([1])


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="max_waiting is 0; it must be an integer of at least 1"):
        AsyncDecoder(None, max_waiting=0)
    decoder = object.__new__(Decoder)
    with pytest.raises(TypeError, match="got a Decoder and cache_tokens; give these to the Decoder"):
        AsyncDecoder(decoder, cache_tokens=64)
    with pytest.raises(TypeError):
        AsyncDecoder(3.5)


def test_abort_by_id_keeps_what_there_is(served: Make, alone: Decoder) -> None:
    decoder = served()
    whole = alone.generate(PROMPTS[1], max_new_tokens=200, ignore_eos=True)[0].token_ids

    async def aborted() -> None:
        stream = decoder.stream(PROMPTS[1], max_new_tokens=200, ignore_eos=True, logits_processor=slowly, request_id="mine")
        events = []
        async for event in stream:
            events.append(event)
            if len(events) == 3:
                assert decoder.abort("mine")
        output = events[-1].output
        assert output is not None and output.finish_reason == "abort"
        assert sum(event.output is not None for event in events) == 1
        assert 3 <= len(output.token_ids) < 200 and output.token_ids == whole[: len(output.token_ids)]
        assert not decoder.abort("mine") and not decoder.abort("never there")
        await until_idle(decoder)

    run(aborted())


def test_abort_while_waiting_and_before_admission(served: Make) -> None:
    decoder, gate = served(max_batch_size=1), Gate()

    async def aborted() -> None:
        running = asyncio.create_task(decoder.generate([1], max_new_tokens=2, logits_processor=gate, request_id="running"))
        await gate.until_reached()
        waiting = decoder.stream([2], request_id="waiting", num_return_sequences=2, max_new_tokens=3)
        assert decoder.abort("waiting")  # the loop is held: nothing of it has been taken up
        with pytest.raises(ValueError, match="request_id is 'waiting', which an unfinished call has"):
            decoder.stream([2], request_id="waiting")
        gate.open()
        events = await read(waiting)
        assert [(e.output.finish_reason, e.output.token_ids) for e in events if e.output] == [("abort", [])] * 2
        assert (await running)[0].finish_reason == "length"
        await read(decoder.stream([2], request_id="waiting", max_new_tokens=1))  # the id is free again
        await until_idle(decoder)

    run(aborted())


def test_queue_full(served: Make) -> None:
    decoder, gate = served(max_batch_size=1, max_waiting=3), Gate()

    async def crowded() -> None:
        first = asyncio.create_task(decoder.generate([1], max_new_tokens=1, logits_processor=gate))
        await gate.until_reached()
        waiting = [decoder.stream([2], max_new_tokens=1) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 requests are waiting, and max_waiting is 3"):
            decoder.stream([3])
        with pytest.raises(QueueFull):
            await decoder.generate([3])
        gate.open()
        await first
        assert [len(await read(stream)) for stream in waiting] == [1, 1, 1]
        assert len(await decoder.generate([3], max_new_tokens=1)) == 1
        for _ in range(4):
            with pytest.raises(ValueError, match="token id 1000"):
                await decoder.generate([1000])  # what is refused counts no longer
        for _ in range(5):
            await decoder.generate([3], max_new_tokens=1)

    run(crowded())


def test_a_held_step_holds_no_event_loop(served: Make) -> None:
    decoder, gate = served(), Gate()

    async def held() -> None:
        first = asyncio.create_task(decoder.generate([1], max_new_tokens=2, logits_processor=gate))
        await gate.until_reached()
        for _ in range(100):  # the loop's thread stands still, and this goes on
            await asyncio.sleep(0)
        streams = [decoder.stream([2], max_new_tokens=2) for _ in range(3)]
        assert decoder.abort(streams[0].request_id)
        assert not first.done()
        gate.open()
        await first
        assert [(await read(stream))[-1].output.finish_reason for stream in streams] == ["abort", "length", "length"]

    run(held())


def test_one_wake_up_for_each_step_and_event_loop(served: Make) -> None:
    decoder = served()

    async def counted() -> None:
        loop = asyncio.get_running_loop()
        wake_ups, plain = 0, loop.call_soon_threadsafe

        def counting(*args, **kwargs):
            nonlocal wake_ups
            wake_ups += threading.current_thread() is not threading.main_thread()
            return plain(*args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        before = decoder.stats().num_steps
        streams = [decoder.stream([i + 1], max_new_tokens=30, ignore_eos=True) for i in range(8)]
        events = await asyncio.gather(*map(read, streams))
        steps = decoder.stats().num_steps - before
        assert sum(map(len, events)) == 240
        assert wake_ups <= steps + len(streams) < 100  # beside one for each step, at most one for each admission

    run(counted())


def test_slow_and_silent_readers_stall_nobody(served: Make, alone: Decoder) -> None:
    decoder = served(cache_tokens=4096)

    async def slow() -> None:
        silent = [decoder.stream([i + 1], max_new_tokens=40, ignore_eos=True) for i in range(3)]
        outputs = await decoder.generate([50, 51], max_new_tokens=60, ignore_eos=True)
        assert results(outputs) == results(alone.generate([50, 51], max_new_tokens=60, ignore_eos=True))
        await until_idle(decoder)  # they have run to their ends unread
        for i, stream in enumerate(silent):
            assert len(await read(stream)) == 40
            assert results(stream.outputs) == results(alone.generate([i + 1], max_new_tokens=40, ignore_eos=True))

    run(slow())


def test_leaving_a_stream_aborts_it(served: Make) -> None:
    decoder = served()

    def finished() -> list[str | None]:
        return [reason for reason in reasons if reason != "length"]

    reasons: list[str | None] = []
    enqueue = decoder.decoder.loop.enqueue

    def noting(requests):
        for request in requests:
            finish = request.finish
            request.finish = lambda reason, _finish=finish, **rest: (reasons.append(reason), _finish(reason, **rest))[1]
        enqueue(requests)

    decoder.decoder.loop.enqueue = noting  # type: ignore[method-assign]

    async def left() -> None:
        async for _ in _endless(decoder):
            break
        await until_idle(decoder)
        assert finished() == ["abort"]

        async with aclosing(_endless(decoder)) as stream:
            await anext(stream)
        await until_idle(decoder)
        assert finished() == ["abort"] * 2 and stream.outputs[0].token_ids

        async def reader(stream) -> None:
            await read(stream)

        kept = _endless(decoder)  # whoever else holds the stream
        task = asyncio.create_task(reader(kept))
        while not decoder.decoder.loop.scheduler.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(decoder)
        assert finished() == ["abort"] * 3

        task = asyncio.create_task(decoder.generate([[1], [2]], max_new_tokens=250, ignore_eos=True, logits_processor=slowly))
        while not decoder.decoder.loop.scheduler.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(decoder)
        assert finished() == ["abort"] * 5

        dropped = _endless(decoder)
        await anext(dropped)
        cycle = [dropped]
        cycle.append(cycle)  # only the garbage collector finds it
        del dropped, cycle
        gc.collect()
        await until_idle(decoder)
        assert finished() == ["abort"] * 6

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(read(_endless(decoder)), 0.01)
        await until_idle(decoder)
        assert len(finished()) == 7 and reasons.count("length") == 0

    run(left())


def test_stats_and_the_prefix_cache(served: Make, alone: Decoder) -> None:
    decoder, gate = served(prefix_cache=True, max_batch_size=1), Gate()
    prompt = list(range(3, 60))

    async def twice() -> None:
        cached = []
        for _ in range(2):
            (output,) = await decoder.generate(prompt, max_new_tokens=5)
            assert results([output]) == results(alone.generate(prompt, max_new_tokens=5))
            cached.append(output.metrics.num_cached_tokens)
        assert cached == [0, 48]
        assert decoder.stats().num_cached_blocks == 3
        held = asyncio.create_task(decoder.generate(prompt, max_new_tokens=2, logits_processor=gate))
        await gate.until_reached()
        waiting = asyncio.create_task(decoder.generate([1], max_new_tokens=2))
        resetting = asyncio.create_task(decoder.reset_prefix_cache())
        await asyncio.sleep(0.01)
        stats = decoder.stats()  # in the middle of a step
        assert stats.num_running == 1 and not resetting.done()
        gate.open()
        await asyncio.gather(held, waiting, resetting)
        await decoder.generate(prompt, max_new_tokens=1, cache_salt="another's")
        await decoder.reset_prefix_cache()
        await until_idle(decoder)
        assert decoder.stats().num_cached_blocks == 0
        assert decoder.stats().num_finished["length"] == 5
        await decoder.close()
        with pytest.raises(DecoderClosed, match="is closed"):
            await decoder.reset_prefix_cache()

    run(twice())


def test_one_reader_at_a_time(served: Make) -> None:
    decoder, gate = served(), Gate()

    async def two() -> None:
        stream = decoder.stream([1], max_new_tokens=2, logits_processor=gate)
        reader = asyncio.create_task(read(stream))
        await gate.until_reached()
        with pytest.raises(RuntimeError, match="is being read already"):
            await anext(stream)
        gate.open()
        assert len(await reader) == 2  # the other's mistake has not ended it

    run(two())


def test_many_threads_and_event_loops(served: Make, alone: Decoder) -> None:
    decoder = served(cache_tokens=2048)
    expected = {i: results(alone.generate([i + 1, i + 2], max_new_tokens=15, do_sample=True, seed=i)) for i in range(12)}
    failures: list[BaseException] = []

    def client(first: int) -> None:
        async def both() -> None:
            for i in (first, first + 1, first + 2):
                outputs = await decoder.generate([i + 1, i + 2], max_new_tokens=15, do_sample=True, seed=i)
                assert results(outputs) == expected[i]

        try:
            run(both())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(first,)) for first in (0, 3, 6, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_drain(served: Make) -> None:
    decoder = served()

    async def drained() -> None:
        running = [asyncio.create_task(decoder.generate([i], max_new_tokens=40, ignore_eos=True)) for i in range(1, 5)]
        waiting = decoder.stream([9], max_new_tokens=3)
        await asyncio.sleep(0)
        ending = [asyncio.create_task(decoder.drain()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(DecoderClosed, match="is draining; it takes no more requests"):
            await decoder.generate([1])
        ending[1].cancel()  # whoever gives up waiting stops nothing
        await ending[0]
        baseline(decoder)
        assert len(await read(waiting)) == 3
        assert [(await task)[0].finish_reason for task in running] == ["length"] * 4
        await decoder.drain()
        await decoder.close()
        with pytest.raises(DecoderClosed, match="is closed|is draining"):
            decoder.stream([1])

    run(drained())


def test_drain_when_idle(served: Make) -> None:
    run(served().drain())


def test_close_aborts_what_is_left(served: Make) -> None:
    decoder, gate = served(max_batch_size=2), Gate()

    async def closed() -> None:
        streams = [_endless(decoder) for _ in range(4)]
        for stream in streams:
            await stream.admitted()
        held = decoder.stream([9], logits_processor=gate)
        await anext(streams[0])
        await asyncio.gather(decoder.close(), decoder.close())
        for stream in streams:
            *_, last = await read(stream)
            assert last.output is not None and last.output.finish_reason == "abort"
        try:
            *_, last = await read(held)  # it had been admitted in time
            assert last.output.finish_reason == "abort"
        except DecoderClosed as error:
            assert "before the request was admitted" in str(error)
        await decoder.close()
        with pytest.raises(DecoderClosed, match="is closed"):
            await decoder.generate([1])
        assert not decoder.abort(streams[0].request_id)
        await decoder.drain()

    run(closed())
    for thread in decoder._worker._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_close_from_another_thread_and_loop(served: Make) -> None:
    decoder = served()

    async def closed() -> None:
        stream = _endless(decoder)
        await anext(stream)
        closer = threading.Thread(target=lambda: run(decoder.close()))
        closer.start()
        *_, last = await read(stream)
        assert last.output is not None and last.output.finish_reason == "abort"
        while closer.is_alive():
            await asyncio.sleep(0.001)

    run(closed())


def test_async_with_closes(llama) -> None:
    async def inside() -> AsyncDecoder:
        async with AsyncDecoder(llama, cache_tokens=256) as decoder:
            await decoder.generate([1], max_new_tokens=2)
            stream = _endless(decoder)
            await stream.admitted()
        assert (await read(stream))[-1].output.finish_reason == "abort"
        return decoder

    decoder = run(inside())
    baseline(decoder)
    for thread in decoder._worker._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_one_that_nobody_holds_ends_its_threads(llama) -> None:
    decoder = AsyncDecoder(llama, cache_tokens=256)
    run(decoder.generate([1], max_new_tokens=2))
    threads, inner = decoder._worker._threads, weakref.ref(decoder.decoder)
    stream = None

    async def only_its_stream() -> None:  # a stream keeps its decoder
        nonlocal decoder, stream
        stream = decoder.stream([1], max_new_tokens=20, ignore_eos=True)
        del decoder
        gc.collect()
        assert len(await read(stream)) == 20

    run(only_its_stream())
    del stream
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    del threads, thread
    gc.collect()
    assert inner() is None  # and with it the cache
