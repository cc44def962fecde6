"""One process of several: ``ranks.py RANK SIZE FOLDER [gpu]``. Each prints what it found, as JSON, in its last line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from parallel.cases import PROMPTS, decoder, follow_cases, run_cases
from torch import Tensor

from engine import Decoder, Parallel

MODEL = "qwen3"


def sums(parallel: Parallel) -> dict[str, Any]:
    """Sums in order, of rows alone and among others; columns side by side, and what all have."""
    rank, size = parallel.rank, parallel.size
    terms = torch.randn(size, 7, 13, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(7)[:, None]
    expected = terms[0]
    for term in terms[1:]:
        expected = expected + term
    found: dict[str, Any] = {"sums": []}
    for rows in (slice(0, 7), slice(2, 3), slice(1, 6)):
        x = terms[rank, rows].clone()
        parallel.sum_(x, in_order=True)
        found["sums"].append(torch.equal(x, expected[rows]))
    x = terms[rank].clone()
    parallel.sum_(x, in_order=False)
    found["about"] = torch.allclose(x, expected)
    widths = [3, 1, 2][:size]
    columns = torch.arange(4.0 * sum(widths)).view(4, -1)
    side = parallel.gather_columns(columns.split(widths, dim=1)[rank].contiguous(), widths)
    found["columns"] = torch.equal(side, columns if rank == 0 else columns.split(widths, dim=1)[rank])
    found["all"] = [t.tolist() for t in parallel.all_gather(torch.tensor([rank, -rank]))]
    return found


def sums_on_gpu(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Sums, columns and tokens over NCCL, then the same in a CUDA graph that is replayed with other numbers."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size)
    parallel = Parallel()
    x = torch.zeros(5, 33, device="cuda")
    tokens = torch.zeros(5, dtype=torch.int64, device="cuda")

    def together() -> list[Tensor]:
        total, whole = x.clone(), x.clone()
        parallel.sum_(total, in_order=True)
        parallel.sum_(whole, in_order=False)
        given = tokens.clone()
        parallel.share(given)
        return [total, whole, parallel.gather_columns(x[:, : 3 + rank].contiguous(), [3, 4]), *parallel.all_gather(x), given]

    terms = [torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(seed)).cuda() for seed in range(3)]
    graph, right = None, []
    for i, (first, second) in enumerate(terms):
        x.copy_((first, second)[rank])
        tokens.fill_(10 * i + rank)
        if i == 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = together()
        if graph is None:
            results = together()
        else:
            graph.replay()
        columns = torch.cat([first[:, :3], second[:, :4]], dim=1) if rank == 0 else x[:, :4]
        expected = [first + second, first + second, columns, first, second, torch.full_like(tokens, 10 * i)]
        right += [torch.equal(a, b) for a, b in zip(results, expected, strict=True)]
    parallel.close()
    return {"right": right}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fails_later(model: Any, end: Callable[[], None]) -> None:
    """``end`` is called in the midst of the third step from now."""
    calls = 0
    op = model.ops.silu_mul

    def silu_mul(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            end()
        return op(x)

    model.ops = dataclasses.replace(model.ops, silu_mul=silu_mul)


def planned() -> None:
    raise ArithmeticError("as planned")


def leads(whole: Decoder) -> list[str]:
    """What becomes of requests in which something fails, and of those after."""
    outputs = whole.generate(PROMPTS, max_new_tokens=9, seed=1, ignore_eos=True)
    return [str(output.error) for output in outputs + whole.generate([1, 2], max_new_tokens=2)]


def main(rank: int, size: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    everybody = Parallel()
    found["sums"] = sums(everybody)
    everybody.close()
    two = dist.new_group([0, 1])
    if rank > 1:
        found["not of the group"] = error_of(lambda: Parallel(two))
        return found
    if rank == 0:
        found["cases"] = run_cases(folder, lambda: Parallel(two))
    else:
        follow_cases(folder, lambda: Parallel(two))

    parallel = Parallel(two)
    found["other blocks"] = error_of(lambda: decoder(folder, MODEL, parallel=parallel, block_size=16 if rank == 0 else 32))

    parallel = Parallel(two)
    own = decoder(folder, MODEL, parallel=parallel)
    found["taken"] = error_of(lambda: decoder(folder, MODEL, parallel=parallel))
    found["wrong rank"] = error_of(own.follow if rank == 0 else lambda: own.generate([1]))
    found["explain"] = error_of(own.explain)
    if rank == 1:
        fails_later(own.model, planned)
    found["follower fails"] = leads(own) if rank == 0 else error_of(own.follow)

    own = decoder(folder, MODEL, parallel=Parallel(two))
    if rank == 0:
        fails_later(own.model, planned)
    found["leader fails"] = leads(own) if rank == 0 else error_of(own.follow)

    own = decoder(folder, MODEL, parallel=Parallel(two))  # nobody closes it: it is closed when it is no more
    if rank == 0:
        found["collected"] = len(own.generate([1, 2], max_new_tokens=2)[0].token_ids)
        del own
    else:
        found["collected"] = error_of(own.follow)

    own = decoder(folder, MODEL, parallel=Parallel(two))
    if rank == 1:
        print(json.dumps(found), flush=True)
        fails_later(own.model, lambda: os._exit(0))
    found["follower dies"] = leads(own) if rank == 0 else error_of(own.follow)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = sums_on_gpu if sys.argv[4:] == ["gpu"] else main
    result = run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps(result), flush=True)
    dist.destroy_process_group()
