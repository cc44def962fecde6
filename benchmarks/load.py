"""A load of requests on a server of OpenAI's ``/v1/completions``, and the times of what comes back. Neither torch nor the engine is needed.

What arrives is kept as bytes with the moment it arrived, and read only when the load is over: the client must not take from the server,
on whose machine it runs, the time that it measures.
"""

from __future__ import annotations

import asyncio
import bisect
import copy
import itertools
import json
import math
import random
import ssl
import statistics
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

QUANTILES = 100  # of a curve


@dataclass(frozen=True)
class Job:
    """A prompt as token ids, and how many tokens are asked for after it."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Mix:
    """Jobs as users of a chat send them: lognormal lengths, which are mostly short with a long tail.

    The means are those of the ShareGPT conversations as Kwon et al. (2023) count them. ``shared`` of the jobs begin with the same
    ``shared_tokens`` tokens, as under one system prompt, which come on top of their own.
    """

    prompt_mean: float = 161
    output_mean: float = 338
    sigma: float = 1.0
    longest: int = 2048  # prompt and output together
    vocab_size: int = 32_000
    shared: float = 0.0
    shared_tokens: int = 256

    def jobs(self, number: int, seed: int) -> list[Job]:
        """So many, the same for the same seed."""
        rng = random.Random(seed)
        system = self._tokens(random.Random(0), self.shared_tokens)
        jobs = []
        for _ in range(number):
            start = system if rng.random() < self.shared else []
            room = self.longest - len(start)
            prompt = min(self._length(rng, self.prompt_mean), room - 1)
            jobs.append(Job([*start, *self._tokens(rng, prompt)], min(self._length(rng, self.output_mean), room - prompt)))
        return jobs

    def _length(self, rng: random.Random, mean: float) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - self.sigma**2 / 2, self.sigma)))

    def _tokens(self, rng: random.Random, number: int) -> list[int]:
        return random_tokens(rng, number, self.vocab_size)


def random_tokens(rng: random.Random, number: int, vocab_size: int) -> list[int]:
    """Without the first three ids, which are often special."""
    return [rng.randrange(3, vocab_size) for _ in range(number)]


def fixed_jobs(number: int, prompt: int, new_tokens: int, seed: int, vocab_size: int) -> list[Job]:
    """Jobs that are all of one size and begin differently."""
    rng = random.Random(seed)
    return [Job(random_tokens(rng, prompt, vocab_size), new_tokens) for _ in range(number)]


@dataclass
class Record:
    """What became of a job. Moments are seconds of ``time.perf_counter``."""

    job: Job
    submitted: float
    end: float
    times: list[float] = field(default_factory=list)  # of each piece of text, which is a token where nothing is drafted
    num_new_tokens: int = 0
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.submitted

    @property
    def gaps(self) -> list[float]:
        """Seconds between a piece and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


class ServerError(RuntimeError):
    """A server has no URL, cannot be reached, or refuses every form of request."""


class Client:
    """Sends jobs to one server, each over a connection of its own.

    Args:
        url: of the server, without ``/v1``.
        model: the name to ask for; None: the first that the server lists.
        api_key: sent as a bearer token.
        timeout: seconds after which a request is given up.
        word: what a token id is as text, for servers that take no ids.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout: float = 300.0,
        word: Callable[[int], str] = "t{} ".format,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"the server is {url!r}; it must be a URL such as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._path = f"{path}/v1/completions"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"host": parts.netloc, "content-type": "application/json", "connection": "close"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._word = word
        self._streams = True
        self._as_ids = True
        self._extra: dict[str, Any] = {"ignore_eos": True}
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        request = urllib.request.Request(f"{self.url}/v1/models", headers={k: v for k, v in self._headers.items() if k != "host"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                return str(json.load(reply)["data"][0]["id"])
        except (OSError, ValueError, LookupError) as error:
            raise ServerError(f"{self.url}/v1/models gives no model: {error}") from None

    def whole(self) -> Client:
        """A client of the same server whose replies come whole, not token by token."""
        twin = copy.copy(self)
        twin._streams = False
        return twin

    async def settle_form(self, job: Job) -> str:
        """Find out, by sending a job, in which form the server takes prompts, and whether it may be told to write on after an end."""
        first = None
        for self._as_ids, self._extra in itertools.product((True, False), ({"ignore_eos": True}, {})):
            record = await self.send(job)
            if record.error is None:
                return "token ids" if self._as_ids else "text"
            first = first or record.error
        raise ServerError(f"{self.url} does not complete a prompt: {first}")

    async def send(self, job: Job, submitted: float | None = None) -> Record:
        """Send a job, which counts as submitted then, or at the moment given; returns when the reply has ended."""
        return read_record(await self.exchange(job, submitted))

    async def exchange(self, job: Job, submitted: float | None = None) -> Exchange:
        """The same, not read yet."""
        prompt: Any = job.prompt if self._as_ids else "".join(map(self._word, job.prompt))
        body = json.dumps(
            {
                "model": self.model, "prompt": prompt, "max_tokens": job.new_tokens, "temperature": 0.0, **self._extra,
                **({"stream": True, "stream_options": {"include_usage": True}} if self._streams else {}),
            }
        ).encode()  # fmt: skip
        lines = [f"POST {self._path} HTTP/1.1", *(f"{name}: {value}" for name, value in self._headers.items())]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode()
        exchange = Exchange(job, time.perf_counter() if submitted is None else submitted)
        try:
            await asyncio.wait_for(self._talk(head + body, exchange), self._timeout)
        except asyncio.TimeoutError:
            exchange.error = f"no end after {self._timeout:g} seconds"
        except OSError as error:
            exchange.error = f"the connection failed: {error}"
        exchange.end = time.perf_counter()
        return exchange

    async def _talk(self, request: bytes, exchange: Exchange) -> None:
        connection = asyncio.get_running_loop().create_connection(lambda: _Connection(exchange), self._host, self._port, ssl=self._tls)
        transport, protocol = await connection
        try:
            transport.write(request)
            await protocol.closed
        finally:
            transport.close()


@dataclass
class Exchange:
    """A job that was sent, and the bytes that came back, each piece with its moment."""

    job: Job
    submitted: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None


class _Connection(asyncio.Protocol):
    def __init__(self, exchange: Exchange) -> None:
        self._pieces = exchange.pieces
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if self.closed.done():
            return
        if error is None:
            self.closed.set_result(None)
        else:
            self.closed.set_exception(error)


def read_record(exchange: Exchange) -> Record:
    """The times of a reply's tokens, or what went wrong."""
    record = Record(exchange.job, exchange.submitted, exchange.end, error=exchange.error)
    if record.error is None:
        try:
            _read(exchange, record)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            record.error = f"the reply cannot be read: {error!r:.200}"
    return record


def _read(exchange: Exchange, record: Record) -> None:
    raw = b"".join(data for _, data in exchange.pieces)
    head, separator, _ = raw.partition(b"\r\n\r\n")
    if not separator:
        record.error = "the connection ended before the reply"
        return
    status = int(head.split(maxsplit=2)[1])
    arrived = [moment for moment, _ in exchange.pieces]
    ends = list(itertools.accumulate(len(data) for _, data in exchange.pieces))
    start = len(head) + len(separator)
    parts = list(_chunks(raw, start) if b"transfer-encoding: chunked" in head.lower() else [(raw[start:], len(raw))])
    body = b"".join(part for part, _ in parts)
    if status != 200:
        record.error = f"status {status}: {body.decode(errors='replace'):.300}"
        return
    if body.startswith(b"{"):  # no stream
        record.num_new_tokens = json.loads(body)["usage"]["completion_tokens"]
        record.times.append(exchange.end)
        return
    usage = None
    finished = False
    for line, end in _lines(parts):
        if not line.startswith(b"data:"):
            continue
        content = line[5:].strip()
        if content == b"[DONE]":
            finished = True
            continue
        event = json.loads(content)
        if "error" in event:
            record.error = f"error in the stream: {event['error']!r:.300}"
            return
        usage = event.get("usage") or usage
        if any(choice.get("text") for choice in event["choices"]):
            record.times.append(arrived[bisect.bisect_left(ends, end)])
    record.num_new_tokens = usage["completion_tokens"] if usage else len(record.times)
    if not finished:
        record.error = "the reply ended before its end"
    elif not record.times:
        record.error = "the reply has no text"


def _chunks(raw: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """Of a chunked body the chunks, each with where it ends among the bytes."""
    while True:
        line_end = raw.find(b"\r\n", start)
        if line_end < 0:
            return  # broken off
        size = int(raw[start:line_end].split(b";")[0], 16)
        if size == 0:
            return
        start = line_end + 2
        yield raw[start : start + size], start + size
        start += size + 2


def _lines(parts: Sequence[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The lines of a body that comes in parts, each with where the part ends that completes it."""
    rest = b""
    for part, end in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line, end


# ---- arrivals ----


async def closed_loop(client: Client, jobs: Sequence[Job], users: int) -> list[Record]:
    """So many users, each of whom sends the next job when the last is done."""
    waiting = iter(jobs)
    exchanges: list[Exchange] = []

    async def user() -> None:
        for job in waiting:
            exchanges.append(await client.exchange(job))

    await asyncio.gather(*(user() for _ in range(users)))
    return [read_record(exchange) for exchange in exchanges]


async def poisson(client: Client, jobs: Sequence[Job], rate: float, seed: int) -> list[Record]:
    """Jobs that come by chance, ``rate`` a second in the mean, whether or not those before are done."""
    rng = random.Random(seed)
    start = time.perf_counter()
    moments = itertools.accumulate((rng.expovariate(rate) for _ in jobs), initial=start)
    exchanges: list[Awaitable[Exchange]] = []
    for job, moment in zip(jobs, moments, strict=False):
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        # What the client is late by counts as waiting.
        exchanges.append(asyncio.ensure_future(client.exchange(job, moment)))
    return [read_record(exchange) for exchange in await asyncio.gather(*exchanges)]


# ---- what is reported ----


@dataclass(frozen=True)
class Target:
    """A request is good if its first token comes in time and its others do in the mean. Seconds."""

    first_token: float = 1.0
    inter_token: float = 0.1

    def met(self, record: Record) -> bool:
        gaps = record.gaps
        return record.first_token_seconds <= self.first_token and (not gaps or statistics.fmean(gaps) <= self.inter_token)


def report(records: Sequence[Record], target: Target) -> dict[str, Any]:
    """Rates over the time from the first request to the last end, and the distributions of times; of requests that failed only the number.

    Times are seconds: until the first token, between tokens (of all requests together), until the end.
    """
    good = [record for record in records if record.error is None]
    seconds = max(record.end for record in records) - min(record.submitted for record in records)
    return {
        "counts": {"requests": len(records), "failed": len(records) - len(good)},
        "elapsed": seconds,
        "requests_per_second": len(good) / seconds,
        "prompt_tokens_per_second": sum(len(record.job.prompt) for record in good) / seconds,
        "output_tokens_per_second": sum(record.num_new_tokens for record in good) / seconds,
        "goodput_per_second": sum(map(target.met, good)) / seconds,
        "first_token_seconds": distribution([record.first_token_seconds for record in good]),
        "inter_token_seconds": distribution([gap for record in good for gap in record.gaps]),
        "latency_seconds": distribution([record.end - record.submitted for record in good]),
    }


def distribution(values: Sequence[float]) -> dict[str, Any] | None:
    """Median, 95th and 99th percentile, and a curve of all percentiles from 0 to 100; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    curve = [percentile(ordered, i / QUANTILES) for i in range(QUANTILES + 1)]
    return {"p50": curve[50], "p95": curve[95], "p99": curve[99], "curve": curve}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest of sorted values, linearly."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
