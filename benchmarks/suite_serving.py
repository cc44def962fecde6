"""Serving under load: a server with the random model S in float32 (or any server of OpenAI's API, ``--server``), and a client that sends
it requests as many users would.

Three parts. A batch of equal requests at once, beside the same batch decoded offline and, in the full run, by transformers' continuous
batching and the servers of peers; long prompts that come while others decode; and a mix of lengths as in a chat, in a closed loop and by
chance at several rates. `load.py` is the client.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from load import Client, Job, Mix, Record, Target, closed_loop, distribution, fixed_jobs, poisson, report
from measure import Setting, interleaved, rates, table
from ours import Engine
from peers import BATCHING, SERVERS
from peers.remote import PeerError, Remote
from peers.servers import MODEL, Server
from random_models import POSITIONS, SHAPES, bare, saved
from tqdm import tqdm

SHAPE = "S"
TARGET = Target(first_token=1.0, inter_token=0.1)
PROMPT, WARM_TOKENS = 128, 4
OTHER_VOCAB, OTHER_LONGEST = 1000, 1024  # what every model has, for servers of which nothing is known
BATCH_AIMS = {"offline": 0.9, BATCHING[0]: 2.0}  # output tokens/s of our server over theirs
BURST_AIM = 3.0  # times the median between tokens
RATES = (0.25, 0.5, 0.75, 1.0)  # of what the closed loop reached
SEED = 1


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    users: int  # of the batch
    new_tokens: int
    rounds: int
    bursts: int  # rounds of them
    decoding: int  # users while long prompts come
    decoded: int  # tokens each
    calm: float  # seconds before the long prompts come
    burst: int  # long prompts
    burst_prompt: int
    mix: dict[str, float]
    loop_users: int
    loop_jobs: int
    rates: tuple[float, ...]
    seconds: float  # of arrivals at each rate


FULL = Sizes(32, 128, 3, 2, 8, 1000, 3.0, 4, 1536, {}, 32, 96, RATES, 30.0)
QUICK = Sizes(16, 64, 1, 1, 4, 250, 0.5, 1, 1024, {"prompt_mean": 64.0, "output_mean": 48.0}, 8, 12, (0.5,), 1.5)


@dataclass
class Contender:
    """A server, and what it takes to ask it."""

    name: str
    client: Client
    vocab_size: int
    longest: int  # prompt and output, tokens
    form: str = ""  # of prompts


def run(setting: Setting) -> dict[str, Any]:
    sizes = QUICK if setting.quick else FULL
    with ExitStack() as stack:
        contenders = servers(setting, stack)
        results: dict[str, Any] = {"batch": batch(setting, sizes, contenders, stack)}
        # What a peer's server that takes one request at a time would do with the rest takes many minutes; --server measures it.
        results["burst"] = [burst(sizes, contenders[0])]
        results["load"] = mixed_load(sizes, contenders[0], setting.shared_prompts)
    burst_table(results["burst"])
    load_table(results["load"])
    results["aims"] = aims(results["batch"], results["burst"])
    return results


def servers(setting: Setting, stack: ExitStack) -> list[Contender]:
    """The one that ``--server`` names, or ours and those of the peers that are wanted and installed; ready."""
    if setting.server is not None:
        contender = Contender(
            setting.server, Client(setting.server, model=setting.server_model, api_key=setting.api_key), OTHER_VOCAB, 1024
        )
        return [settled(contender)]
    contenders = []
    for name in ("ours", *(name for name in SERVERS if name in setting.wanted and not setting.quick)):
        try:
            server = Server(name, saved(SHAPE), torch.get_num_threads())
        except PeerError as error:
            if name == "ours":
                raise
            tqdm.write(f"server {name} does not take part: {error}")
            continue
        stack.callback(server.close)
        contenders.append(settled(Contender(name, Client(server.url, model=MODEL), SHAPES[SHAPE]["vocab_size"], POSITIONS)))
    return contenders


def settled(contender: Contender) -> Contender:
    (job,) = fixed_jobs(1, 16, 4, SEED, contender.vocab_size)
    contender.form = asyncio.run(contender.client.settle_form(job))
    return contender


def succeeded(contender: Contender, records: list[Record]) -> list[Record]:
    """The same records, none of which may have failed."""
    for record in records:
        if record.error is not None:
            raise PeerError(f"{contender.name} failed a request: {record.error}")
    return records


# ---- a batch of equal requests ----


def batch(setting: Setting, sizes: Sizes, contenders: list[Contender], stack: ExitStack) -> list[dict[str, Any]]:
    """All requests at once: output tokens per second from the first request to the last token, prompts included."""
    ours = contenders[0]
    contenders = [ours, replace(ours, name=f"{ours.name}, whole replies", client=ours.client.whole()), *contenders[1:]]
    users, new = sizes.users, WARM_TOKENS  # until everybody has been called once, which finds everything cold
    reports: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    seeds = itertools.count(SEED)

    def jobs(vocab_size: int, longest: int) -> list[Job]:
        # Others each time: a server may have kept the prompts of the time before.
        return fixed_jobs(users, min(PROMPT, longest - new), new, next(seeds), vocab_size)

    def over_http(contender: Contender) -> Callable[[], float]:
        def once() -> float:
            mine = jobs(contender.vocab_size, contender.longest)
            records = succeeded(contender, asyncio.run(closed_loop(contender.client, mine, users)))
            reports[contender.name].append(report(records, TARGET))
            return users * new / reports[contender.name][-1]["output_tokens_per_second"]

        return once

    def offline(engine: Engine | Remote) -> Callable[[], float]:
        return lambda: engine.decode([job.prompt for job in jobs(SHAPES[SHAPE]["vocab_size"], POSITIONS)], new).total_seconds

    runs = {contender.name: over_http(contender) for contender in contenders}
    slow = [contender.name for contender in contenders[2:]]  # peers: less often
    if setting.server is None:
        decoder = Engine(bare(SHAPE), "fp32", max_batch=64, cache_tokens=users * (PROMPT + sizes.new_tokens + 16))
        runs["offline"] = offline(decoder)
        for name in BATCHING:
            if name in setting.wanted and not setting.quick and (peer := peer_or_none(name, stack)):
                runs[name] = offline(peer)
                slow.append(name)
    interleaved(runs, 1)
    for found in reports.values():
        found.clear()
    new = sizes.new_tokens
    with tqdm(total=sizes.rounds * len(runs), desc="serving, batch", disable=None, leave=False) as progress:
        times = interleaved(runs, sizes.rounds, progress, slow, slow_rounds=1)
    entries = []
    for name, seconds in times.items():
        entry = {"contender": name, "output_tokens_per_second": rates(seconds, users * new)}
        if reports.get(name):
            middle = sorted(reports[name], key=lambda one: one["output_tokens_per_second"])[len(reports[name]) // 2]
            entry |= {key: middle[key] for key in ("first_token_seconds", "inter_token_seconds", "latency_seconds")}
        entries.append(entry)
    first = entries[0]["output_tokens_per_second"]["median"]
    table(
        f"{users} requests at once, prompt {PROMPT}, {new} new tokens, random Llama {SHAPE} in float32" if setting.server is None else
        f"{users} requests at once, prompt {PROMPT}, {new} new tokens",
        ["", "output tokens/s", f"{entries[0]['contender']} / it", "first token p50, p99 s", "between tokens p50, p99 ms"],
        [
            [
                e["contender"], f"{e['output_tokens_per_second']['median']:.0f}",
                "" if e is entries[0] else f"{first / e['output_tokens_per_second']['median']:.2f}",
                shown(e.get("first_token_seconds"), 1, "p50", "p99"), shown(e.get("inter_token_seconds"), 1e3, "p50", "p99"),
            ]
            for e in entries
        ],
    )  # fmt: skip
    return entries


def peer_or_none(name: str, stack: ExitStack) -> Remote | None:
    try:
        peer = Remote(name, torch.get_num_threads())
        stack.callback(peer.close)
        if peer.unavailable is None:
            peer.load(saved(SHAPE), "fp32")
            return peer
        tqdm.write(f"peer {name} does not take part: {peer.unavailable}")
    except PeerError as error:
        tqdm.write(f"peer {name} does not take part: {error}")
    return None


# ---- long prompts while others decode ----


def burst(sizes: Sizes, contender: Contender) -> dict[str, Any]:
    """How long those who decode wait for their tokens, before long prompts come and while these are computed."""
    longest, client = contender.longest, contender.client
    calm: list[float] = []
    busy: list[float] = []
    last: list[float] = []

    async def both(decoding: list[Job], prompts: list[Job]) -> tuple[list[Record], list[Record]]:
        first = asyncio.ensure_future(closed_loop(client, decoding, len(decoding)))
        await asyncio.sleep(sizes.calm)
        second = await closed_loop(client, prompts, len(prompts))
        return await first, second

    for i in tqdm(range(sizes.bursts), desc="serving, bursts", disable=None, leave=False):
        decoding = fixed_jobs(sizes.decoding, 32, min(sizes.decoded, longest - 32), SEED + 2000 + i, contender.vocab_size)
        prompts = fixed_jobs(sizes.burst, min(sizes.burst_prompt, longest - 8), 8, SEED + 3000 + i, contender.vocab_size)
        users, long = asyncio.run(both(decoding, prompts))
        succeeded(contender, users + long)
        begin, end = min(record.submitted for record in long), max(record.times[0] for record in long)
        calm += gaps_between(users, max(record.times[0] for record in users), begin)
        busy += gaps_between(users, begin, end)
        last.append(end - begin)
    return {
        "contender": contender.name,
        "decoding": sizes.decoding,
        "prompts": f"{len(prompts)} of {len(prompts[0].prompt)}",
        "calm_gap_seconds": distribution(calm),
        "burst_gap_seconds": distribution(busy),
        "last_first_token_seconds": max(last),
    }


def gaps_between(records: list[Record], begin: float, end: float) -> list[float]:
    """Seconds between tokens of which the later came in that time."""
    return [gap for record in records for gap, moment in zip(record.gaps, record.times[1:], strict=True) if begin < moment <= end]


def burst_ratios(entry: dict[str, Any]) -> tuple[float, float]:
    """The 99th percentile during the burst over the median then, and over the median before it; NaN where there was nothing to see."""
    busy, calm = entry["burst_gap_seconds"], entry["calm_gap_seconds"]
    if busy is None or calm is None:
        return math.nan, math.nan
    return busy["p99"] / busy["p50"], busy["p99"] / calm["p50"]


def burst_table(entries: list[dict[str, Any]]) -> None:
    table(
        f"between tokens of {entries[0]['decoding']} that decode, ms, when prompts come: {entries[0]['prompts']} tokens",
        ["", "before p50, p99", "during p50, p95, p99", "p99 / p50", "p99 / p50 before", "last prompt done after s"],
        [
            [
                e["contender"], shown(e["calm_gap_seconds"], 1e3, "p50", "p99"), shown(e["burst_gap_seconds"], 1e3, "p50", "p95", "p99"),
                *(f"{ratio:.2f}" for ratio in burst_ratios(e)), f"{e['last_first_token_seconds']:.2f}",
            ]
            for e in entries
        ],
    )  # fmt: skip


# ---- a mix of lengths ----


def mixed_load(sizes: Sizes, contender: Contender, shared: float) -> list[dict[str, Any]]:
    """A closed loop, and arrivals by chance at rates that are shares of what it reached."""
    mix = Mix(longest=contender.longest, vocab_size=contender.vocab_size, shared=shared, **sizes.mix)  # type: ignore[arg-type]
    client, entries = contender.client, []

    def note(arrivals: str, offered: float | None, records: list[Record]) -> dict[str, Any]:
        entries.append({"contender": contender.name, "arrivals": arrivals, "offered_rate": offered, **report(records, TARGET)})
        return entries[-1]

    jobs = mix.jobs(sizes.loop_jobs, SEED)
    closed = note(f"{sizes.loop_users} users", None, asyncio.run(closed_loop(client, jobs, sizes.loop_users)))
    shares = sizes.rates if closed["requests_per_second"] else ()
    for i, share in enumerate(tqdm(shares, desc="serving, rates", disable=None, leave=False)):
        rate = share * closed["requests_per_second"]
        jobs = mix.jobs(max(8, round(rate * sizes.seconds)), SEED + 1 + i)
        note(f"{share:g} of that", rate, asyncio.run(poisson(client, jobs, rate, SEED + i)))
    return entries


def load_table(entries: list[dict[str, Any]]) -> None:
    table(
        f"a mix of lengths; good: first token within {TARGET.first_token:g} s, others {TARGET.inter_token * 1e3:g} ms apart in the mean",
        ["", "offered/s", "done/s", "good/s", "output tokens/s", "first token p50, p95, p99 s", "between tokens ms", "whole s", "failed"],
        [
            [
                f"{e['contender']}, {e['arrivals']}", f"{e['offered_rate']:.2f}" if e["offered_rate"] else "",
                f"{e['requests_per_second']:.2f}", f"{e['goodput_per_second']:.2f}", f"{e['output_tokens_per_second']:.0f}",
                *(
                    shown(e[key], scale, "p50", "p95", "p99")
                    for key, scale in (("first_token_seconds", 1), ("inter_token_seconds", 1e3), ("latency_seconds", 1))
                ),
                f"{e['counts']['failed']} of {e['counts']['requests']}",
            ]
            for e in entries
        ],
    )  # fmt: skip


def shown(times: dict[str, Any] | None, scale: float, *percentiles: str) -> str:
    if times is None:
        return ""
    return " ".join(f"{times[name] * scale:.{2 if scale == 1 else 1}f}" for name in percentiles)


# ---- aims ----


def aims(batches: list[dict[str, Any]], bursts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim of our server with what the run reached; none of a server that is another's."""
    rate = {entry["contender"]: entry["output_tokens_per_second"]["median"] for entry in batches}
    judged = []
    for ours in (name for name in rate if name.partition(",")[0] == "ours"):
        for name, bound in BATCH_AIMS.items():
            if name in rate:
                value = rate[ours] / rate[name]
                judged.append({"aim": f"{ours}: tokens/s over {name}", "bound": f">= {bound:g}", "reached": value, "met": value >= bound})
    for entry in bursts:
        if entry["contender"] == "ours":
            for of, value in zip(("during", "before"), burst_ratios(entry), strict=True):
                judged.append(
                    {
                        "aim": f"p99 between tokens in a burst over the median {of}", "bound": f"<= {BURST_AIM:g}", "reached": value,
                        "met": value <= BURST_AIM,
                    }
                )  # fmt: skip
    if judged:
        rows = [[a["aim"], a["bound"], f"{a['reached']:.2f}", "yes" if a["met"] else "no"] for a in judged]
        table("aims", ["", "aim", "reached", ""], rows)
    return judged


# ---- plot ----


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """Curves of the times at each load, and what was done and was good over what was offered; what is done after the last arrival counts,
    and so does the time that it takes, so that a short run lies below what it was offered."""
    import matplotlib.pyplot as plt

    files = []
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    kinds = {"first_token_seconds": "until the first token", "inter_token_seconds": "between tokens", "latency_seconds": "until the end"}
    for axis, (key, title) in zip(axes, kinds.items(), strict=True):
        for entry in results["load"]:
            if entry[key] is not None:
                curve = entry[key]["curve"]
                axis.plot(curve, [i / (len(curve) - 1) for i in range(len(curve))], label=f"{entry['contender']}, {entry['arrivals']}")
        axis.set_xscale("log")
        axis.set_xlabel(f"seconds {title}")
    axes[0].set_ylabel("share of requests, or of tokens")
    axes[2].legend(fontsize=7)
    figure.suptitle("A mix of lengths")
    files.append(save(figure, out, "latency"))

    figure, axis = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    for i, name in enumerate(dict.fromkeys(entry["contender"] for entry in results["load"])):
        here = [entry for entry in results["load"] if entry["contender"] == name and entry["offered_rate"]]
        offered = [entry["offered_rate"] for entry in here]
        axis.plot(offered, [entry["requests_per_second"] for entry in here], marker="o", ms=4, color=f"C{i}", label=f"{name}, done")
        axis.plot(offered, [entry["goodput_per_second"] for entry in here], marker="o", ms=4, ls=":", color=f"C{i}", label=f"{name}, good")
    most = max((entry["offered_rate"] for entry in results["load"] if entry["offered_rate"]), default=1.0)
    axis.plot([0, most], [0, most], color="black", lw=1, ls=":", label="offered")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests/s offered")
    axis.set_ylabel("requests/s")
    axis.legend(fontsize=8)
    files.append(save(figure, out, "rates"))
    return files


def save(figure: Any, out: Path, name: str) -> Path:
    import matplotlib.pyplot as plt

    file = out.with_name(f"{out.stem}-serving-{name}.png")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
