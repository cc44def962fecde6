"""The load generator of the benchmarks against the real server. Nothing is timed here."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from server.server_helpers import Running

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from load import Client, Job, Record, Target, closed_loop, fixed_jobs, poisson, report


def test_both_kinds_of_arrivals_get_every_token_of_every_job(server: Running) -> None:
    client = Client(server.url)
    vocab_size = server.decoder.decoder.config.vocab_size
    jobs = [Job(job.prompt, n) for n, job in enumerate(fixed_jobs(12, 20, 1, 1, vocab_size), start=1)]

    async def both() -> tuple[str, list[Record], list[Record]]:
        form = await client.settle_form(jobs[0])
        return form, await closed_loop(client, jobs, 5), await poisson(client, jobs, 200.0, seed=1)

    form, closed, by_chance = asyncio.run(both())
    assert client.model == "bundled" and form == "token ids"
    for records in (closed, by_chance):
        assert [record.error for record in records] == [None] * 12
        assert sorted(record.num_new_tokens for record in records) == list(range(1, 13))
        for record in records:
            assert record.num_new_tokens == record.job.new_tokens
            # A token may end within a character, which comes with a later one.
            assert 1 <= len(record.times) <= record.num_new_tokens
            assert record.submitted < record.times[0] and record.times == sorted(record.times) and record.times[-1] <= record.end
        assert report(records, Target())["counts"] == {"requests": 12, "failed": 0}
    server.until_idle()


def test_a_request_that_the_server_refuses_is_a_failure_with_its_sentence(server: Running) -> None:
    client = Client(server.url, model="nobody")
    record = asyncio.run(client.send(Job([random.Random(1).randrange(3, 100)], 2)))
    assert record.error is not None and record.error.startswith("status 404: ") and "nobody" in record.error
