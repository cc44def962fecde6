"""``Decoder.stats``: counts that are what was run, asked at any time from any thread."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from decode.small_models import small_llama

from engine import Decoder, DraftModel
from engine.stats import STEP_PARTS, Stats


def test_counts_are_what_was_run(llama):
    decoder = Decoder(llama, cache_tokens=1024, max_batch_size=4, prefix_cache=True)
    idle = decoder.stats()
    assert (idle.num_running, idle.num_waiting, idle.num_steps, idle.num_new_tokens, idle.hit_rate) == (0, 0, 0, 0, 0.0)
    assert idle.num_blocks == idle.num_free_blocks == 64 and idle.block_size == 16 and idle.cache_use == 0.0
    assert idle.step_seconds == idle.tokens_per_second == 0.0 and set(idle.seconds) == set(STEP_PARTS)
    submission = decoder.submit([[5] * 40, [5] * 41], max_new_tokens=6, ignore_eos=True, num_return_sequences=3, temperature=1.0)
    assert (decoder.stats().num_running, decoder.stats().num_waiting) == (0, 6)
    decoder.step()
    begun = decoder.stats()
    assert (begun.num_running, begun.num_waiting) == (3, 3) and begun.num_new_tokens == 3
    assert 0 < begun.cache_use < 1 and begun.num_cached_blocks == 2
    while decoder.has_work:
        decoder.step()
    found = decoder.stats()
    assert found.num_finished == {"length": 6} and found.num_new_tokens == 36 == sum(len(o.token_ids) for o in submission.outputs)
    assert found.num_prompt_tokens == 81 and found.num_cached_tokens == 32 and found.hit_rate == 32 / 81
    assert found.num_steps == decoder.loop.num_steps == 12 and found.num_preemptions == 0
    assert found.num_free_blocks == 64 and found.num_cached_blocks == 2
    assert all(found.seconds[part] > 0 for part in STEP_PARTS if part != "draft")
    assert found.step_seconds > 0 and found.tokens_per_second > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.num_steps = 0  # type: ignore[misc]


def test_preemptions_drafts_and_ends(llama):
    decoder = Decoder(llama, cache_tokens=160, draft=DraftModel(llama))
    outputs = decoder.generate([[5, i] for i in range(8)], max_new_tokens=50, ignore_eos=True, num_assistant_tokens=4)
    found = decoder.stats()
    assert found.num_preemptions == sum(o.metrics.num_preemptions for o in outputs) > 0
    assert found.num_drafted == sum(o.metrics.num_drafted for o in outputs) > 0
    assert found.num_accepted == sum(o.metrics.num_accepted for o in outputs)
    assert found.acceptance == found.num_accepted / found.num_drafted and found.seconds["draft"] > 0
    stream = decoder.stream([5], max_new_tokens=50)
    next(stream)
    stream.close()
    beams = decoder.generate([6], num_beams=3, max_new_tokens=5, num_return_sequences=2)
    again = decoder.stats()
    assert again.num_finished["abort"] == 1 and sum(again.num_finished.values()) == 8 + 1 + len(beams)


def test_another_thread_may_ask_while_it_steps(llama):
    decoder = Decoder(llama, cache_tokens=2048, prefix_cache=True)
    seen: list[Stats] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def ask() -> None:
        try:
            while not over.is_set():
                seen.append(decoder.stats())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        decoder.generate([[i, 4] for i in range(3, 90)], max_new_tokens=12, ignore_eos=True)
    finally:
        over.set()
        thread.join()
    assert not errors and seen
    assert all(a.num_steps <= b.num_steps and a.num_new_tokens <= b.num_new_tokens for a, b in zip(seen, seen[1:], strict=False))


def test_metrics_of_waiting_and_of_hits():
    decoder = Decoder(small_llama(), cache_tokens=1024, max_batch_size=1, prefix_cache=True)
    now = 100.0

    def clock() -> float:
        return now

    decoder.loop.scheduler.clock = clock
    submissions = [decoder.submit([7] * 20, max_new_tokens=2, ignore_eos=True) for _ in range(3)]
    while decoder.has_work:
        decoder.step()
        now += 1.0
    metrics = [submission.outputs[0].metrics for submission in submissions]
    assert [m.queue_time for m in metrics] == [0.0, 2.0, 4.0]
    assert [m.time_to_first_token for m in metrics] == [0.0, 2.0, 4.0]
    assert [m.total_time for m in metrics] == [1.0, 3.0, 5.0]
    assert [m.num_cached_tokens for m in metrics] == [0, 16, 16]
    with_start = decoder.prepare("test()", [7], None, None, {"max_new_tokens": 1}, submitted_at=now - 5.0)
    decoder.loop.enqueue(with_start.requests)
    decoder.step()
    assert with_start.outputs[0].metrics.queue_time == 5.0
