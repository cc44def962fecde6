"""Any interleaving of clients that read, dawdle, abort, cancel and leave: each gets what it would get alone, or its beginning."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.async_helpers import baseline, read, result, results, run, until_idle

from engine import AsyncDecoder, BeamParams, Decoder, QueueFull, RequestOutput, SamplingParams, StreamEvent

PARAMS = (
    SamplingParams(max_new_tokens=40, ignore_eos=True),
    SamplingParams(max_new_tokens=25, temperature=1.1, top_p=0.9, seed=11),
    SamplingParams(max_new_tokens=30, do_sample=True, seed=12, num_return_sequences=3, presence_penalty=0.5, ignore_eos=True),
    BeamParams(max_new_tokens=12, num_beams=3, num_return_sequences=2),
    SamplingParams(max_new_tokens=1),
)
PROMPTS = ((5, 9, 11), tuple(range(3, 70)), (8,) * 16, (90, 91))
# read: to the end. dawdle: likewise, with pauses. abort: by id. cancel: the task that reads. leave: nobody holds the stream any more.
# ignore: the stream is held and not read. whole, whole-cancelled: generate.
Habit = Literal["read", "dawdle", "abort", "cancel", "leave", "ignore", "whole", "whole-cancelled"]
HABITS: tuple[Habit, ...] = ("read", "dawdle", "abort", "cancel", "leave", "ignore", "whole", "whole-cancelled")


@dataclass(frozen=True)
class Client:
    habit: Habit
    prompt: tuple[int, ...]
    params: SamplingParams
    arrives: int  # turns of the event loop, at first
    after: int  # events, or turns, until it does what it does
    priority: int


CLIENTS = st.builds(
    Client,
    st.sampled_from(HABITS),
    st.sampled_from(PROMPTS),
    st.sampled_from(PARAMS),
    st.integers(0, 60),
    st.integers(0, 20),
    st.integers(-1, 1),
)


@pytest.fixture(scope="module")
def small(llama) -> Iterator[AsyncDecoder]:
    """Few seats and few blocks: requests wait, and are preempted."""
    decoder = AsyncDecoder(llama, cache_tokens=16 * 24, max_batch_size=5, max_batch_tokens=64, prefill_chunk=24, max_waiting=12)
    yield decoder
    run(decoder.close())
    baseline(decoder)


@pytest.fixture(scope="module")
def expected(alone: Decoder) -> Callable[..., list[RequestOutput]]:
    @functools.cache
    def when_alone(prompt: tuple[int, ...], params: SamplingParams) -> list[RequestOutput]:
        return alone.generate(list(prompt), params=params)

    return when_alone


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def check_events(events: list[StreamEvent], expected: list[RequestOutput], *, may_be_short: bool) -> None:
    """Tokens in order, each output's end exactly once, all as when the request runs alone; or the beginning of that."""
    ends = [event.output for event in events if event.output is not None]
    assert sorted(o.index for o in ends) == list(range(len(expected)))
    for output in ends:
        whole = expected[output.index]
        mine = [event for event in events if event.index == output.index]
        assert mine[-1].output is output, "an event after the end"
        if output.beam_score is None and not isinstance(whole.beam_score, float):
            assert [token for event in mine for token in event.token_ids] == output.token_ids
        if output.finish_reason == "abort":
            assert may_be_short
            if whole.beam_score is None:
                assert output.token_ids == whole.token_ids[: len(output.token_ids)]
                assert output.logprobs == whole.logprobs[: len(output.token_ids)]
        else:
            assert result(output) == result(whole)


async def live(decoder: AsyncDecoder, client: Client, expected: list[RequestOutput], held: list) -> None:
    await turns(client.arrives)
    ask = {"params": client.params, "priority": client.priority}
    prompt = list(client.prompt)
    try:
        if client.habit == "whole":
            assert results(await decoder.generate(prompt, **ask)) == results(expected)
            return
        if client.habit == "whole-cancelled":
            task = asyncio.create_task(decoder.generate(prompt, **ask))
            await turns(client.after * 5)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                assert results(task.result()) == results(expected)
            return
        stream = decoder.stream(prompt, **ask)
    except QueueFull:
        return
    if client.habit == "ignore":
        held.append((stream, expected))
    elif client.habit == "cancel":
        task = asyncio.create_task(read(stream))
        await turns(client.after * 5)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            check_events(task.result(), expected, may_be_short=False)
    elif client.habit == "leave":
        for _ in range(client.after):
            if await anext(stream, None) is None:
                break
        del stream
    else:
        events = []
        async for event in stream:
            events.append(event)
            if client.habit == "dawdle":
                await turns(client.after)
            elif client.habit == "abort" and len(events) == client.after:
                decoder.abort(stream.request_id)
        check_events(events, expected, may_be_short=client.habit == "abort")
        assert sorted(map(result, stream.outputs)) == sorted(result(e.output) for e in events if e.output is not None)


@settings(max_examples=150, deadline=None)
@given(clients=st.lists(CLIENTS, min_size=1, max_size=16))
def test_any_interleaving(small: AsyncDecoder, expected: Callable[..., list[RequestOutput]], clients: list[Client]) -> None:
    async def together() -> None:
        held: list = []
        await asyncio.gather(*(live(small, client, expected(client.prompt, client.params), held) for client in clients))
        await until_idle(small)  # nobody reads the held ones, and they have ended
        for stream, outputs in held:
            check_events(await read(stream), outputs, may_be_short=False)

    run(together())
