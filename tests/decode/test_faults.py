"""What goes wrong in a step, and that it ends those concerned with a reason, and nobody else."""

from __future__ import annotations

import time

import pytest
import torch
from decode.small_models import small_llama

from engine import Decoder, RequestOutput

OPTIONS = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 3}
PROMPTS = [[5, 6, 7], [8, 9], [11]]


@pytest.fixture
def fresh(llama) -> Decoder:
    return Decoder(llama, cache_tokens=1024, prefix_cache=True)


def fail_once(monkeypatch, owner, name: str, error: BaseException, call: int) -> None:
    original, calls = getattr(owner, name), 0

    def failing(*args, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(owner, name, failing)


def check_idle(decoder: Decoder) -> None:
    assert not decoder.has_work
    decoder.loop.scheduler.check()
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def plain(decoder: Decoder, i: int) -> list[int]:
    return decoder.generate(PROMPTS[i], **OPTIONS)[0].token_ids


@pytest.mark.parametrize("where", ["forward", "draw", "between two rows"])
@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"num_beams": 3, "temperature": None, "seed": None}], ids=str)
def test_a_step_that_fails_ends_those_in_it_and_the_loop_goes_on(fresh, monkeypatch, caplog, where: str, options: dict):
    expected = [plain(fresh, i) for i in range(3)]
    owner, name = {
        "forward": (fresh.model, "forward_logits"), "draw": (fresh.loop.sampler, "draw"), "between two rows": (fresh.loop, "_advance"),
    }[where]  # fmt: skip
    with monkeypatch.context() as patched:
        fail_once(patched, owner, name, MemoryError("no room\nfor it"), 8)
        failed = fresh.submit(PROMPTS[0], **{**OPTIONS, **options})
        beside = fresh.submit(PROMPTS[1], **OPTIONS)
        while fresh.has_work and not (failed.finished and beside.finished):
            fresh.step()
    outputs: list[RequestOutput] = failed.outputs + beside.outputs
    errors = [output for output in outputs if output.finish_reason == "error"]
    assert errors and all(o.error == "a step with this request failed with MemoryError: no room for it" for o in errors)
    assert beside.outputs[0].token_ids == expected[1][: len(beside.outputs[0].token_ids)]
    (record,) = [record for record in caplog.records if record.name == "engine.loop"]
    assert (
        record.exc_info[0] is MemoryError and f"and with it {len({(o.prompt_index, id(o)) for o in errors})}" in record.message or options
    )
    ends = [event for submission in (failed, beside) for event in submission.events if event.output is not None]
    assert len(ends) == len(outputs) == failed.num_outputs + beside.num_outputs
    assert [plain(fresh, i) for i in range(3)] == expected
    check_idle(fresh)


def test_those_not_in_the_step_go_on(llama, monkeypatch):
    decoder = Decoder(llama, cache_tokens=1024, max_batch_size=1)
    expected = [plain(decoder, i) for i in range(3)]
    fail_once(monkeypatch, decoder.model, "forward_logits", RuntimeError("hiccup"), 4)
    outputs = decoder.generate(PROMPTS, **{**OPTIONS, "seed": None, "temperature": 0})
    assert [o.finish_reason for o in outputs] == ["error", "length", "length"]
    assert decoder.stats().num_finished == {"length": 3 + 2, "error": 1}
    monkeypatch.undo()
    assert [plain(decoder, i) for i in range(3)] == expected
    check_idle(decoder)


def test_a_machine_that_always_fails_ends_everybody(fresh, monkeypatch):
    monkeypatch.setattr(fresh.model, "forward_logits", lambda *step: 1 / 0)
    outputs = fresh.generate([[i] * 20 for i in range(100)], max_new_tokens=4, num_return_sequences=2)
    assert [o.error for o in outputs] == ["a step with this request failed with ZeroDivisionError: division by zero"] * 200
    check_idle(fresh)


def test_an_error_that_cannot_speak(fresh, monkeypatch):
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    fail_once(monkeypatch, fresh.model, "forward_logits", Speechless(), 1)
    (output,) = fresh.generate([5], max_new_tokens=2)
    assert output.error == "a step with this request failed with Speechless: (without a message)"
    check_idle(fresh)


def test_nan_is_not_handed_on_by_the_cache():
    """A prompt that meets NaN fails, whatever it finds cached of itself, and those that share only what is sound do not."""
    model = small_llama(seed=3)
    decoder = Decoder(model, cache_tokens=1024, prefix_cache=True)
    sound = [7, 8] * 16
    expected = decoder.generate([*sound, 9], **OPTIONS)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    for _ in range(2):
        bad, good = decoder.generate([[*sound, *[50] * 32, 4], [*sound, 9]], **{**OPTIONS, "seed": None, "temperature": 0.0})
        assert bad.error == "the model's logits for position 65 hold NaN" and good.error is None
    assert decoder.generate([*sound, 9], **OPTIONS)[0].token_ids == expected.token_ids
    check_idle(decoder)


def test_a_processor_that_sleeps_is_ended_by_the_timeout_and_nobody_else(decoder):
    def sleepy(token_ids, logits):
        time.sleep(0.02)
        return logits

    slow = decoder.submit(PROMPTS[0], timeout=0.1, logits_processor=sleepy, max_new_tokens=200, ignore_eos=True)
    other = decoder.submit(PROMPTS[1], **OPTIONS)
    while decoder.has_work:
        decoder.step()
    (output,) = slow.outputs
    assert output.finish_reason == "abort" and output.error == "the request has run into its timeout of 0.1 seconds"
    assert (
        len(output.token_ids) < 20
        and output.token_ids == decoder.generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True)[0].token_ids[: len(output.token_ids)]
    )
    assert other.outputs[0].token_ids == plain(decoder, 1)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3, "temperature": 1.0}, {"num_beams": 4}], ids=str)
def test_timeouts_on_a_clock_of_their_own(bundled, options: dict):
    """Text and tokens so far are kept; whoever waits has none."""
    now = 0.0
    decoder = Decoder.bundled(cache_tokens=2048, max_batch_size=4)
    decoder.loop.scheduler.clock = lambda: now
    runs = decoder.submit("import os", timeout=10, max_new_tokens=100, ignore_eos=True, **options)
    waits = decoder.submit("import os", timeout=10.0, max_new_tokens=100, num_return_sequences=4, temperature=1.0)
    lasting = decoder.submit("class ", max_new_tokens=6)
    for _ in range(8):
        decoder.step()
    now = 9.99
    decoder.step()
    assert not runs.finished and not waits.finished
    now = 10.0
    while decoder.has_work:
        decoder.step()
    for output in (*runs.outputs, *waits.outputs):
        assert (output.finish_reason, output.error) == ("abort", "the request has run into its timeout of 10 seconds")
        assert output.text == decoder.tokenizer.decode(output.token_ids) or "num_beams" in options
    assert all(output.metrics.total_time == 10.0 for output in runs.outputs)
    assert [o.metrics.queue_time for o in waits.outputs] == [None] * 4 or not options
    assert lasting.outputs[0].error is None and lasting.outputs[0].metrics.queue_time in (0.0, 9.99, 10.0)
    check_idle(decoder)


def test_a_tokenizer_that_fails_at_the_end(bundled, monkeypatch):
    """While the last text is settled, as where a request is aborted."""
    running = bundled.submit("def f(", max_new_tokens=50, ignore_eos=True)
    for _ in range(5):
        bundled.step()

    def flush():
        raise ValueError("no\nsuch bytes")

    monkeypatch.setattr(running.requests[0].text_state, "flush", flush)
    bundled.abort(running)
    (output,) = running.outputs
    assert output.finish_reason == "error" and output.error == "the tokenizer cannot decode the last tokens: no such bytes"
    check_idle(bundled)


TERMS = [
    ({"priority": 0.5}, TypeError, "priority is 0.5; it must be an integer from -1000000 to 1000000"),
    ({"priority": True}, TypeError, "priority is True; it must be an integer"),
    ({"priority": None}, TypeError, "priority is None; it must be an integer"),
    ({"priority": 10**7}, ValueError, "priority is 10000000; it must be an integer from -1000000 to 1000000"),
    ({"timeout": 0}, ValueError, "timeout is 0; it must be a number of seconds above 0, or None"),
    ({"timeout": -1.5}, ValueError, "timeout is -1.5; it must be a number of seconds above 0, or None"),
    ({"timeout": float("nan")}, ValueError, "timeout is nan; it must be a number of seconds above 0, or None"),
    ({"timeout": "5"}, TypeError, "timeout is '5'; it must be a number of seconds above 0, or None"),
    ({"cache_salt": 5}, TypeError, "cache_salt is a int; it must be a string or None"),
    ({"cache_salt": ["a"]}, TypeError, "cache_salt is a list; it must be a string or None"),
    ({"cache_salt": "\ud800"}, ValueError, "with a lone surrogate"),
]


@pytest.mark.parametrize(("terms", "error", "words"), TERMS, ids=[words[:40] for *_, words in TERMS])
def test_terms_that_cannot_be(decoder, terms: dict, error: type[Exception], words: str):
    for call in (decoder.generate, decoder.stream, decoder.submit):
        with pytest.raises(error) as caught:
            call([5], **terms)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not decoder.has_work


def test_terms_that_can(decoder):
    assert decoder.generate([5], priority=-3, timeout=float("inf"), cache_salt="", max_new_tokens=2)[0].finish_reason == "length"
