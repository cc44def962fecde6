"""rope_append into int8 and float8 caches: what is stored against the definition, hostile values, and that nothing else is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import empty_caches, int8_tokens
from forward_cases import HOSTILE
from torch import Tensor

from engine.kernels import cpu, reference

FLOAT8 = torch.float8_e4m3fn
NUMBERS = torch.arange(127, dtype=torch.uint8).view(FLOAT8).double()  # those of float8 from 0 to 448, in order; NaN follows


@pytest.fixture(params=["reference", "cpu", "reference, float8"])
def case(request: pytest.FixtureRequest) -> tuple[Any, torch.dtype]:
    """A backend, and the dtype of the caches."""
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return cpu if request.param == "cpu" else reference, FLOAT8 if "float8" in request.param else torch.int8


def nearest(x: Tensor) -> int:
    """The byte of the number of float8 that is nearest to a float32 within 448, ties to the even byte."""
    distance = (NUMBERS - x.double().abs()).abs()
    nearest = (distance == distance.min()).nonzero().flatten().tolist()
    byte = min(nearest, key=lambda n: n % 2)
    return byte - 128 if x.signbit() else byte


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The contract, element by element; of float8 the bytes."""
    limit = 448 if dtype == FLOAT8 else 127
    integers, scales = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(x.shape[:-1])
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        token = x[tuple(index)]
        scale = token.abs().max() / limit if bool(token.isfinite().all()) else torch.tensor(torch.nan)
        scales[tuple(index)] = scale
        if scale > 0:
            q = [(e / scale).clamp(-limit, limit) for e in token]
            integers[tuple(index)] = torch.tensor([nearest(e) if dtype == FLOAT8 else int(e.round()) for e in q], dtype=torch.int8)
    return integers, scales


def append(case: Any, x: Tensor, slots: list[int], block_size: int, angles: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and caches after ``x [T, 3 * heads, D]``: queries, keys and values; by default nothing turns."""
    ops, dtype = case
    tokens, heads, head_dim = x.shape
    num_kv_heads = heads // 3
    key_cache, value_cache = empty_caches(4, num_kv_heads, block_size, head_dim, dtype)
    angles = torch.zeros(tokens, head_dim // 2) if angles is None else angles
    q = ops.rope_append(
        x.flatten(1), torch.arange(tokens, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), angles.cos(), angles.sin(),
        key_cache, value_cache, num_heads=num_kv_heads,
    )  # fmt: skip
    return q, key_cache, value_cache


def stored(cache: Tensor, is_key: bool, slots: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    integers, scales = int8_tokens(cache, is_key)
    block, offset = torch.tensor(slots) // block_size, torch.tensor(slots) % block_size
    return integers[block, offset // 16, offset % 16], scales[block, offset // 16, offset % 16]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("block_size", [16, 48])
def test_what_is_stored(case: Any, head_dim: int, block_size: int) -> None:
    x = torch.randn(7, 3 + 2 * 3, head_dim, generator=torch.Generator().manual_seed(head_dim))
    slots = torch.randperm(4 * block_size, generator=torch.Generator().manual_seed(1))[:7].tolist()
    q, key_cache, value_cache = append(case, x, slots, block_size)
    assert torch.equal(q, x[:, :3])
    assert_same(stored(key_cache, True, slots, block_size), quantised(x[:, 3:6], case[1]))
    assert_same(stored(value_cache, False, slots, block_size), quantised(x[:, 6:], case[1]))
    rest = [slot for slot in range(4 * block_size) if slot not in slots]
    for cache, is_key in ((key_cache, True), (value_cache, False)):
        integers, scales = stored(cache, is_key, rest, block_size)
        assert (integers == -1).all() and scales.isnan().all()


def test_turned_keys(case: Any) -> None:
    """The rotation is rounded before it is quantised: half a step of what is stored away from what float64 turns to."""
    angles = torch.rand(5, 32, generator=torch.Generator().manual_seed(2)) * 6
    x = torch.randn(5, 3 * 2, 64, generator=torch.Generator().manual_seed(3))
    _, key_cache, _ = append(case, x, list(range(5)), 16, angles)
    keys, turn = x[:, 2:4].double(), torch.polar(torch.ones(5, 1, 32, dtype=torch.double), angles.double()[:, None])
    turned = torch.complex(keys[..., :32], keys[..., 32:]) * turn
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    integers, scales = stored(key_cache, True, list(range(5)), 16)
    torch.testing.assert_close(scales, (exact.abs().amax(-1) / (448 if case[1] == FLOAT8 else 127)).float(), rtol=1e-6, atol=0)
    numbers, half_step = integers.float(), torch.full_like(exact, 0.5)
    if case[1] == FLOAT8:  # three bits behind the first; multiples of 2^-9 below 2^-6
        numbers, half_step = integers.view(FLOAT8).float(), ((exact / scales[..., None]).abs() * 2**-4).clamp(min=2**-10)
    assert ((numbers * scales[..., None] - exact).abs() <= 1.0002 * half_step * scales[..., None]).all()


@pytest.mark.parametrize("values_of", HOSTILE)
@pytest.mark.parametrize("place", [0, 7, 16])
def test_hostile_values(case: Any, values_of: str, place: int) -> None:
    values = torch.zeros(24)
    values[place : place + len(HOSTILE[values_of])] = torch.tensor(HOSTILE[values_of])[: 24 - place]
    x = torch.stack((torch.ones(24), values, torch.ones(24)))[:, None].repeat(1, 3, 1)  # a good token on either side
    _, key_cache, value_cache = append(case, x, [3, 4, 5], 16)
    assert_same(stored(value_cache, False, [3, 4, 5], 16), quantised(x[:, 2:], case[1]))
    if bool(values.isfinite().all()):  # else a rotation by nothing, inf * 0, is NaN elsewhere too
        assert_same(stored(key_cache, True, [3, 4, 5], 16), quantised(x[:, 1:2], case[1]))


def test_many_tokens(case: Any) -> None:
    """Shared out over threads, with slots of -1 in between, which change nothing for the others."""
    x = torch.randn(300, 3 * 2, 64, generator=torch.Generator().manual_seed(5)) * 10 ** torch.linspace(-20, 20, 300)[:, None, None]
    slots = [-1 if t % 3 == 1 else t for t in range(300)]
    _, key_cache, value_cache = append(case, x, slots, 80)
    kept = [t for t in slots if t >= 0]
    _, alone_keys, alone_values = append(case, x[kept], kept, 80)
    for cache, alone in ((key_cache, alone_keys), (value_cache, alone_values)):
        assert torch.equal(cache.view(torch.int8), alone.view(torch.int8))
    assert_same(stored(value_cache, False, kept[::10], 80), quantised(x[kept[::10], 4:], case[1]))


def test_attention_reads_what_is_stored() -> None:
    """The oracle over a float8 cache is the oracle over the numbers it stands for."""
    x = torch.randn(20, 3 * 2, 24, generator=torch.Generator().manual_seed(6))
    slots = [*range(32, 40), *range(16, 28)]
    _, *scaled = append((reference, FLOAT8), x, slots, 16)
    dense = empty_caches(4, 2, 16, 24, torch.float32)
    for cache, plain, is_key in zip(scaled, dense, (True, False), strict=True):
        numbers, scales = stored(cache, is_key, slots, 16)
        for slot, of_token in zip(slots, numbers.contiguous().view(FLOAT8).float() * scales[..., None], strict=True):
            (plain[slot // 16, :, 0, :, slot % 16] if is_key else plain[slot // 16, :, slot % 16]).copy_(of_token)
    q = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(7))
    table, start, context = (torch.tensor(t, dtype=torch.int32) for t in ([[1, 3], [2, 3]], [0, 1, 3], [12, 8]))
    out = reference.paged_attention(q, *scaled, table, start, context, scale=0.2)
    assert out.isfinite().all()
    assert torch.equal(out, reference.paged_attention(q, *dense, table, start, context, scale=0.2))
