"""As a program, under TRITON_INTERPRET=1: ``sample_head`` in Triton's interpreter against the oracle's draw from the logits of Triton's
``linear``; prints one JSON object, group of cases -> what was run and what went wrong. In a process of its own: see ``triton_cases``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import head_cases
import torch
import triton_cases
import triton_interpreter
from torch import Tensor

from engine.kernels import STATUS_BAD_PARAMETER, HeadDraw, merge_draws, quantize, quantized
from engine.kernels import triton as backend
from engine.kernels.triton import head_kernels, linear_launch

INF, NAN = float("inf"), float("nan")


def logits_of(x: Tensor, head: Any) -> Tensor:
    return backend.linear(x, [head], out=torch.empty(len(x), head.shape[0]))


def hostile() -> dict[str, Any]:
    """Ties, infinities, NaN, subnormal and huge logits: over three tiles, and in shards that begin anywhere."""
    wrong, rows = [], 0
    for i, (name, x, head, given) in enumerate(head_cases.hostile_cases([129])):
        want = head_cases.sampled(head.T.expand(len(x), -1), given)  # a product with 1
        for pieces in (1, 3) if i % 8 == 0 else (1,):
            draws = head_cases.shards(backend.sample_head, (name, x, head, given), pieces)
            wrong += head_cases.differences(f"{name}, {pieces} shards", merge_draws(draws[::-1]), want)
            rows += len(x)
    return {"rows": rows, "wrong": wrong}


def products() -> dict[str, Any]:
    """Tokens of ``linear`` and ``sample`` to the bit: every dtype; K in one piece and in segments; rows of two tiles."""
    wrong, rows = [], 0
    segmented = [(3, 600, 131)]
    cases = [*head_cases.products(segmented, [torch.float32, torch.float16])]
    cases += head_cases.products([(1, 40, 70), (70, 24, 100), *segmented], [torch.bfloat16])
    for name, x, head, given in cases:
        assert (linear_launch.tiling(*head.shape, "float", x.dtype).segments > 1) == (x.shape[1] == 600)
        wrong += head_cases.against_sample(backend.sample_head, (name, x, head, given), backend.linear, [1])
        rows += len(x)
    ((name, x, head, given),) = head_cases.products([(3, 40, 70)], [torch.float32])
    wide = torch.cat([x, torch.full_like(x, NAN)], dim=1)[:, : x.shape[1]]  # rows apart, a head of another dtype than x
    result = merge_draws([backend.sample_head(wide, head.bfloat16(), **given)])
    wrong += head_cases.differences("strides", result, head_cases.sampled(logits_of(x, head.bfloat16()), given))
    return {"rows": rows, "wrong": wrong}


def formats() -> dict[str, Any]:
    """Quantised heads."""
    wrong, rows = [], 0
    for format in quantized.FORMATS:
        ((_, x, head, given),) = head_cases.products([(4, 130, 70)], [torch.bfloat16])
        wrong += head_cases.against_sample(backend.sample_head, (format, x, quantize(head, format), given), backend.linear, [1])
        rows += len(x)
    return {"rows": rows, "wrong": wrong}


def shards() -> dict[str, Any]:
    """Two shards of 67 tokens and more, of which the second begins in the middle of a Philox block; and tokens whose words have tails."""
    wrong, rows = [], 0
    for case in head_cases.products([(4, 24, 135)], [torch.bfloat16]):
        name, x, head, given = case
        result = merge_draws(head_cases.shards(backend.sample_head, case, 2))
        wrong += head_cases.differences(name, result, head_cases.sampled(logits_of(x, head), given))
        rows += len(x)
    rare = [(14677, 1659), (16242, 722), (26827, 612)]  # position, token: words below 256 of seed 2024 and stream 0
    given = {"temperature": torch.ones(3), "seed": torch.full((3,), 2024), "stream": torch.zeros(3).int()}
    given["position"] = torch.tensor([position for position, _ in rare]).int()
    for r, (_, token) in enumerate(rare):
        for first in (token // 4 * 4 - 8, token - 1):
            head = torch.zeros(20, 1)
            head[token - first] = -6.0
            drawn = backend.sample_head(torch.ones(3, 1), head, **given, first_token=first).tokens[r]
            if drawn != token:
                wrong.append(f"token {token} from {first} on: {drawn} was drawn")
    return {"rows": rows, "wrong": wrong}


def alone() -> dict[str, Any]:
    """A row has the same bits in every place and batch."""
    wrong = []
    ((_, x, head, given),) = head_cases.products([(67, 24, 100)], [torch.bfloat16])
    together = backend.sample_head(x, head, **given)
    for rows in (range(1), range(13, 14), range(63, 67)):
        index = torch.tensor(list(rows))
        mine = {key: value[index] for key, value in given.items()}
        for field, a, b in zip(HeadDraw._fields, backend.sample_head(x[index], head, **mine), together, strict=True):
            if not torch.equal(a, b[..., index]):
                wrong.append(f"rows {rows}: {field} is {a.tolist()}, not {b[..., index].tolist()}")
    return {"rows": 70, "wrong": wrong}


def bad_temperatures() -> dict[str, Any]:
    """They give their row a status and leave the others as they are."""
    temperature = torch.tensor([1.0, -1e-9, INF, 0.0, NAN, -INF, 0.5])
    ((_, _, head, given),) = head_cases.products([(7, 1, 70)], [torch.float32])
    x = torch.ones(7, 1)
    bad = torch.tensor([False, True, True, False, True, True, False])
    head[5] = INF
    wrong = []
    result = backend.sample_head(x, head, **{**given, "temperature": temperature})
    if (result.status == STATUS_BAD_PARAMETER).tolist() != bad.tolist() or (result.tokens == -1).tolist() != bad.tolist():
        wrong.append(f"status is {result.status.tolist()}, tokens are {result.tokens.tolist()}")
    good = {key: value[~bad] for key, value in {**given, "temperature": temperature}.items()}
    alone = backend.sample_head(x[~bad], head, **good)
    wrong += [field for field, a, b in zip(HeadDraw._fields, alone, result, strict=True) if not torch.equal(a, b[..., ~bad])]
    return {"rows": 7, "wrong": wrong}


def many_tiles() -> dict[str, Any]:
    """``head_merge`` of more tiles than it looks at in one go: ties far apart, and NaN, infinities and nothing in the last."""
    rows, tiles, block, first_token = 6, 2 * 1024 + 5, 4, 1000
    generator = torch.Generator().manual_seed(2)
    largest = torch.randn(rows, tiles, generator=generator) * 2
    scores, logits = largest + 1, largest - 0.5
    tokens = (first_token + torch.arange(tiles) * block + 3).int().repeat(rows, 1)
    mass = 1 + torch.rand(rows, tiles, generator=generator)
    scores[0, [1500, 2048]] = 50.0
    largest[1, -1] = NAN
    scores[2, -1] = largest[2, -1] = logits[2, -1] = INF
    scores[3] = largest[3] = -INF
    scores[4, :-1] = largest[4, :-1] = -INF
    temperature = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 0.5])
    of_tiles = {"tile_scores": scores, "tile_tokens": tokens, "tile_logits": logits, "tile_largest": largest, "tile_mass": mass}
    of_tiles["tile_scaled_mass"] = mass.sqrt()
    got = HeadDraw(
        torch.empty(rows, dtype=torch.int64), torch.empty(rows).int(), torch.empty(rows), torch.empty(2, rows), torch.empty(2, rows),
        torch.empty(2, rows),
    )  # fmt: skip
    head_kernels.head_merge[(rows,)](
        rows=rows, first_token=first_token, temperature=temperature, **of_tiles, tiles=tiles, **got._asdict(), BLOCK_N=block
    )
    wrong = []
    winners = [1500, -1, tiles - 1, -1, tiles - 1, int(scores[5].argmax())]
    if got.tokens.tolist() != [-1 if tile < 0 else first_token + tile * block + 3 for tile in winners]:
        wrong.append(f"tokens are {got.tokens.tolist()}")
    if got.status.tolist() != [0, 1, 0, 2, 0, 0]:
        wrong.append(f"status is {got.status.tolist()}")
    for i, masses in enumerate((mass, mass.sqrt())):
        divisor = torch.where(temperature < 1e-5, 1.0, temperature)[:, None] if i else torch.ones(rows, 1)
        z, at = largest.double() / divisor, torch.tensor(winners).clamp(min=0)[:, None]
        most = z.amax(dim=1, keepdim=True)
        total = (torch.where(z == most, 1.0, (z - most).exp()) * masses).sum(dim=1)
        chosen = logits.double().gather(1, at)[:, 0] / divisor[:, 0]
        logprob = torch.where(chosen == most[:, 0], 0.0, chosen - most[:, 0]) - total.log()
        for r in (0, 2, 4, 5):
            values = {"logprobs": logprob, "largest": most[:, 0], "mass": total}
            for field, want in values.items():
                if not torch.isclose(getattr(got, field)[i, r].double(), want[r], rtol=2e-6, atol=4e-6):
                    wrong.append(f"{field}[{i}, {r}] is {getattr(got, field)[i, r]}, not {want[r]}")
    return {"rows": rows, "wrong": wrong}


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "hostile": hostile,
    "products": products,
    "formats": formats,
    "shards": shards,
    "alone": alone,
    "bad_temperatures": bad_temperatures,
    "many_tiles": many_tiles,
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's about -inf and NaN
    triton_cases.patch_once()
    triton_interpreter.exact_conversions()
    triton_interpreter.exact_products()
    triton_interpreter.bounds_of_loops()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
