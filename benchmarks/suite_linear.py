"""`linear` at 1 to 512 rows, beside `torch.nn.functional.linear` and the roofline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Machine, interleaved, seconds_of, summary, table
from tqdm import tqdm

from engine import kernels

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
SHAPES = ((8192, 2048), (4096, 768))  # [N, K]
# Weights are walked through in turn, more of them than any cache holds, as the layers of a model are.
POOL_BYTES = 192 << 20


def run(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    ops = kernels.select("cpu")
    rounds = 3 if quick else 9
    shapes = SHAPES[:1] if quick else SHAPES
    results = []
    cases = [(n, k, dtype, rows) for n, k in shapes for dtype in (torch.float32, torch.bfloat16) for rows in ROWS]
    with tqdm(total=2 * rounds * len(cases), desc="linear", disable=None, leave=False) as progress:
        for n, k, dtype, rows in cases:
            matrices = max(2, POOL_BYTES // (n * k * dtype.itemsize))
            weights = [torch.randn(n, k).to(dtype) for _ in range(matrices)]
            # A run passes over as many matrices as take about 30 ms, and goes on from there the next time.
            least = machine.seconds(n * k * dtype.itemsize, 2 * rows * n * k)
            x = torch.randn(rows, k)
            x_torch = x.to(dtype)  # torch multiplies in the weights' dtype; ours keeps float32 activations

            def timed(product: Callable[[torch.Tensor], object], pool: list[torch.Tensor], seconds: float) -> Callable[[], float]:
                inner, at = max(1, min(len(pool), round(0.03 / seconds))), 0

                def one() -> float:
                    nonlocal at
                    chosen = [pool[(at + i) % len(pool)] for i in range(inner)]
                    at += inner
                    product(pool[at % len(pool)])  # wakes the threads
                    return seconds_of(lambda: [product(w) for w in chosen]) / inner

                return one

            def ours(w: torch.Tensor, x: torch.Tensor = x) -> object:
                return ops.linear(x, (w,))

            def torchs(w: torch.Tensor, x: torch.Tensor = x_torch) -> object:
                return torch.nn.functional.linear(x, w)

            times = interleaved({"ours": timed(ours, weights, least), "torch": timed(torchs, weights, least)}, rounds, progress)
            mine, theirs = summary(times["ours"]), summary(times["torch"])
            results.append(
                {
                    "n": n, "k": k, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "seconds": mine, "torch_seconds": theirs,
                    "bandwidth_share": n * k * dtype.itemsize / mine["median"] / machine.read_bandwidth,
                    "flop_share": 2 * rows * n * k / mine["median"] / machine.flop_rate,
                    "limit_share": least / mine["median"],
                    "torch_ratio": theirs["median"] / mine["median"],
                }
            )  # fmt: skip
    one = {(r["n"], r["dtype"]): r["seconds"]["median"] for r in results if r["rows"] == 1}
    table(
        "linear: share of the machine's limit (the larger of reading the weights and doing the operations)",
        ["weights", "rows", "ms", "x 1 row", "bandwidth", "flops", "of limit", "x torch"],
        [
            [
                f"{r['n']}x{r['k']} {r['dtype']}",
                str(r["rows"]),
                f"{r['seconds']['median'] * 1e3:.3f}",
                f"{r['seconds']['median'] / one[r['n'], r['dtype']]:.2f}",
                f"{r['bandwidth_share']:.0%}",
                f"{r['flop_share']:.0%}",
                f"{r['limit_share']:.0%}",
                f"{r['torch_ratio']:.2f}",
            ]
            for r in results
        ],
    )
    return results
