"""`sample` at 1 to 256 rows with every control, beside a plain read of the same logits and beside what others do, in the same run.

Two kinds of logits. "normal": normal(0, 3^2); 0.9 of the mass is spread over thousands of tokens. "peaked", as language models give: the
probability of the r-th likely token falls as (r + 5)^-2, ids shuffled; 0.9 of the mass lies in some 40 tokens.

On "cuda" ours are timed in graphs, Triton's and the CUDA kernel in every case, and peers by their own launches; the limit is a copy;
FlashInfer is a peer where it is installed. That side has never run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import samplers
import torch
from clock import Clock
from measure import Setting, interleaved, seconds_of, summary, table
from samplers import Controls
from torch import Tensor
from tqdm import tqdm

from engine.kernels import EndTokens, LogitBias, Penalties, backends, cpu

CONTROLS = {
    "unfiltered": Controls(),
    "top-k 50": Controls(top_k=50),
    "top-p 0.9": Controls(top_p=0.9),
    "top-k 50 + top-p 0.9": Controls(top_k=50, top_p=0.9),
    "min-p 0.05": Controls(min_p=0.05),
    "greedy": Controls(temperature=0.0),
}
ROWS = (1, 8, 64, 256)
VOCABS = (32_000, 128_256, 151_936)
KINDS = ("normal", "peaked")
LARGEST = VOCABS[-1]
# Logits are walked through in turn, so many that none is in a cache (32 MB here) when its turn comes; a model, too, has just read its
# weights when it samples.
POOL_BYTES = 256 << 20
CUDA_BYTES = 128 << 20  # of them, on a GPU
RUN_SECONDS = 0.015  # of one timing: a short case is repeated
OURS = ("", "CUDA kernel")  # contenders of a control that can be captured in a graph, by what is behind its name
SLOW = ("usual chain", "transformers", "llama.cpp")
# At 64 rows of 151,936 float32 logits. name, most or least, the bound
AIMS = (
    ("top-k 50: time / plain read", "<=", 1.5),
    ("unfiltered: time / plain read", "<=", 3.0),
    ("top-p 0.9: time / time of top-k 50", "<=", 3.0),
    ("top-k 50: usual chain / ours", ">=", 100.0),
    ("top-k 50: top-k first / ours", ">=", 5.0),
    ("top-k 50: llama.cpp / ours", ">=", 5.0),
)


@functools.lru_cache(maxsize=1)
def make_pool(kind: str, vocab: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits ``[N, vocab]`` of at least POOL_BYTES, N a multiple of ``rows``; after 64 rows they repeat, rolled."""
    generator = torch.Generator().manual_seed(0)
    if kind == "normal":
        base = torch.randn(64, vocab, generator=generator) * 3
    else:
        by_rank = -2 * (torch.arange(vocab) + 5.0).log() + 20
        base = torch.stack([by_rank[torch.randperm(vocab, generator=generator)] for _ in range(64)])
        base += torch.randn(64, vocab, generator=generator) * 0.1
    base = base.to(dtype)
    n = -(-POOL_BYTES // (vocab * dtype.itemsize * rows)) * rows
    pool = torch.empty(n, vocab, dtype=dtype)
    for i, part in enumerate(pool.split(64)):
        part.copy_(base[: len(part)].roll(1009 * i, dims=1))
    return pool.to(device)


class Pool:
    """Hands out batches in turn, to whichever contender asks."""

    def __init__(self, logits: Tensor, rows: int) -> None:
        self.batches = logits.split(rows)
        self.at = 0

    def take(self, count: int) -> list[Tensor]:
        taken = [self.batches[(self.at + i) % len(self.batches)] for i in range(count)]
        self.at += count
        return taken


def read(logits: Tensor) -> object:
    """All of the memory, once, by all threads: the limit. On a GPU a copy, which reads and writes."""
    if logits.is_cuda:
        return logits.clone()
    if cpu.unavailable("cpu") is not None:
        return logits.sum()
    return cpu._cpu.read_floats(logits.data_ptr(), logits.nbytes // 4)


def timed(sample: samplers.Sample, pool: Pool, peer: bool) -> Callable[[], float]:
    """Seconds of one call, over as many as make RUN_SECONDS, after one that wakes the threads; on a GPU over as many as no cache holds,
    in a graph, or of a peer by its own launches."""
    inner, first = 0, pool.batches[0]
    if first.is_cuda:
        batches = pool.batches[: -(-CUDA_BYTES // (first.numel() * first.element_size()))]
        return Clock(first.device).timed([functools.partial(sample, batch) for batch in batches], captured=not peer)

    def run() -> float:
        nonlocal inner
        if inner == 0:
            seconds = seconds_of(lambda: sample(*pool.take(1)))
            if seconds < RUN_SECONDS:  # the first call is slower than the others
                seconds = seconds_of(lambda: sample(*pool.take(1)))
            inner = max(1, min(round(RUN_SECONDS / seconds), len(pool.batches)))
        (first, *batches) = pool.take(inner + 1)
        if inner > 1:
            sample(first)
        return seconds_of(lambda: [sample(batch) for batch in batches]) / inner

    return run


def extras(rows: int, vocab: int, device: torch.device) -> dict[str, tuple[Controls, dict[str, Any]]]:
    """What else a row may carry: adjustments of single tokens, a mask, log-probabilities."""
    generator = torch.Generator().manual_seed(1)

    def lists(size: int) -> tuple[Tensor, Tensor]:
        ids = torch.cat([torch.randperm(vocab, generator=generator)[:size] for _ in range(rows)]).int()
        return ids.to(device), torch.arange(rows + 1, dtype=torch.int32, device=device) * size

    each = torch.ones(rows, device=device)
    token, start = lists(500)
    penalties = Penalties(each * 1.1, each * 0.2, each * 0.1, token, torch.ones_like(token), start)
    token, start = lists(20)
    bias = LogitBias(token, torch.ones(len(token), device=device), start)
    token, start = lists(2)
    end_tokens = EndTokens(token, torch.full((rows,), 2**30, dtype=torch.int32, device=device), start)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, (vocab + 31) // 32), generator=generator).int()
    top_k = Controls(top_k=50)
    return {
        "penalties of 500 ids": (top_k, {"penalties": penalties}),
        "bias of 20 ids, 2 end tokens": (top_k, {"bias": bias, "end_tokens": end_tokens}),
        "mask that allows half": (top_k, {"allowed": words.to(device)}),
        "logprobs=0": (top_k, {"logprobs": 0}),
        "logprobs=20": (top_k, {"logprobs": 20}),
        "logprobs=0, unfiltered": (Controls(), {"logprobs": 0}),
    }


def run(setting: Setting) -> dict[str, Any]:
    quick, device = setting.quick, torch.device(setting.device)
    cuda_kernel = device.type == "cuda" and backends("cuda")["cuda"] is None  # beside Triton's: kernels/crossover.py
    rounds, slow_rounds = (2, 1) if quick else (7, 3)
    cells = [
        (kind, dtype, vocab, rows)
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16)
        for vocab in VOCABS
        for rows in ROWS
        if not quick or (vocab == LARGEST and rows == 64 and dtype == torch.float32)
    ]
    results: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    failed: list[str] = []
    with tqdm(total=len(cells), desc="sampling", disable=None, leave=False) as progress:
        for kind, dtype, vocab, rows in cells:
            name = str(dtype).removeprefix("torch.")
            pool = Pool(make_pool(kind, vocab, max(ROWS), dtype, device), rows)
            contenders: dict[str, samplers.Sample] = {"read": read}
            with_peers = dtype == torch.float32 and vocab == LARGEST
            for control, controls in CONTROLS.items():
                contenders[control] = samplers.ours(controls, rows, device)
                if cuda_kernel:
                    contenders[f"{control}|CUDA kernel"] = samplers.ours(controls, rows, device, "cuda")
                if with_peers and (rows < 256 or control == "top-k 50"):
                    contenders |= {f"{control}|{who}": s for who, s in samplers.peers(controls, rows, vocab, device).items()}
            if with_peers and rows == 64:
                contenders |= {e: samplers.ours(c, rows, device, **given) for e, (c, given) in extras(rows, vocab, device).items()}
            slow = [c for c in contenders if c.partition("|")[2] in SLOW]
            able: dict[str, Callable[[], float]] = {}
            for c, sample in contenders.items():
                try:
                    able[c] = timed(sample, pool, c.partition("|")[2] not in OURS)
                except RuntimeError as error:  # of a GPU's; the others go on
                    if "|" not in c:
                        raise
                    failed.append(f"{kind}, {name}, {rows} x {vocab}, {c}: {str(error).strip().splitlines()[0]}")
                    tqdm.write(failed[-1])
            times = interleaved(able, rounds, slow=slow, slow_rounds=slow_rounds)
            medians = {c: summary(t) for c, t in times.items()}
            least = medians["read"]["median"] / (2 if device.type == "cuda" else 1)
            case = {"kind": kind, "dtype": name, "vocab": vocab, "rows": rows, "read_seconds": least}
            for contender, seconds in medians.items():
                if contender == "read" or "|" in contender:
                    continue
                row = {**case, "control": contender, "seconds": seconds, "times_read": seconds["median"] / least}
                theirs = {c.partition("|")[2]: t for c, t in medians.items() if c.startswith(f"{contender}|")}
                row["peers"] = {who: {"seconds": t, "times_ours": t["median"] / seconds["median"]} for who, t in theirs.items()}
                (results if contender in CONTROLS else more).append(row)
            progress.update()
    _tables(results, more)
    aims = reached(results)
    _aims_table(aims)
    return {"device": setting.device, "peers": _versions(), "cases": results, "extras": more, "aims": aims, "errors": failed}


def _versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in ("torch", "transformers", "llama-cpp-python", "flashinfer-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def reached(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each aim with what the run reached, for either kind of logits; None where a peer was not there."""
    found = []
    for kind in KINDS:
        at = {r["control"]: r for r in results if (r["kind"], r["dtype"], r["vocab"], r["rows"]) == (kind, "float32", LARGEST, 64)}
        top_k = at["top-k 50"]
        peers = {who: peer["times_ours"] for who, peer in top_k["peers"].items()}
        values = (
            top_k["times_read"],
            at["unfiltered"]["times_read"],
            at["top-p 0.9"]["seconds"]["median"] / top_k["seconds"]["median"],
            peers.get("usual chain"),
            peers.get("top-k first"),
            peers.get("llama.cpp"),
        )
        for (name, sign, bound), value in zip(AIMS, values, strict=True):
            good = None if value is None else (value <= bound if sign == "<=" else value >= bound)
            found.append({"aim": name, "kind": kind, "bound": f"{sign} {bound:g}", "value": value, "reached": good})
    return found


def _aims_table(aims: list[dict[str, Any]]) -> None:
    def cells(aim: dict[str, Any]) -> tuple[str, str]:
        return ("-", "not measured") if aim["value"] is None else (f"{aim['value']:.2f}", "yes" if aim["reached"] else "NO")

    rows = [[a["aim"], a["kind"], a["bound"], *cells(a)] for a in aims]
    table(f"aims, 64 x {LARGEST} float32", ["aim", "logits", "bound", "value", "reached"], rows)


def _tables(results: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["kind"], r["dtype"], r["vocab"], r["rows"]), {})[r["control"]] = r
    table(
        "sample: ms (times a plain read of the same logits from memory)",
        ["logits", "rows x V", "read ms", *CONTROLS],
        [
            [
                f"{kind} {dtype}",
                f"{rows} x {vocab}",
                f"{next(iter(group.values()))['read_seconds'] * 1e3:.3f}",
                *(f"{r['seconds']['median'] * 1e3:.3f} ({r['times_read']:.2f})" for r in group.values()),
            ]
            for (kind, dtype, vocab, rows), group in groups.items()
        ],
    )
    beside = [r for r in results if r["peers"]]
    names = list(dict.fromkeys(who for r in beside for who in r["peers"]))

    def ratios(r: dict[str, Any]) -> list[str]:
        return [f"{r['peers'][who]['times_ours']:.1f}" if who in r["peers"] else "-" for who in names]

    rows = [[r["kind"], f"{r['rows']} x {r['vocab']}", r["control"], *ratios(r)] for r in beside]
    table("peers: times our time", ["logits", "rows x V", "control", *names], rows)
    table(
        "further controls, with top-k 50 where nothing else is said",
        ["control", "logits", "ms", "x read"],
        [[r["control"], r["kind"], f"{r['seconds']['median'] * 1e3:.3f}", f"{r['times_read']:.2f}"] for r in more],
    )


# ---- plots ----

COLOURS = {"normal": "#3b6fb6", "peaked": "#d9822b"}
LINES = {
    "usual chain": ("#b23a48", "o"),
    "transformers": ("#8d5fa8", "s"),
    "top-k first": ("#5b8e3e", "^"),
    "llama.cpp": ("#8a6d3b", "D"),
    "FlashInfer": ("#8a6d3b", "v"),
}


def plot(results: dict[str, Any], path: Path) -> list[Path]:
    """Two figures beside ``path``: time over plain read per control, and time by rows; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [r for r in results["cases"] if r["dtype"] == "float32" and r["vocab"] == LARGEST]
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}):
        return [_bars(plt, cases, results["extras"], path), _by_rows(plt, cases, path)]


def _bars(plt: Any, cases: list[dict[str, Any]], more: list[dict[str, Any]], path: Path) -> Path:
    """Time over plain read of every control at 64 rows; ticks show the aims."""
    rows = [r for r in [*cases, *more] if r["rows"] == 64]
    names = list(dict.fromkeys(r["control"] for r in rows))
    value = {(r["kind"], r["control"]): r["times_read"] for r in rows}
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.8), layout="constrained")
    height = 0.38
    for i, kind in enumerate(KINDS):
        at = [y + (i - 0.5) * height for y in range(len(names))]
        widths = [value.get((kind, name), 0.0) for name in names]
        bars = axes.barh(at, widths, height * 0.92, color=COLOURS[kind], label=f"{kind} logits")
        axes.bar_label(bars, [f"{w:.1f}" if w < 10 else f"{w:.0f}" for w in widths], padding=6, fontsize=8)
    for i, kind in enumerate(KINDS):
        for name, bound in (("top-k 50", 1.5), ("unfiltered", 3.0), ("top-p 0.9", 3.0 * value[kind, "top-k 50"])):
            y = names.index(name) + (i - 0.5) * height
            label = "aim: at most" if name == "top-k 50" and i == 0 else None
            axes.plot([bound, bound], [y - 0.24, y + 0.24], color="black", lw=2.5, label=label)
    axes.axvline(1, color="grey", lw=1, ls="--")
    axes.text(1.02, -0.75, "plain read of the logits", fontsize=8, color="dimgrey", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -1)
    if max(value.values()) > 12:
        axes.set_xscale("log")
        axes.set_xlim(0.7, max(value.values()) * 1.4)
        ticks = [t for t in (1, 2, 3, 5, 10, 20, 50, 100) if t < max(value.values()) * 1.4]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    axes.set_xlabel("time of one call / time of a plain read of its logits")
    axes.set_title(f"sample, 64 x {LARGEST} float32")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _save(plt, figure, path, "controls")


def _by_rows(plt: Any, cases: list[dict[str, Any]], path: Path) -> Path:
    """Time of top-k 50 by rows, ours, the peers and the limit, log-log."""
    mine = sorted((r for r in cases if r["kind"] == KINDS[0] and r["control"] == "top-k 50"), key=lambda r: r["rows"])
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    rows = [r["rows"] for r in mine]
    lines = []
    for who, (colour, marker) in LINES.items():
        points = [(r["rows"], r["peers"][who]["seconds"]["median"] * 1e3) for r in mine if who in r["peers"]]
        if points:
            lines += axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.3, label=who)
    lines += axes.plot(rows, [r["seconds"]["median"] * 1e3 for r in mine], color=COLOURS["normal"], marker="o", ms=7, lw=2.5, label="ours")
    limit = [r["read_seconds"] * 1e3 for r in mine]
    lines += axes.plot(rows, limit, color="black", ls="--", lw=1.5, label="plain read of the logits")
    axes.fill_between(rows, limit, min(limit) / 3, color="0.93", lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(rows, [str(r) for r in rows])
    axes.set_ylim(min(limit) / 2, None)
    axes.set_xlabel("rows")
    axes.set_ylabel("ms per call")
    axes.grid(True, axis="y", color="0.88", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"top-k 50 at temperature {samplers.TEMPERATURE}, V = {LARGEST}, float32, normal logits")
    order = sorted(lines, key=lambda line: -line.get_ydata()[-1])
    axes.legend(handles=order, frameon=False, loc="upper left")
    return _save(plt, figure, path, "rows")


def _save(plt: Any, figure: Any, path: Path, name: str) -> Path:
    file = path.with_name(f"{path.stem}-{name}.png")
    figure.savefig(file)
    plt.close(figure)
    return file
