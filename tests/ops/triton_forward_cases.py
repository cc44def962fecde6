"""As a program, under TRITON_INTERPRET=1: the small ops of a forward in Triton's interpreter against the oracle; prints one JSON object,
group of cases -> what was run and what went wrong. In a process of its own: see ``triton_cases``."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton_cases
from attention_cases import empty_caches
from forward_cases import HOSTILE, rope_case, with_caches
from torch import Tensor
from triton_interpreter import exact_conversions

from engine.kernels import quantize, reference
from engine.kernels import triton as backend

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
FAR = 2**31 - 1


class Found:
    """What a group has compared."""

    def __init__(self) -> None:
        self.count = 0
        self.wrong: list[str] = []

    def same(self, name: str, got: Tensor, expected: Tensor) -> None:
        """To the bit, dtype and shape included."""
        self.count += 1
        if got.dtype != expected.dtype or got.shape != expected.shape or not torch.equal(bits(got), bits(expected)):
            self.wrong.append(name)

    def close(self, name: str, got: Tensor, expected: Tensor, rtol: float) -> None:
        self.count += 1
        if got.dtype != expected.dtype or not torch.allclose(got.float(), expected.float(), rtol=rtol, atol=1e-6, equal_nan=True):
            self.wrong.append(name)

    def report(self) -> dict[str, Any]:
        return {"rows": self.count, "wrong": self.wrong}


def bits(x: Tensor) -> Tensor:
    """The bytes, with one NaN for all."""
    if x.dtype.is_floating_point and x.dtype != torch.float8_e4m3fn:
        x = torch.where(x.isnan(), NAN, x)
    return x.flatten().view(torch.uint8) if x.numel() else torch.empty(0)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def within(t: Tensor) -> Tensor:
    """The same values in the middle of others, which may not be read for them nor written to."""
    flat = torch.full((t.numel() + 60,), -1, dtype=t.dtype)
    flat[29:-31] = t.flatten()
    return flat[29:-31].view(t.shape)


def embed() -> dict[str, Any]:
    """Any width; ids outside the vocabulary give NaN, and the others what they give without them."""
    found = Found()
    for dtype, width in itertools.product(FLOATS, (1, 7, 64, 1025)):
        table = randn(50, width, dtype=dtype)
        table[3, 0], table[4, 0] = 1e-40, INF
        for tokens in ((), (0,), (49, 0, 7, 7, 3, 4)):
            found.same(f"{dtype}, {width}, {tokens}", backend.embed(ids(*tokens), table), reference.embed(ids(*tokens), table))
        got = backend.embed(ids(7, -1, 50, -FAR - 1, FAR, 8), within(table))
        found.same(f"{dtype}, {width}, bad ids", got[[0, 5]], table[[7, 8]].float())
        found.same(f"{dtype}, {width}, rows of bad ids", got[1:5], torch.full((4, width), NAN))
    for form, width in itertools.product(("int8", "int4", "fp8"), (1, 31, 32, 65, 1030)):
        quantised = quantize(randn(50, width, seed=width), form)
        got = backend.embed(ids(49, 0, -1, 7, 50), quantised)
        found.same(f"{form}, {width}", got[[0, 1, 3]], reference.embed(ids(49, 0, 7), quantised))
        found.same(f"{form}, {width}, rows of bad ids", got[[2, 4]], torch.full((2, width), NAN))
    return found.report()


def norm() -> dict[str, Any]:
    """Any width and any pair of dtypes; bad rows are NaN and spoil no other; a row alone has the bits that it has in a batch."""
    found = Found()
    for i, (width, dtype) in enumerate(itertools.product((1, 7, 33, 1000, 4096), FLOATS)):
        weight = randn(width, seed=1, dtype=FLOATS[i // 2 % 3])
        x = randn(5, width, seed=2) * torch.tensor([1e-4, 1.0, 1e4, 0.0, 1.0])[:, None]
        got = backend.rms_norm(x, weight, 1e-5, dtype)
        found.close(f"{width}, {dtype}", got, reference.rms_norm(x, weight, 1e-5, dtype), {torch.float32: 3e-6}.get(dtype, 2**-7))
        found.same(f"{width}, {dtype}, alone", backend.rms_norm(x[1:2], weight, 1e-5, dtype)[0], got[1])
        found.same(f"{width}, {dtype}, no rows", backend.rms_norm(x[:0], weight, 1e-5, dtype), got[:0])
        x[0, -1], x[2, 0] = NAN, -INF
        bad = backend.rms_norm(x, weight, 1e-5, dtype)
        found.same(f"{width}, {dtype}, beside bad rows", bad[[1, 3, 4]], got[[1, 3, 4]])
        found.same(f"{width}, {dtype}, bad rows", bad[[0, 2]], reference.rms_norm(x[[0, 2]], weight, 1e-5, dtype))
    return found.report()


def silu() -> dict[str, Any]:
    found = Found()
    for dtype, width in itertools.product(FLOATS, (1, 7, 1024, 1025)):
        x = (randn(3, 2 * width, seed=3) * 6).to(dtype)
        got = backend.silu_mul(x)
        found.close(f"{dtype}, {width}", got, reference.silu_mul(x), 2e-6 if dtype == torch.float32 else 2**-7)
        found.same(f"{dtype}, {width}, alone", backend.silu_mul(x[1:2])[0], got[1])
        found.same(f"{dtype}, {width}, no rows", backend.silu_mul(x[:0]), got[:0])
    gate = torch.tensor([0.0, -0.0, 3e38, INF, -1e4, -3e38, NAN, -INF])
    extremes = torch.cat((gate, torch.ones(8)))[None]
    found.close("extremes", backend.silu_mul(extremes), reference.silu_mul(extremes), 1e-6)
    return found.report()


def feed() -> dict[str, Any]:
    found = Found()
    for size, drawn in itertools.product((0, 1, 256, 300), (0, 1, 40)):
        generator = torch.Generator().manual_seed(size + drawn)
        tokens = torch.randint(0, 99, (size,), generator=generator, dtype=torch.int32)
        source = torch.randint(-1, drawn, (size,), generator=generator, dtype=torch.int32) if drawn else torch.full((size,), -1).int()
        new = torch.randint(-1, 2**31 - 1, (drawn,), generator=generator)
        expected = tokens.clone()
        reference.feed_tokens(expected, source, new)
        larger = within(tokens)
        backend.feed_tokens(larger, within(source), within(new))
        found.same(f"{size} of {drawn}", larger, expected)
    tokens = within(ids(1, 2, 3, 4, 5, 6))
    backend.feed_tokens(tokens, ids(2, -1, -2, 3, FAR, -FAR - 1), torch.tensor([7, 8, 9]))
    found.same("bad sources", tokens, ids(9, 2, 3, 4, 5, 6))
    return found.report()


def rope_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dtype of activations and of caches, pairs side by side and apart, tables of all widths; 16 tokens and one more or less."""
    shapes = itertools.cycle(((1, 8, 8), (15, 16, 6), (16, 40, 40), (17, 24, 0), (3, 128, 64), (33, 32, 2), (0, 16, 16)))
    heads = itertools.cycle(((1, 1), (4, 2), (3, 1), (2, 2)))
    for i, (cache, activation, interleaved) in enumerate(itertools.product(CACHES, FLOATS, (False, True))):
        tokens, head_dim, rot = next(shapes)
        case = rope_case(tokens, next(heads), head_dim, rot, block_size=32 if i % 3 else 16, interleaved=interleaved)
        case["qkv"] = case["qkv"].to(activation)
        yield f"{cache}, {activation}, {'interleaved, ' * interleaved}{tokens} tokens of {head_dim}, rot {rot}", with_caches(case, cache)


def compare_rope(found: Found, name: str, case: dict[str, Any]) -> None:
    expected = {**case, "key_cache": case["key_cache"].clone(), "value_cache": case["value_cache"].clone()}
    found.same(name, backend.rope_append(**case), reference.rope_append(**expected))
    for cache in ("key_cache", "value_cache"):
        found.same(f"{name}: {cache}", case[cache], expected[cache])


def rope() -> dict[str, Any]:
    """Without norms every element is rounded as the oracle rounds it."""
    found = Found()
    for name, case in rope_cases():
        compare_rope(found, name, case)
    return found.report()


def rope_norms() -> dict[str, Any]:
    found = Found()
    for i, norm_dtype in enumerate(FLOATS):
        case = rope_case(17, (4, 2), (8, 40, 128)[i], (8, 20, 128)[i], norm=norm_dtype, interleaved=i == 1)
        expected = {**case, "key_cache": case["key_cache"].clone(), "value_cache": case["value_cache"].clone()}
        q = backend.rope_append(**case)
        found.close(f"{norm_dtype}: queries", q, reference.rope_append(**expected), 1e-5)
        found.close(f"{norm_dtype}: keys", case["key_cache"], expected["key_cache"], 1e-5)
        found.same(f"{norm_dtype}: values", case["value_cache"], expected["value_cache"])
        alone = rope_case(17, (4, 2), (8, 40, 128)[i], (8, 20, 128)[i], norm=norm_dtype, interleaved=i == 1)
        for row in (0, 15, 16):
            part = {name: alone[name][row : row + 1] for name in ("qkv", "positions", "slots")}
            found.same(f"{norm_dtype}: row {row} alone", backend.rope_append(**{**alone, **part})[0], q[row])
            slot = int(alone["slots"][row])
            if slot >= 0:
                block, offset = divmod(slot, 16)
                for cache in ("key_cache", "value_cache"):
                    place = (block, slice(None), offset) if cache == "value_cache" else (block, slice(None), 0, slice(None), offset)
                    found.same(f"{norm_dtype}: {cache} of row {row} alone", alone[cache][place], case[cache][place])
    return found.report()


def rope_hostile() -> dict[str, Any]:
    """Values that scales and roundings must be ready for; NaN, where it is not the same in all (inf * 0), is in the values only."""
    found = Found()
    for cache in CACHES:
        x = torch.zeros(len(HOSTILE), 3, 24)
        for row, values in enumerate(HOSTILE.values()):
            x[row, :, 7 : 7 + len(values)] = torch.tensor(values)[:17]
            x[row, :2] = torch.where(x[row, :2].isfinite(), x[row, :2], 0.0)
        case = rope_case(len(x), (1, 1), 24, 24) | {"qkv": x.flatten(1), "slots": torch.arange(len(x), dtype=torch.int32)}
        case["cos"], case["sin"] = torch.ones(60, 12), torch.zeros(60, 12)
        compare_rope(found, f"{cache}", with_caches(case, cache))
    return found.report()


def rope_ranges() -> dict[str, Any]:
    """Slots and positions out of range are not followed, and the other rows are what they are without them."""
    found = Found()
    for cache in CACHES:
        case = with_caches(rope_case(9, (2, 1), 16, 16), cache)
        case["slots"] = torch.arange(9, dtype=torch.int32) * 3
        clean = {**case, "key_cache": case["key_cache"].clone(), "value_cache": case["value_cache"].clone()}
        slots = len(case["value_cache"]) * 16
        case["slots"] = ids(0, slots, -2, -FAR - 1, FAR, 15, slots + 15, 21, 24)
        case["positions"] = case["positions"].clone()
        case["positions"][[1, 2, 3, 4]] = ids(-1, 60, FAR, -FAR - 1)
        clean["slots"] = torch.where(torch.isin(clean["slots"], case["slots"]), clean["slots"], -1)
        padding = torch.zeros(2, *case["key_cache"].shape[1:], dtype=cache), torch.zeros(2, *case["value_cache"].shape[1:], dtype=cache)
        for name, pad in zip(("key_cache", "value_cache"), padding, strict=True):
            larger = torch.cat([pad.view(torch.int8), case[name].view(torch.int8), pad.view(torch.int8)]).view(cache)
            case[name] = larger[2:-2]
            clean[f"{name} around"] = torch.cat([larger[:2].view(torch.int8), larger[-2:].view(torch.int8)])
            case[f"{name} around"] = larger
        got = backend.rope_append(**{name: value for name, value in case.items() if "around" not in name})
        expected = reference.rope_append(**{name: value for name, value in clean.items() if "around" not in name})
        good = [0, 5, 6, 7, 8]
        found.same(f"{cache}: queries", got[good], expected[good])
        for name in ("key_cache", "value_cache"):
            found.same(f"{cache}: {name}", case[name], clean[name])
            larger = case[f"{name} around"].view(torch.int8)
            found.same(f"{cache}: around {name}", torch.cat([larger[:2], larger[-2:]]), clean[f"{name} around"])
    return found.report()


def layers_of(cache: torch.dtype, block_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Caches of two layers, five blocks and three heads, every byte at random."""
    generator = torch.Generator().manual_seed(seed)
    caches = []
    for one in empty_caches(5, 3, block_size, 24, cache):
        raw = torch.randint(-128, 128, (2 + 2, *one.view(torch.int8).shape), generator=generator, dtype=torch.int8)
        caches.append(raw.view(cache)[1:3])  # the first and the last layer are not of the call
    return caches[0], caches[1]


def all_layers(cache: Tensor) -> Tensor:
    """The bytes of a cache of ``layers_of``, with those around it."""
    size = cache[0].numel()
    return cache.as_strided((4, size), (size, 1), cache.storage_offset() - size).view(torch.int8)


def copied(found: Found, name: str, op: str, cache: torch.dtype, block_size: int, given: list[int], to: list[int], good: list[int]) -> None:
    """Entries that are not ``good`` must copy nothing."""
    got, expected = layers_of(cache, block_size), layers_of(cache, block_size)
    getattr(backend, op)(*got, within(ids(*given)), within(ids(*to)))
    getattr(reference, op)(*expected, ids(*(given[i] for i in good)), ids(*(to[i] for i in good)))
    for ours, theirs in zip(got, expected, strict=True):
        found.same(f"{name}, {cache}, blocks of {block_size}", all_layers(ours), all_layers(theirs))


def move() -> dict[str, Any]:
    """Any slots, some of which others are read from, circles included; more than a program takes."""
    found = Found()
    for (i, cache), block_size in itertools.product(enumerate(CACHES), (16, 32)):
        generator = torch.Generator().manual_seed(i)
        slots = 5 * block_size
        count = (1, 15, 17, 40)[i]
        source = torch.randint(slots, (count,), generator=generator).tolist()
        copied(found, "random", "move_tokens", cache, block_size, source, torch.randperm(slots, generator=generator)[:count].tolist(),
               list(range(count)))  # fmt: skip
    for source, target in (([20, 22, 23, 40], [19, 20, 22, 23]), ([19, 20, 22], [20, 22, 40]), ([1, 2, 3], [2, 3, 1]), ([], [])):
        copied(found, f"{source}", "move_tokens", torch.bfloat16, 16, source, target, list(range(len(source))))
    for cache in CACHES:
        source, target = [3, -1, 80, -FAR - 1, FAR, 5, 6, 7], [4, 9, 10, 11, 12, -1, 80, FAR]
        copied(found, "bad slots", "move_tokens", cache, 16, source, target, [0])
    return found.report()


def copy() -> dict[str, Any]:
    found = Found()
    for cache, block_size in itertools.product(CACHES, (16, 32, 128)):
        copied(found, "blocks", "copy_blocks", cache, block_size, [0, 0, 2], [3, 1, 4], [0, 1, 2])
        copied(found, "none", "copy_blocks", cache, block_size, [], [], [])
        source, target = [1, -1, 5, -FAR - 1, FAR, 0, 0, 0], [4, 2, 3, 2, 3, -1, 5, FAR]
        copied(found, "bad blocks", "copy_blocks", cache, block_size, source, target, [0])
    return found.report()


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "embed": embed,
    "norm": norm,
    "silu": silu,
    "feed": feed,
    "rope": rope,
    "rope_norms": rope_norms,
    "rope_hostile": rope_hostile,
    "rope_ranges": rope_ranges,
    "move": move,
    "copy": copy,
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's about inf and NaN
    triton_cases.patch_once()
    exact_conversions()
    torch.set_num_threads(1)
    print(json.dumps({name: GROUPS[name]() for name in sys.argv[1:] or GROUPS}))
