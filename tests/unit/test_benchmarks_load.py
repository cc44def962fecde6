"""The load generator against servers that send scripted bytes, and what it makes of times. No time is measured here."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import suite_serving
from load import (
    Client,
    Exchange,
    Job,
    Mix,
    Record,
    ServerError,
    Target,
    closed_loop,
    distribution,
    fixed_jobs,
    percentile,
    poisson,
    read_record,
    report,
)  # fmt: skip

JOB = Job([5, 6, 7], 2)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n" for event in events)


def text(value: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": None}], "usage": None}


def usage(number: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": number}}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


REPLY = HEAD + chunk(sse(text("a"))) + chunk(sse(text("b"), usage(2))) + chunk(sse(b"[DONE]")) + b"0\r\n\r\n"


def exchange(*pieces: tuple[float, bytes], error: str | None = None) -> Exchange:
    return Exchange(JOB, 1.0, list(pieces), 9.0, error)


# ---- replies ----


def test_a_token_came_with_the_bytes_that_complete_its_event() -> None:
    first, second = chunk(sse(text("a"))), chunk(sse(text("")) + sse(text("b"), usage(7)))
    half = len(second) // 2
    record = read_record(
        exchange((2.0, HEAD), (3.0, first), (4.0, second[:half]), (5.0, second[half:]), (6.0, chunk(sse(b"[DONE]")) + b"0\r\n\r\n"))
    )
    assert record.error is None
    assert record.times == [3.0, 5.0] and record.num_new_tokens == 7
    assert record.first_token_seconds == 2.0 and record.gaps == [2.0]


@given(st.lists(st.integers(1, len(REPLY) - 1), max_size=30))
def test_replies_are_read_however_they_are_cut(cuts: list[int]) -> None:
    places = [0, *sorted(set(cuts)), len(REPLY)]
    record = read_record(exchange(*((float(i), REPLY[a:b]) for i, (a, b) in enumerate(zip(places, places[1:], strict=False)))))
    assert record.error is None and record.num_new_tokens == 2 and len(record.times) == 2
    for moment, event in zip(record.times, (text("a"), text("b")), strict=True):
        begin = REPLY.index(sse(event))
        assert begin < places[int(moment) + 1], "a token came before the first of its bytes"


def test_whole_replies_are_read() -> None:
    body = b'{"choices": [{"text": "a b"}], "usage": {"completion_tokens": 2}}'
    record = read_record(exchange((2.0, b"HTTP/1.1 200 OK\r\n\r\n" + body[:9]), (3.0, body[9:])))
    assert record.error is None and record.num_new_tokens == 2 and record.gaps == [] and record.times == [record.end]
    assert read_record(exchange((2.0, b"HTTP/1.1 200 OK\r\n\r\n" + body[:9]))).error is not None


def test_replies_without_chunks_and_without_usage_are_read() -> None:
    record = read_record(exchange((2.0, b"HTTP/1.1 200 OK\r\n\r\n"), (3.0, sse(text("a"), text("b"), b"[DONE]"))))
    assert record.error is None and record.times == [3.0, 3.0] and record.num_new_tokens == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "the connection ended before the reply"),
        (b"HTTP/1.1 429 Too Many\r\n\r\n{}", "status 429: {}"),
        (HEAD + chunk(sse(text("a"), {"error": {"message": "no"}})), "error in the stream: {'message': 'no'}"),
        (HEAD + chunk(sse(text("a"))), "the reply ended before its end"),
        (HEAD + chunk(sse(b"[DONE]")), "the reply has no text"),
        (HEAD + chunk(sse(b"{")), "the reply cannot be read: "),
        (HEAD + chunk(sse({"choices": None})), "the reply cannot be read: "),
        (HEAD + b"zz\r\n", "the reply cannot be read: "),
        (b"HTTP/1.1\r\n\r\n", "the reply cannot be read: "),
    ],
)
def test_what_is_wrong_with_a_reply_is_told(reply: bytes, message: str) -> None:
    record = read_record(exchange((2.0, reply)))
    assert record.error is not None and record.error.startswith(message)


def test_an_error_of_the_connection_stays() -> None:
    assert read_record(exchange((2.0, REPLY), error="no end after 5 seconds")).error == "no end after 5 seconds"


# ---- the client ----

Answer = Callable[[dict[str, Any], int], Coroutine[Any, Any, bytes]]


def with_server(answer: Answer, use: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
    """Run ``use(url)`` beside a server that answers each body, the n-th call, with these bytes, and then closes."""

    async def main() -> Any:
        calls = 0

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal calls
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split()[0])
            body = json.loads(await reader.readexactly(length))
            calls += 1
            writer.write(await answer({"head": head, **body}, calls))
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with server:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    return asyncio.run(main())


def test_the_client_sends_what_servers_of_the_api_take() -> None:
    seen: list[dict[str, Any]] = []

    async def answer(body: dict[str, Any], call: int) -> bytes:
        seen.append(body)
        return REPLY

    async def use(url: str) -> Record:
        return await Client(f"{url}/v1/", model="m", api_key="secret").send(JOB)

    record = with_server(answer, use)
    assert record.error is None and record.num_new_tokens == 2 and record.submitted < record.times[0] <= record.end
    (body,) = seen
    head = body.pop("head")
    assert head.startswith("post /v1/completions http/1.1\r\n") and "authorization: bearer secret\r\n" in head
    assert body == {
        "model": "m", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("takes", "form", "prompt", "ignores"),
    [
        (lambda body: True, "token ids", [5, 6, 7], True),
        (lambda body: "ignore_eos" not in body, "token ids", [5, 6, 7], False),
        (lambda body: isinstance(body["prompt"], str), "text", "t5 t6 t7 ", True),
        (lambda body: isinstance(body["prompt"], str) and "ignore_eos" not in body, "text", "t5 t6 t7 ", False),
    ],
)
def test_the_form_of_prompts_is_what_the_server_takes(takes: Callable[[Any], bool], form: str, prompt: Any, ignores: bool) -> None:
    last: dict[str, Any] = {}

    async def answer(body: dict[str, Any], call: int) -> bytes:
        last.update(body)
        last["ignores"] = "ignore_eos" in body
        return REPLY if takes(body) else b"HTTP/1.1 422 No\r\n\r\nno"

    async def use(url: str) -> str:
        client = Client(url, model="m")
        found = await client.settle_form(JOB)
        assert (await client.send(JOB)).error is None
        return found

    assert with_server(answer, use) == form
    assert last["prompt"] == prompt and last["ignores"] == ignores


def test_a_server_that_takes_nothing_is_named_with_its_first_reason() -> None:
    async def answer(body: dict[str, Any], call: int) -> bytes:
        return b"HTTP/1.1 500 No\r\n\r\nreason %d" % call

    async def use(url: str) -> None:
        with pytest.raises(ServerError, match="does not complete a prompt: status 500: reason 1"):
            await Client(url, model="m").settle_form(JOB)

    with_server(answer, use)


def test_a_request_without_an_end_is_given_up_and_one_without_a_server_fails() -> None:
    async def answer(body: dict[str, Any], call: int) -> bytes:
        await asyncio.sleep(60)
        raise AssertionError

    async def use(url: str) -> str:
        record = await Client(url, model="m", timeout=0.05).send(JOB)
        assert record.error == "no end after 0.05 seconds"
        return url

    url = with_server(answer, use)
    record = asyncio.run(Client(url, model="m").send(JOB))
    assert record.error is not None and record.error.startswith("the connection failed: ")
    with pytest.raises(ServerError, match="gives no model"):
        Client(url)
    with pytest.raises(ServerError, match="the server is 'localhost:80'; it must be a URL"):
        Client("localhost:80")


# ---- arrivals ----


def test_a_closed_loop_keeps_its_users_busy_and_sends_each_job_once() -> None:
    running, most, prompts = 0, 0, []

    async def answer(body: dict[str, Any], call: int) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        prompts.append(body["prompt"])
        await asyncio.sleep(0.002)
        running -= 1
        return REPLY

    jobs = fixed_jobs(11, 3, 2, 1, 100)
    records = with_server(answer, lambda url: closed_loop(Client(url, model="m"), jobs, 4))
    assert most == 4 and sorted(prompts) == sorted(job.prompt for job in jobs)
    assert all(record.error is None for record in records) and len(records) == 11


def test_poisson_arrivals_wait_for_nobody_and_count_from_their_moment() -> None:
    jobs = fixed_jobs(6, 3, 2, 1, 100)
    arrived = 0
    everybody = asyncio.Event()

    async def answer(body: dict[str, Any], call: int) -> bytes:
        nonlocal arrived
        arrived += 1
        if arrived == len(jobs):
            everybody.set()
        await everybody.wait()  # a client that waited for the first reply would wait for ever
        return REPLY

    records = with_server(answer, lambda url: poisson(Client(url, model="m", timeout=30), jobs, 100.0, seed=3))
    rng = random.Random(3)
    expected = [rng.expovariate(100.0) for _ in jobs][: len(jobs) - 1]
    moments = [record.submitted for record in records]
    assert [b - a for a, b in zip(moments, moments[1:], strict=False)] == pytest.approx(expected, abs=1e-6)
    assert [record.job for record in records] == jobs and all(record.error is None for record in records)


# ---- lengths ----


def test_a_mix_is_the_same_for_the_same_seed_and_has_its_means() -> None:
    mix = Mix(vocab_size=50, longest=100_000)
    jobs = mix.jobs(4000, 1)
    assert jobs == mix.jobs(4000, 1) and jobs != mix.jobs(4000, 2)
    prompts, outputs = [len(job.prompt) for job in jobs], [job.new_tokens for job in jobs]
    assert statistics.fmean(prompts) == pytest.approx(161, rel=0.1) and statistics.fmean(outputs) == pytest.approx(338, rel=0.1)
    assert statistics.median(prompts) < 0.7 * statistics.fmean(prompts)  # a long tail
    assert {token for job in jobs for token in job.prompt} == set(range(3, 50))


@given(st.integers(0, 1000), st.integers(300, 600), st.floats(0, 1))
def test_jobs_fit_the_model_and_share_what_they_should(seed: int, longest: int, shared: float) -> None:
    jobs = Mix(vocab_size=50, longest=longest, shared=shared).jobs(40, seed)
    system = Mix(vocab_size=50, longest=longest, shared=1.0).jobs(1, 0)[0].prompt[:256]
    for job in jobs:
        assert job.prompt and job.new_tokens >= 1 and len(job.prompt) + job.new_tokens <= longest
    if shared in (0, 1):
        assert sum(job.prompt[:256] == system for job in jobs) == 40 * shared
    own = [tuple(job.prompt[256:] if job.prompt[:256] == system else job.prompt) for job in jobs]
    assert len({prompt for prompt in own if len(prompt) > 16}) == sum(len(prompt) > 16 for prompt in own)


# ---- reports ----


def record(submitted: float, *times: float, prompt: int = 10, error: str | None = None) -> Record:
    return Record(Job([5] * prompt, len(times)), submitted, times[-1] if times else submitted, list(times), len(times), error)


def test_a_report_counts_what_was_done_and_what_was_good() -> None:
    records = [
        record(0.0, 0.5, 0.6, 0.7),
        record(1.0, 3.0, 3.1),  # its first token comes too late
        record(2.0, 2.1, 2.9, 3.7),  # and here the others do
        record(4.0, 10.0, error="no"),
    ]
    made = report(records, Target(first_token=1.0, inter_token=0.2))
    assert made["counts"] == {"requests": 4, "failed": 1} and made["elapsed"] == 10.0
    assert made["requests_per_second"] == 0.3 and made["goodput_per_second"] == 0.1
    assert made["output_tokens_per_second"] == 0.8 and made["prompt_tokens_per_second"] == 3.0
    assert made["first_token_seconds"]["p50"] == 0.5 and made["latency_seconds"]["p50"] == pytest.approx(1.7)
    assert made["inter_token_seconds"]["p99"] == pytest.approx(0.8)
    failed = report([record(0.0, 1.0, error="no")], Target())
    assert failed["requests_per_second"] == 0 and failed["first_token_seconds"] is None


def test_percentiles_lie_between_the_nearest_values() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    made = distribution(values)
    assert made is not None and made["p50"] == 2.5 and made["curve"][0] == 1.0 and made["curve"][-1] == 4.0 and len(made["curve"]) == 101
    assert made["p95"] == pytest.approx(3.85) and made["p99"] == pytest.approx(3.97)
    assert distribution([]) is None and percentile([7.0], 0.99) == 7.0


def test_gaps_belong_to_the_time_in_which_they_end() -> None:
    records = [record(0.0, 1.0, 2.0, 4.0, 5.0), record(0.0, 1.5, 3.0)]
    assert suite_serving.gaps_between(records, 1.0, 3.0) == [1.0, 1.5]
    assert suite_serving.gaps_between(records, 3.0, 5.0) == [2.0, 1.0]


def test_aims_are_judged_by_both_medians_and_only_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def entry(name: str, rate: float) -> dict[str, Any]:
        return {"contender": name, "output_tokens_per_second": {"median": rate, "min": rate, "max": rate}}

    batches = [entry("ours", 95.0), entry("offline", 100.0), entry("transformers_batching", 50.0)]
    burst = {
        "contender": "ours", "burst_gap_seconds": distribution([0.02] * 50 + [0.05] * 50), "calm_gap_seconds": distribution([0.01] * 9),
    }  # fmt: skip
    judged = suite_serving.aims(batches, [burst])
    assert [a["met"] for a in judged] == [True, False, True, False]
    assert [a["reached"] for a in judged] == pytest.approx([0.95, 1.9, 0.05 / 0.035, 5.0])
    assert "tokens/s over offline" in capsys.readouterr().out
    assert suite_serving.aims([entry("http://127.0.0.1:1", 5.0)], []) == []
    nothing = suite_serving.aims([entry("ours", 5.0)], [{**burst, "burst_gap_seconds": None}])
    assert [a["met"] for a in nothing] == [False, False]
