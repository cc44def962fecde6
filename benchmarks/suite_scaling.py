"""How the cost of a step grows with threads, batch, context and vocabulary: one at a time, from the random model S at batch 1, context 128
and vocabulary 32,000. Ours alone. The limit beside each point is the time to read the weights, keys and values, and in float32 that of the
multiply-adds if it is longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import Machine, Setting, interleaved, summary, table
from ours import Engine
from random_models import random_llama
from tqdm import tqdm

import engine
from engine.kernels import limits
from engine.kv_cache import block_bytes

CONTEXT = 128
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 2048, 8192, 16_384)
VOCABS = (4096, 16_384, 32_000, 65_536, 131_072, 262_144)


def run(setting: Setting) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    every = slice(None, None, 3 if setting.quick else 1)
    for dtype in ("bf16",) if setting.quick else ("fp32", "bf16"):
        for axis, points in (
            ("threads", range(1, engine.get_num_threads() + 1)),
            ("batch", (1, 8, 32) if setting.quick else BATCHES),
            ("context", CONTEXTS[: 2 if setting.quick else None]),
            ("vocabulary", VOCABS[every]),
        ):
            for value in tqdm(points, desc=f"scaling, {dtype}, {axis}", disable=None, leave=False):
                results.append({"dtype": dtype, "axis": axis, "value": value, **point(setting, dtype, axis, value)})
    table(
        "a step of S by what it depends on",
        ["", "", "ms", "limit ms", "of limit"],
        [
            [
                f"{r['dtype']} {r['axis']}", str(r["value"]), f"{r['step_seconds']['median'] * 1e3:.2f}", f"{r['limit'] * 1e3:.2f}",
                f"{r['limit'] / r['step_seconds']['median']:.0%}",
            ]
            for r in results
        ],
    )  # fmt: skip
    return results


@contextmanager
def threads(n: int) -> Iterator[None]:
    """So many threads of the kernels' pool."""
    before = engine.get_num_threads()
    engine.set_num_threads(n)
    try:
        yield
    finally:
        engine.set_num_threads(before)


def point(setting: Setting, dtype: str, axis: str, value: int) -> dict[str, Any]:
    batch, context = value if axis == "batch" else 1, value if axis == "context" else CONTEXT
    new = 8 if setting.quick else 24
    changes = {"vocab_size": value} if axis == "vocabulary" else {}
    model = random_llama("S", max_position_embeddings=max(2048, context + 64), **changes)
    ours = Engine(model, dtype, max_batch=batch, cache_tokens=batch * (context + new + 32))
    vocab = ours.decoder.config.vocab_size
    prompts = torch.randint(3, vocab, (batch, context), generator=torch.Generator().manual_seed(1)).tolist()
    with threads(value if axis == "threads" else engine.get_num_threads()):
        # Fewer threads may reach less of the machine; what they read is measured in the same rounds.
        machine = Machine(1.0, limits.flop_rate(repeats=2)) if axis == "threads" else setting.machine
        ours.decode(prompts[:1], 3)
        # A long prompt takes much longer than the steps after it, so that a call has few steps and is not repeated often.
        rounds = 1 if setting.quick else 3
        times = interleaved({"ours": lambda: ours.decode(prompts, new).seconds / (new - 1), "read": machine.reader()}, rounds)
        machine = machine.during(times["read"])
    c = ours.decoder.config
    cached = batch * (context + new / 2) * block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, 1, ours.decoder.loop.cache.dtype)
    weights = ours.decoder.model.bytes_per_step
    # A machine may multiply 16-bit numbers faster than float32, and how fast is not measured.
    operations = 2 * batch * weights / 4 if dtype == "fp32" else 0
    return {"step_seconds": summary(times["ours"]), "limit": machine.seconds(weights + cached, operations)}


def plot(results: list[dict[str, Any]], out: Path) -> list[Path]:
    """A curve for each axis, with the limit dotted."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    axes_names = list(dict.fromkeys(r["axis"] for r in results))
    figure, axes = plt.subplots(1, len(axes_names), figsize=(4 * len(axes_names), 3.8), constrained_layout=True, squeeze=False)
    for axis, name in zip(axes[0], axes_names, strict=True):
        for i, dtype in enumerate(dict.fromkeys(r["dtype"] for r in results)):
            mine = [r for r in results if (r["axis"], r["dtype"]) == (name, dtype)]
            x = [r["value"] for r in mine]
            axis.plot(x, [r["step_seconds"]["median"] * 1e3 for r in mine], marker="o", ms=4, color=f"C{i}", label=dtype)
            axis.plot(x, [r["limit"] * 1e3 for r in mine], ls=":", color=f"C{i}", label=f"{dtype}, limit")
        if name != "threads":
            axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        values = [r["value"] for r in results if r["axis"] == name]
        axis.set_xticks(values, [f"{value // 1024}k" if value >= 4096 else str(value) for value in values])
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel(name)
    axes[0, 0].set_ylabel("ms of a step")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Random Llama S: the cost of a step")
    file = out.with_name(f"{out.stem}-scaling.png")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return [file]
