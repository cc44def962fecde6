"""The kernels of a step one by one, each with its share of the machine's limit: products at 1 to 512 rows with weights in every format,
beside `torch.nn.functional.linear`, and lines for attention, the elementwise kernels and the samplers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Machine, Setting, interleaved, seconds_of, summary, table
from torch import Tensor
from tqdm import tqdm

from engine import kernels
from engine.kernels import limits
from engine.kernels.packed import pack

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
SHAPES = ((8192, 2048), (4096, 768))  # [N, K]
# Weights are walked through in turn, more of them than any cache holds, as the layers of a model are.
POOL_BYTES = 192 << 20
RUN_SECONDS = 0.03
FORMATS = ("fp32 in place", "bf16 in place", "fp32", "bf16", "int8", "int4")  # in place: row-major, the model's own; the others packed
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 768, 2048, 12, 4, 64, 32_000  # of the random model S


def run(setting: Setting) -> dict[str, Any]:
    return {"linear": linear(setting.machine, setting.quick), "others": others(setting.machine, setting.quick)}


# ---- products ----


def matrices(n: int, k: int, format: str) -> list[Any]:
    """As many as POOL_BYTES hold. All are copies of one: what is measured does not depend on the values."""
    dtype = torch.bfloat16 if "bf16" in format else torch.float32
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    if format.endswith("in place"):
        return [weight.clone() for _ in range(max(2, POOL_BYTES // weight.nbytes))]
    packed = pack(weight, format if format in ("int8", "int4") else None)
    return [dataclasses.replace(packed, data=packed.data.clone()) for _ in range(max(2, POOL_BYTES // packed.nbytes))]


def check(weight: Any, x: Tensor, result: Tensor, format: str) -> None:
    """What is timed is the product: narrow formats may round x as well, to within a per cent."""
    dense = weight.float() if isinstance(weight, Tensor) else weight.dense().float()
    exact = x @ dense.T
    error = float((result - exact).norm() / exact.norm())
    if not error < (1e-4 if format.startswith("fp32") else 0.02):
        raise AssertionError(f"linear, {format}, {len(x)} rows: the result is off by {error:.1%}")


def linear(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    ops = kernels.select("cpu")
    rounds = 2 if quick else 9
    shapes, all_rows = (SHAPES[:1], (1, 8, 32)) if quick else (SHAPES, ROWS)
    results = []
    with tqdm(total=len(shapes) * len(all_rows) * rounds * (len(FORMATS) + 3), desc="linear", disable=None, leave=False) as progress:
        for n, k in shapes:
            pools = {format: matrices(n, k, format) for format in FORMATS}
            for rows in all_rows:
                x, operations = torch.randn(rows, k), 2 * rows * n * k
                contenders: dict[str, Callable[[], float]] = {}
                for format, pool in pools.items():
                    check(pool[0], x, ops.linear(x, (pool[0],)), format)
                    contenders[format] = timed(lambda w, x=x: ops.linear(x, (w,)), pool, machine.seconds(pool[0].nbytes, operations))
                for dtype in ("fp32", "bf16"):
                    pool = pools[f"{dtype} in place"]
                    # torch multiplies in the weights' dtype; ours keeps float32 activations
                    x_torch = x.to(pool[0].dtype)
                    product = lambda w, x=x_torch: torch.nn.functional.linear(x, w)  # noqa: E731
                    contenders[f"{dtype} torch"] = timed(product, pool, machine.seconds(pool[0].nbytes, operations))
                contenders["read"] = machine.reader()
                seconds = interleaved(contenders, rounds, progress)
                now = machine.during(seconds.pop("read"))
                times = {name: summary(values) for name, values in seconds.items()}
                for format, pool in pools.items():
                    mine = times[format]
                    # A machine may multiply narrower numbers faster than float32, and how fast is not measured.
                    least = now.seconds(pool[0].nbytes, operations if format.startswith("fp32") else 0)
                    entry = {
                        "n": n, "k": k, "format": format, "rows": rows, "seconds": mine,
                        "bandwidth_share": pool[0].nbytes / mine["median"] / now.read_bandwidth,
                        "gflop_s": operations / mine["median"] / 1e9, "limit_share": least / mine["median"],
                    }  # fmt: skip
                    if theirs := times.get(f"{format.split()[0]} torch"):
                        entry |= {"torch_seconds": theirs, "torch_ratio": theirs["median"] / mine["median"]}
                    results.append(entry)
    results.sort(key=lambda r: (-r["n"], FORMATS.index(r["format"]), r["rows"]))
    one = {(r["n"], r["format"]): r["seconds"]["median"] for r in results if r["rows"] == 1}
    table(
        "linear: share of the machine's limit (reading the weights, or in float32 the multiply-adds if they take longer)",
        ["weights", "rows", "ms", "x 1 row", "bandwidth", "GFLOP/s", "of limit", "x torch"],
        [
            [
                f"{r['n']}x{r['k']} {r['format']}", str(r["rows"]), f"{r['seconds']['median'] * 1e3:.3f}",
                f"{r['seconds']['median'] / one[r['n'], r['format']]:.2f}", f"{r['bandwidth_share']:.0%}", f"{r['gflop_s']:.0f}",
                f"{r['limit_share']:.0%}", f"{r['torch_ratio']:.2f}" if "torch_ratio" in r else "-",
            ]
            for r in results
        ],
    )  # fmt: skip
    return results


def timed(product: Callable[[Any], object], pool: list[Any], least: float) -> Callable[[], float]:
    """Seconds of one product. A run passes over as many matrices as take RUN_SECONDS, and goes on from there the next time."""
    inner, at = max(1, min(len(pool), round(RUN_SECONDS / least))), 0

    def one() -> float:
        nonlocal at
        chosen = [pool[(at + i) % len(pool)] for i in range(inner)]
        at += inner
        product(pool[at % len(pool)])  # wakes the threads
        return seconds_of(lambda: [product(w) for w in chosen]) / inner

    return one


# ---- a line for each of the others ----


@dataclasses.dataclass(frozen=True)
class Line:
    """A kernel's call, with what it must read and compute at least."""

    name: str
    case: str
    call: Callable[[], object]
    num_bytes: float
    operations: float = 0.0


def others(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    rounds = 2 if quick else 9
    results = []
    lines = [*attention_lines(), *elementwise_lines(), *sampling_lines()]
    for line in tqdm(lines, desc="kernels", disable=None, leave=False):
        line.call()
        inner = max(1, min(1000, round(RUN_SECONDS / max(seconds_of(line.call), 1e-7))))
        seconds = summary(interleaved({"ours": lambda: seconds_of(line.call, inner)}, rounds)["ours"])  # noqa: B023
        # What fits a cache is held against reading as many bytes from that cache.
        bandwidth = machine.read_bandwidth if line.num_bytes > POOL_BYTES / 3 else limits.read_bandwidth(int(line.num_bytes), 3)
        least = max(line.num_bytes / bandwidth, line.operations / machine.flop_rate)
        results.append({"kernel": line.name, "case": line.case, "seconds": seconds, "limit_share": least / seconds["median"]})
    table(
        "the other kernels, float32 (limit: reading what they must from where it lies, or their multiply-adds)",
        ["kernel", "case", "ms", "of limit"],
        [[r["kernel"], r["case"], f"{r['seconds']['median'] * 1e3:.4f}", f"{r['limit_share']:.0%}"] for r in results],
    )
    return results


def attention_lines() -> list[Line]:
    """Decoding: batches over long contexts that no cache holds, and a short one that does. A prompt: 512 tokens at once."""
    ops = kernels.select("cpu")
    lines = []
    for queries, batch, context in ((1, 1, 128), (1, 8, 8192), (1, 1, 16_384), (512, 1, 512)):
        per_sequence = -(-context // 16)
        blocks = per_sequence * batch
        keys, values = torch.randn(blocks, KV_HEADS, 1, HEAD_DIM, 16), torch.randn(blocks, KV_HEADS, 16, HEAD_DIM)
        block_table = torch.arange(blocks, dtype=torch.int32).view(batch, per_sequence)
        q = torch.randn(batch * queries, HEADS, HEAD_DIM)
        start, lengths = torch.arange(batch + 1, dtype=torch.int32) * queries, torch.full((batch,), context, dtype=torch.int32)

        def call(arguments: tuple[Tensor, ...] = (q, keys, values, block_table, start, lengths)) -> object:
            return ops.paged_attention(*arguments, scale=HEAD_DIM**-0.5)

        seen = context if queries == 1 else (context + 1) / 2  # on average, of a query
        operations = 4 * batch * queries * HEADS * HEAD_DIM * seen
        lines.append(Line("paged_attention", f"batch {batch}, {queries} new of {context}", call, keys.nbytes + values.nbytes, operations))
    return lines


def elementwise_lines() -> list[Line]:
    ops = kernels.select("cpu")
    lines = []
    for rows in (1, 32, 512):
        x, gates, norm = torch.randn(rows, HIDDEN), torch.randn(rows, 2 * FFN), torch.ones(HIDDEN)
        qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        table_ = torch.randn(VOCAB, HIDDEN)
        tokens, places = torch.randint(0, VOCAB, (rows,), dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
        angles = torch.randn(rows, HEAD_DIM // 2)
        blocks = -(-rows // 16)
        caches = torch.zeros(blocks, KV_HEADS, 1, HEAD_DIM, 16), torch.zeros(blocks, KV_HEADS, 16, HEAD_DIM)
        case = f"{rows} rows"
        lines += [
            Line("rms_norm", case, lambda x=x, norm=norm: ops.rms_norm(x, norm, 1e-6), x.nbytes),
            Line("silu_mul", case, lambda gates=gates: ops.silu_mul(gates), gates.nbytes),
            Line(
                "rope_append", case,
                lambda qkv=qkv, places=places, angles=angles, caches=caches: ops.rope_append(
                    qkv, places, places, angles, angles, *caches, num_heads=HEADS
                ), qkv.nbytes,
            ),
            Line("embed", case, lambda tokens=tokens, table_=table_: ops.embed(tokens, table_), rows * HIDDEN * 4),
        ]  # fmt: skip
    return lines


def sampling_lines() -> list[Line]:
    """Logits in the cache, where the head has just written them."""
    ops = kernels.select("cpu")
    lines = []
    for rows in (1, 32):
        logits = torch.randn(rows, VOCAB) * 3
        ones, zeros, seeds = torch.ones(rows), torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
        for name, temperature, top_k in (("greedy", 0.0, 0), ("unfiltered", 1.0, 0), ("top-k 50", 1.0, 50)):
            given = (logits, ones * temperature, zeros + top_k, ones, ones * 0, seeds, zeros, zeros)

            def call(given: tuple[Tensor, ...] = given) -> object:
                return ops.sample(*given)

            lines.append(Line("sample", f"{rows} x {VOCAB}, {name}", call, logits.nbytes))
    logits, ones, zeros = torch.randn(4, VOCAB) * 3, torch.ones(4), torch.zeros(4, dtype=torch.int32)
    group, scores = torch.tensor([0, 4], dtype=torch.int32), torch.zeros(4)
    lines.append(Line("beam_select", f"4 x {VOCAB}", lambda: ops.beam_select(logits, scores, group, 8, ones, zeros, zeros), logits.nbytes))
    return lines


# ---- plot ----


def plot(results: dict[str, Any], out: Path) -> list[Path]:
    """Share of the limit of every format's product, by rows."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in results["linear"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4), constrained_layout=True, squeeze=False, sharey=True)
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        for format in FORMATS:
            points = [(r["rows"], r["limit_share"]) for r in results["linear"] if (r["n"], r["k"], r["format"]) == (n, k, format)]
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, label=format, ls="--" if format.endswith("in place") else "-")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("rows")
        axis.set_title(f"weights {n} x {k}")
        axis.axhline(1, color="black", lw=0.8, ls=":")
    axes[0, 0].set_ylabel("share of the limit (other than fp32: of reading alone)")
    axes[0, 0].set_ylim(0, 1.3)
    axes[0, 0].legend(fontsize=8)
    file = out.with_name(f"{out.stem}-linear.png")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
