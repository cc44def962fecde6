"""A load that saturates one ``AsyncDecoder`` for minutes: ``pytest -m soak --soak-minutes 10 -s`` prints what it has seen.

Memory is the resident set of this process (``/proc/self/statm``), read every half second after a warm-up of a quarter of the time: the
medians of the first and of the last quarter of the readings may differ by 2 %.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from serving.async_helpers import baseline, read, results, run

from engine import AsyncDecoder, Decoder, QueueFull

CLIENTS = 48
HABITS = ("read",) * 6 + ("whole",) * 4 + ("dawdle", "abort", "cancel", "leave", "timeout")
SAMPLE = 300  # requests with prompts of their own that are run again, alone, at the end
TEXT = Path(__file__).read_text()


def mix(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A prompt and options, as varied as requests come."""
    start = rng.randrange(len(TEXT) - 500)
    prompt = TEXT[start : start + rng.choice((3, 20, 80, 400))]
    options: dict[str, Any] = {"max_new_tokens": rng.choice((1, 8, 30, 80))}
    kind = rng.choice(("greedy", "sampled", "sampled", "several", "beams", "grammar", "plain", "stop"))
    if kind in ("sampled", "several"):
        options |= {"temperature": rng.choice((0.7, 1.2)), "top_p": rng.choice((0.8, 1.0)), "seed": rng.randrange(2**32)}
    if kind == "sampled":
        options |= {"repetition_penalty": 1.1, "top_k": 40}
    elif kind == "several":
        options |= {"num_return_sequences": rng.choice((2, 4)), "logprobs": 2}
    elif kind == "beams":
        options |= {"num_beams": rng.choice((2, 4)), "max_new_tokens": min(options["max_new_tokens"], 30)}
    elif kind == "grammar":
        options |= {"regex": rng.choice(("[0-9]{1,6}", "(yes|no|perhaps)", '"[a-z ]{2,20}"')), "max_new_tokens": 30}
    elif kind == "plain":
        options |= {"speculative": False}
    elif kind == "stop":
        options |= {"stop": ("\n", ")"), "ignore_eos": True}
    return prompt, options


class Load:
    """Clients that ask again and again until the time is over, and what they have seen."""

    def __init__(self, decoder: AsyncDecoder, known: list[tuple[str, dict[str, Any], list[tuple]]], seconds: float) -> None:
        self.decoder, self.known = decoder, known
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.seen: Counter[str] = Counter()
        self.sample: list[tuple[str, dict[str, Any], list[tuple]]] = []
        self.resident: list[tuple[float, int]] = []  # seconds, bytes

    async def client(self, rng: random.Random) -> None:
        while time.monotonic() < self.end:
            expected = None
            if rng.random() < 0.5:
                prompt, options, expected = rng.choice(self.known)
            else:
                prompt, options = mix(rng)
            habit = rng.choice(HABITS)
            try:
                outputs = await self.ask(rng, habit, prompt, options)
            except QueueFull:
                self.seen["refused"] += 1
                await asyncio.sleep(0.01)
                continue
            self.seen[habit] += 1
            if outputs is None:
                continue
            got = results(outputs)
            self.seen["tokens"] += sum(len(output.token_ids) for output in outputs)
            if expected is not None:
                assert got == expected, (prompt, options)
                self.seen["compared"] += 1
            elif len(self.sample) < SAMPLE and rng.random() < 0.1:
                self.sample.append((prompt, options, got))

    async def ask(self, rng: random.Random, habit: str, prompt: str, options: dict[str, Any]) -> list | None:
        """The outputs, where they are to be whole."""
        if habit == "whole":
            return await self.decoder.generate(prompt, **options)
        if habit == "timeout":
            outputs = await self.decoder.generate(prompt, timeout=rng.random() * 0.05, **options)
            assert all(output.finish_reason != "error" for output in outputs)
            return None
        stream = self.decoder.stream(prompt, priority=rng.randrange(-1, 2), **options)
        if habit == "cancel":
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(rng.random() * 0.1)
            task.cancel()
            await asyncio.wait([task])
            return None
        ends, after = 0, rng.randrange(1, 20)
        async for event in stream:
            ends += event.output is not None
            after -= 1
            if habit == "dawdle":
                await asyncio.sleep(0.002)
            elif habit == "leave" and after == 0:
                return None
            elif habit == "abort" and after == 0:
                self.decoder.abort(stream.request_id)
        assert ends == len(stream.outputs)
        return None if habit == "abort" else stream.outputs

    async def watch(self) -> None:
        while time.monotonic() < self.end:
            await asyncio.sleep(0.5)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident.append((time.monotonic() - self.start, pages * os.sysconf("SC_PAGE_SIZE")))


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_minutes_at_saturation(request: pytest.FixtureRequest) -> None:
    seconds = 60 * request.config.getoption("--soak-minutes")
    alone = Decoder.bundled(cache_tokens=8192, prefix_cache=False)
    rng = random.Random(1)
    known = [(prompt, options, results(alone.generate(prompt, **options))) for prompt, options in (mix(rng) for _ in range(60))]
    inner = Decoder.bundled(cache_tokens=1280, max_batch_size=24, draft="bundled")
    decoder = AsyncDecoder(inner, max_waiting=24)
    load = Load(decoder, known, seconds)

    async def under_load() -> None:
        await asyncio.gather(load.watch(), *(load.client(random.Random(seed)) for seed in range(CLIENTS)))
        await decoder.drain()
        baseline(decoder)
        await decoder.close()

    run(under_load(), seconds + 120)
    settled = [size for moment, size in load.resident if moment > seconds / 4]
    quarter = max(1, len(settled) // 4)
    first, last = statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])
    stats = decoder.stats()
    print(
        f"\n{seconds:.0f} s: {dict(load.seen)}\n{dict(stats.num_finished)}, {stats.num_steps} steps, {stats.num_preemptions} preemptions, "
        f"hit rate {stats.hit_rate:.2f}, acceptance {stats.acceptance:.2f}\nresident: {first / 2**20:.1f} MiB, then {last / 2**20:.1f} MiB"
    )
    for prompt, options, got in load.sample:
        assert results(alone.generate(prompt, **options)) == got, (prompt, options)
    assert load.seen["compared"] and load.sample and stats.num_preemptions and load.seen["refused"]
    assert stats.num_finished.get("error", 0) == 0
    assert abs(last / first - 1) < 0.02
