"""The kernels of a step on a GPU one by one, on the shapes of Llama 3 8B in bfloat16, each with its share of what the GPU can do at most.

Weights, keys and values are so much memory in turn that none of it is in a cache, as in a step, whose layers follow each other; activations
and logits of few rows lie in the cache, where the kernel before has just written them. Long kernels are held against moving their bytes, or
their multiplications; short ones against a kernel that does nothing, which takes longer. This suite has never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from clock import Call, Clock, Limits
from measure import Setting, interleaved, summary, table
from torch import Tensor
from tqdm import tqdm

from engine import kernels
from engine.kernels import Ops
from engine.kernels.checks import SCALE_BYTES, SCALED_DTYPES
from engine.kernels.quantized import FORMATS, quantize


@dataclass(frozen=True)
class Sizes:
    """Of the model, of the memory that is walked through, and of the cases."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 14_336
    vocab: int = 128_256
    pool_bytes: int = 256 << 20  # several times the largest cache of the GPUs of today
    rows: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[tuple[int, int], ...] = ((1, 16_384), (64, 1024), (16, 4096), (4, 16_384), (1, 65_536))  # batch, tokens
    verified: int = 8  # query tokens of a sequence that are verified at once
    prompts: tuple[int, ...] = (512, 2048)
    groups: int = 16  # of beams
    beams: int = 4


SIZES = Sizes()
QUICK = replace(SIZES, contexts=SIZES.contexts[:2], prompts=(2048,))


@dataclass
class Line:
    """One contender of a case: its calls, and what one of them must move and compute at least."""

    contender: str
    calls: Sequence[Call]
    num_bytes: float
    operations: float = 0.0
    captured: bool = True


@dataclass
class Group:
    """Contenders that do the same."""

    kernel: str
    case: str
    lines: list[Line] = field(default_factory=list)


def run(setting: Setting, sizes: Sizes | None = None) -> dict[str, Any]:
    sizes = sizes or (QUICK if setting.quick else SIZES)
    device = torch.device(setting.device)
    bench = Bench(device, sizes, setting.machine, 3 if setting.quick else 7)
    entries: list[dict[str, Any]] = []
    families = (bench.attention, bench.linear, bench.head, bench.small, bench.sampling, bench.beams)
    with tqdm(desc="kernels", disable=None, leave=False) as progress:
        for family in families:
            for group in family():
                entries += bench.measure(group)
                progress.update()
    show(entries)
    judged = aims(entries, sizes)
    failed = [f"{e['kernel']}, {e['case']}, {e['contender']}: {e['error']}" for e in entries if "error" in e]
    return {"entries": entries, "aims": judged, "errors": failed}


class Bench:
    """Makes the groups, and measures them."""

    def __init__(self, device: torch.device, sizes: Sizes, limits: Limits, rounds: int) -> None:
        self.device, self.sizes, self.limits, self.rounds = device, sizes, limits, rounds
        self.clock = Clock(device)
        self.ops = contenders(device)
        self.own = self.ops.get("Triton") or next(iter(self.ops.values()))  # of the ops that have one form alone
        self.dtype = torch.bfloat16

    def measure(self, group: Group) -> list[dict[str, Any]]:
        """One entry for each contender, the first the one that the others are compared with; one that fails has the error."""
        entries: list[dict[str, Any]] = []
        able: dict[str, Callable[[], float]] = {}
        for line in group.lines:
            entry: dict[str, Any] = {"kernel": group.kernel, "case": group.case, "contender": line.contender}
            entries.append(entry)
            try:
                able[line.contender] = self.clock.timed(line.calls, line.captured)
            except Exception as error:  # the others go on
                entry["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                tqdm.write(f"{group.kernel}, {group.case}, {line.contender} fails: {entry['error']}")
        times = {name: summary(values) for name, values in interleaved(able, self.rounds).items()}
        first = next(iter(times.values()))["median"] if times else 0.0
        for entry, line in zip(entries, group.lines, strict=True):
            if line.contender not in times:
                continue
            median = times[line.contender]["median"]
            least = max(self.limits.seconds(line.num_bytes, line.operations), self.limits.kernel_seconds)
            entry |= {
                "seconds": times[line.contender], "limit_share": least / median, "times_first": median / first,
                "copy_share": line.num_bytes / self.limits.copy_bandwidth / median, "bytes": line.num_bytes,
            }  # fmt: skip
        return entries

    # ---- memory ----

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def ids(self, n: int, most: int) -> Tensor:
        return torch.randint(0, most, (n,), dtype=torch.int32, device=self.device)

    def copies(self, make: Callable[[], Any], num_bytes: float, most: int = 64) -> list[Any]:
        """As many of something that has so many bytes as the pool holds."""
        return [make() for _ in range(max(1, min(most, int(self.sizes.pool_bytes // max(num_bytes, 1)) + 1)))]

    # ---- the families ----

    def attention(self) -> Iterator[Group]:
        """Decoding and verification over random blocks, over every cache; and chunks of prompts, held against their multiplications."""
        s = self.sizes
        dtypes = [torch.bfloat16, torch.int8, *([torch.float8_e4m3fn] if has_float8(self.device) else [])]
        for batch, context in s.contexts:
            for dtype in dtypes:
                group = Group("paged_attention", f"batch {batch}, {context} tokens, {name_of(dtype)} cache")
                caches, blocks = self._caches(batch, context, dtype)
                moved = sum(t.nbytes for t in caches[0])
                for queries in (1, s.verified):
                    step = self._step(batch, context, queries, blocks)
                    q = self.random(batch * queries, s.heads, s.head_dim)
                    calls = [self._attend(self.own, q, key, value, step) for key, value in caches]
                    group.lines.append(Line(f"{queries} queries" if queries > 1 else "1 query", calls, moved + 2 * q.nbytes))
                yield group
        for tokens in s.prompts:
            caches, blocks = self._caches(1, tokens, torch.bfloat16)
            step, q = self._step(1, tokens, tokens, blocks), self.random(tokens, s.heads, s.head_dim)
            operations = 4 * s.heads * s.head_dim * tokens * (tokens + 1) / 2
            lines = [Line(name, [self._attend(ops, q, *caches[0], step)], 4 * q.nbytes, operations) for name, ops in self.ops.items()]
            yield Group("paged_attention", f"prompt of {tokens} tokens", lines)

    def _caches(self, batch: int, context: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Keys and values of layers, and how many blocks each has."""
        s = self.sizes
        blocks = batch * -(-context // 16)
        scaled = dtype in SCALED_DTYPES
        rows = s.head_dim + (SCALE_BYTES if scaled else 0)

        def one(keys: bool) -> Tensor:
            shape = (blocks, s.kv_heads, 1, rows, 16) if keys or scaled else (blocks, s.kv_heads, 16, s.head_dim)
            if not scaled:
                return self.random(*shape, dtype=dtype)
            cache = torch.randint(0, 64, shape, dtype=torch.int8, device=self.device)
            cache[..., s.head_dim :, :] = torch.full((16,), 0.01, device=self.device).view(torch.int8).view(SCALE_BYTES, 16)
            return cache.view(dtype)

        return self.copies(lambda: (one(True), one(False)), 2 * blocks * s.kv_heads * rows * 16 * dtype.itemsize, most=8), blocks

    def _step(self, batch: int, context: int, queries: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Block table (as wide as a graph's), query start, context lengths."""
        own, width = blocks // batch, 32
        while width < own:
            width *= 4
        block_table = torch.zeros(batch, width, dtype=torch.int32, device=self.device)
        block_table[:, :own] = torch.randperm(blocks, device=self.device).view(batch, own)
        start = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * queries
        return block_table, start, torch.full((batch,), context, dtype=torch.int32, device=self.device)

    def _attend(self, ops: Ops, q: Tensor, key: Tensor, value: Tensor, step: tuple[Tensor, ...]) -> Call:
        return lambda: ops.paged_attention(q, key, value, *step, scale=self.sizes.head_dim**-0.5)

    def linear(self) -> Iterator[Group]:
        """The five products of a step as it calls them, the weights as they are and quantised."""
        s = self.sizes
        kv = s.kv_heads * s.head_dim
        products = {
            "qkv": ((s.heads * s.head_dim, kv, kv), s.hidden), "out": ((s.hidden,), s.heads * s.head_dim),
            "gate_up": ((s.ffn, s.ffn), s.hidden), "down": ((s.hidden,), s.ffn), "head": ((s.vocab,), s.hidden),
        }  # fmt: skip
        formats = [f for f in FORMATS if f != "fp8" or has_float8(self.device)]
        for name, (widths, depth) in products.items():
            dense = [self.random(n, depth) / depth**0.5 for n in widths]
            as_they_are = self._pool(dense)
            pools: dict[str, list[Any]] = dict.fromkeys(self.ops, as_they_are)
            pools |= {format: self._pool([quantize(w, format) for w in dense]) for format in formats}
            for rows in s.rows:
                group = Group("linear", f"{name}, {rows} rows")
                x = self.random(rows, depth)
                adds, is_head = name in ("out", "down"), name == "head"
                out = torch.zeros(rows, sum(widths), device=self.device) if adds or is_head else None
                rest = x.nbytes + rows * sum(widths) * (8 if adds else 4 if is_head else 2)
                for who, pool in pools.items():
                    ops = self.ops.get(who, self.own)
                    calls = [self._multiply(ops, x, weights, out, adds) for weights in pool]
                    moved = sum(w.nbytes for w in pool[0]) + rest
                    group.lines.append(Line(who, calls, moved, 2.0 * rows * depth * sum(widths)))
                yield group

    def _pool(self, weights: list[Any]) -> list[list[Any]]:
        def copy() -> list[Any]:
            return [w.clone() if isinstance(w, Tensor) else replace(w, data=w.data.clone()) for w in weights]

        return self.copies(copy, sum(w.nbytes for w in weights), most=16)

    @staticmethod
    def _multiply(ops: Ops, x: Tensor, weights: list[Any], out: Tensor | None, adds: bool) -> Call:
        return lambda: ops.linear(x, weights, residual=out if adds else None, out=out)

    def head(self) -> Iterator[Group]:
        """The LM head that draws its tokens itself beside the product and the draw from its logits."""
        s = self.sizes
        head = self.random(s.vocab, s.hidden) / s.hidden**0.5
        heads = self.copies(head.clone, head.nbytes, most=2)
        for rows in s.rows:
            x, law = self.random(rows, s.hidden), self._law(rows)
            logits = torch.empty(rows, s.vocab, device=self.device)
            group = Group("sample_head", f"{rows} rows")
            moved = head.nbytes + x.nbytes

            def fused(head: Tensor, x: Tensor = x, law: dict[str, Tensor] = law) -> Call:
                given = (law["temperature"], law["seed"], law["position"], law["stream"])
                return lambda: kernels.merge_draws([self.own.sample_head(x, head, *given)])

            def apart(ops: Ops, head: Tensor, x: Tensor = x, law: dict[str, Tensor] = law, logits: Tensor = logits) -> Call:
                return lambda: self.own.sample(ops.linear(x, [head], out=logits), **law, logprobs=0)

            group.lines.append(Line("fused", [fused(h) for h in heads], moved))
            group.lines += [Line(f"linear of {who}, sample", [apart(ops, h) for h in heads], moved) for who, ops in self.ops.items()]
            yield group

    def _law(self, rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> dict[str, Tensor]:
        zeros = torch.zeros(rows, dtype=torch.int32, device=self.device)
        floats = torch.zeros(rows, device=self.device)
        return {
            "temperature": floats + temperature, "top_k": zeros + top_k, "top_p": floats + top_p, "min_p": floats, "seed": zeros.long() + 7,
            "position": zeros + 100, "stream": torch.arange(rows, dtype=torch.int32, device=self.device),
        }  # fmt: skip

    def small(self) -> Iterator[Group]:
        s, ops = self.sizes, self.own
        for rows in (*s.rows, *s.prompts[-1:]):
            case, places = f"{rows} rows", torch.arange(rows, dtype=torch.int32, device=self.device)
            x, norm = self.random(rows, s.hidden, dtype=torch.float32), self.random(s.hidden)
            xs = self.copies(x.clone, x.nbytes)
            yield Group("rms_norm", case, [Line("ours", [self._norm(ops, x, norm) for x in xs], x.nbytes + x.nbytes / 2)])
            gates = self.random(rows, 2 * s.ffn)
            pool = self.copies(gates.clone, gates.nbytes)
            yield Group("silu_mul", case, [Line("ours", [self._silu(ops, g) for g in pool], gates.nbytes * 1.5)])
            qkv = self.random(rows, (s.heads + 2 * s.kv_heads) * s.head_dim)
            angles = torch.rand(rows, s.head_dim // 2, device=self.device)
            blocks = -(-rows // 16)
            caches = [(self.random(blocks, s.kv_heads, 1, s.head_dim, 16), self.random(blocks, s.kv_heads, 16, s.head_dim)) for _ in "12"]
            calls = [self._rope(ops, q, places, angles, caches[i % 2]) for i, q in enumerate(self.copies(qkv.clone, qkv.nbytes))]
            yield Group("rope_append", case, [Line("ours", calls, 2 * qkv.nbytes)])
        table_ = self.random(s.vocab, s.hidden)
        for rows in s.rows:
            tokens = [self.ids(rows, s.vocab) for _ in range(16)]
            calls = [self._embed(ops, ids, table_) for ids in tokens]
            yield Group("embed", f"{rows} rows", [Line("ours", calls, rows * s.hidden * 6)])
            source, drawn = (
                torch.full((rows,), -1, dtype=torch.int32, device=self.device),
                torch.zeros(rows, dtype=torch.int64, device=self.device),
            )
            yield Group("feed_tokens", f"{rows} rows", [Line("ours", [self._feed(ops, t, source, drawn) for t in tokens], rows * 20)])

    def _norm(self, ops: Ops, x: Tensor, weight: Tensor) -> Call:
        return lambda: ops.rms_norm(x, weight, 1e-5, self.dtype)

    @staticmethod
    def _silu(ops: Ops, x: Tensor) -> Call:
        return lambda: ops.silu_mul(x)

    def _rope(self, ops: Ops, qkv: Tensor, places: Tensor, angles: Tensor, cache: tuple[Tensor, Tensor]) -> Call:
        return lambda: ops.rope_append(qkv, places, places, angles, angles, *cache, num_heads=self.sizes.heads)

    @staticmethod
    def _embed(ops: Ops, tokens: Tensor, table: Tensor) -> Call:
        return lambda: ops.embed(tokens, table)

    @staticmethod
    def _feed(ops: Ops, tokens: Tensor, source: Tensor, drawn: Tensor) -> Call:
        return lambda: ops.feed_tokens(tokens, source, drawn)

    def sampling(self) -> Iterator[Group]:
        """As a step draws, from logits that have just been written; the sampling suite has everything else."""
        s = self.sizes
        controls: dict[str, dict[str, float]] = {"unfiltered": {}, "top-k 50": {"top_k": 50}, "top-p 0.9": {"top_p": 0.9}}
        for rows in s.rows:
            logits = self.random(rows, s.vocab, dtype=torch.float32) * 3
            for control, given in controls.items():
                law = self._law(rows, **given)  # type: ignore[arg-type]
                lines = [Line(who, [self._sample(ops, logits, law)], logits.nbytes) for who, ops in selectors(self.device).items()]
                yield Group("sample", f"{rows} rows, {control}", lines)

    @staticmethod
    def _sample(ops: Ops, logits: Tensor, law: dict[str, Tensor]) -> Call:
        return lambda: ops.sample(logits, **law, logprobs=0)

    def beams(self) -> Iterator[Group]:
        """Beside a plain read of the logits, all from memory."""
        s = self.sizes
        for groups in (1, s.groups):
            rows = groups * s.beams
            logits = self.random(rows, s.vocab, dtype=torch.float32) * 3
            pool = self.copies(logits.clone, logits.nbytes)
            start = torch.arange(groups + 1, dtype=torch.int32, device=self.device) * s.beams
            ones, zeros = torch.ones(rows, device=self.device), torch.zeros(rows, dtype=torch.int32, device=self.device)
            step = (-ones, start, 2 * s.beams, ones, zeros, zeros)
            lines = [Line("plain read", [x.sum for x in pool], logits.nbytes)]
            lines += [Line(who, [self._select(ops, x, step) for x in pool], logits.nbytes) for who, ops in selectors(self.device).items()]
            yield Group("beam_select", f"{groups} groups of {s.beams} beams", lines)

    @staticmethod
    def _select(ops: Ops, logits: Tensor, step: tuple[Any, ...]) -> Call:
        return lambda: ops.beam_select(logits, *step)


def contenders(device: torch.device) -> dict[str, Ops]:
    """Ops of a forward: as chosen where bits may depend on the batch, and where they may not; on a CPU the oracle's, for tests."""
    if device.type != "cuda":
        return {"reference": kernels.select(device.type, "reference")}
    return {"fast": kernels.select("cuda"), "Triton": kernels.select("cuda", deterministic=True)}


def selectors(device: torch.device) -> dict[str, Ops]:
    """Ops that draw and select: Triton's, and those written in CUDA, of which ``kernels/crossover.py`` is filled from measured times."""
    if device.type != "cuda":
        return contenders(device)
    found = {"Triton": kernels.select("cuda", "triton")}
    if kernels.backends("cuda")["cuda"] is None:
        found["CUDA kernel"] = kernels.select("cuda", "cuda")
    return found


def has_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(entries: list[dict[str, Any]]) -> None:
    def cells(e: dict[str, Any]) -> list[str]:
        if "error" in e:
            return ["fails", "-", "-", "-"]
        median = e["seconds"]["median"]
        return [f"{median * 1e6:.1f}", f"{e['limit_share']:.0%}", f"{e['copy_share']:.0%}", f"{e['times_first']:.2f}"]

    table(
        "kernels on the shapes of Llama 3 8B, bfloat16 (limit: moving their bytes, their multiplications, or an empty kernel)",
        ["kernel", "case", "", "us", "of limit", "of copying", "x the first"],
        [[e["kernel"], e["case"], e["contender"], *cells(e)] for e in entries],
    )


def aims(entries: list[dict[str, Any]], sizes: Sizes) -> list[dict[str, Any]]:
    """Each aim with what the run reached; None where it has no number."""
    at = {(e["kernel"], e["case"], e["contender"]): e for e in entries if "seconds" in e}
    wanted: list[tuple[str, str, float, float | None]] = []
    for batch, context in sizes.contexts:
        case = f"batch {batch}, {context} tokens, bfloat16 cache"
        decode, verify = (at.get(("paged_attention", case, f"{n}")) for n in ("1 query", f"{sizes.verified} queries"))
        bound = 0.8 if batch * context >= 65_536 else 0.6
        wanted.append((f"attention, {case}: of copy bandwidth", ">=", bound, decode and decode["copy_share"]))
        wanted.append((f"attention, {case}: {sizes.verified} queries / 1", "<=", 1.1, verify and verify["times_first"]))
    case = f"{sizes.groups} groups of {sizes.beams} beams"
    for who in ("Triton", "CUDA kernel"):
        entry = at.get(("beam_select", case, who))
        if entry or who == "Triton":
            wanted.append((f"beam_select of {who}, {case}: / plain read", "<=", 3.0, entry and entry["times_first"]))
    judged = [
        {
            "aim": name, "bound": f"{sign} {bound:g}", "reached": value,
            "met": None if value is None else (value >= bound if sign == ">=" else value <= bound),
        }
        for name, sign, bound, value in wanted
    ]  # fmt: skip
    met = {None: "not measured", True: "yes", False: "no"}
    rows = [[a["aim"], a["bound"], "-" if a["reached"] is None else f"{a['reached']:.2f}", met[a["met"]]] for a in judged]
    table("aims", ["", "aim", "reached", ""], rows)
    return judged


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """Share of the limit of every case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [e for e in results["entries"] if "seconds" in e]
    names = [f"{e['kernel']}, {e['case']}: {e['contender']}" for e in entries]
    figure, axis = plt.subplots(figsize=(11, 0.19 * len(entries) + 1.5), layout="constrained")
    colours = {kernel: f"C{i}" for i, kernel in enumerate(dict.fromkeys(e["kernel"] for e in entries))}
    axis.barh(range(len(entries)), [e["limit_share"] for e in entries], color=[colours[e["kernel"]] for e in entries])
    axis.set_yticks(range(len(entries)), names, fontsize=6)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.axvline(1, color="black", lw=0.8, ls=":")
    axis.set_xlabel("share of the limit")
    file = out.with_name(f"{out.stem}-limits.png")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
