"""rope_append into an int8 cache: what is stored against the definition, hostile values, and that nothing else is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import empty_caches, int8_tokens
from torch import Tensor

from engine.kernels import cpu, reference


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return {"reference": reference, "cpu": cpu}[request.param]


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """The contract, element by element."""
    integers, scales = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(x.shape[:-1])
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
        token = x[tuple(index)]
        scale = token.abs().max() / 127 if bool(token.isfinite().all()) else torch.tensor(torch.nan)
        scales[tuple(index)] = scale
        if scale > 0:
            integers[tuple(index)] = torch.stack([(e / scale).clamp(-127, 127).round() for e in token]).to(torch.int8)
    return integers, scales


def append(ops: Any, x: Tensor, slots: list[int], block_size: int, angles: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and caches after ``x [T, 3 * heads, D]``: queries, keys and values; by default nothing turns."""
    tokens, heads, head_dim = x.shape
    num_kv_heads = heads // 3
    key_cache, value_cache = empty_caches(4, num_kv_heads, block_size, head_dim, torch.int8)
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
def test_what_is_stored(ops: Any, head_dim: int, block_size: int) -> None:
    x = torch.randn(7, 3 + 2 * 3, head_dim, generator=torch.Generator().manual_seed(head_dim))
    slots = torch.randperm(4 * block_size, generator=torch.Generator().manual_seed(1))[:7].tolist()
    q, key_cache, value_cache = append(ops, x, slots, block_size)
    assert torch.equal(q, x[:, :3])
    assert_same(stored(key_cache, True, slots, block_size), quantised(x[:, 3:6]))
    assert_same(stored(value_cache, False, slots, block_size), quantised(x[:, 6:]))
    rest = [slot for slot in range(4 * block_size) if slot not in slots]
    for cache, is_key in ((key_cache, True), (value_cache, False)):
        integers, scales = stored(cache, is_key, rest, block_size)
        assert (integers == -1).all() and scales.isnan().all()


def test_turned_keys(ops: Any) -> None:
    """The rotation is rounded before it is quantised: at most one step of the integers away from what float64 turns to."""
    angles = torch.rand(5, 32, generator=torch.Generator().manual_seed(2)) * 6
    x = torch.randn(5, 3 * 2, 64, generator=torch.Generator().manual_seed(3))
    _, key_cache, _ = append(ops, x, list(range(5)), 16, angles)
    keys, turn = x[:, 2:4].double(), torch.polar(torch.ones(5, 1, 32, dtype=torch.double), angles.double()[:, None])
    turned = torch.complex(keys[..., :32], keys[..., 32:]) * turn
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    integers, scales = stored(key_cache, True, list(range(5)), 16)
    torch.testing.assert_close(scales, (exact.abs().amax(-1) / 127).float(), rtol=1e-6, atol=0)
    assert ((integers * scales[..., None] - exact).abs() <= 0.5001 * scales[..., None]).all()


HOSTILE = {
    "zeros": [0.0, -0.0],
    "ties": [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5],
    "one": [3.0],
    "nan": [1.0, torch.nan],
    "inf": [1.0, torch.inf],
    "minus inf": [-torch.inf, 2.0],
    "nan first": [torch.nan, 1e30],
    "large": [3.4e38, -3.4e38, 1e37],
    "subnormal": [1e-40, -3e-41, 1e-45],
    "scale underflows": [1e-45, -7e-45],
    "coarse scale": [2e-43, -1.9e-43, 1.4e-45],
    "equal": [-1.0] * 24,
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("place", [0, 7, 16])
def test_hostile_values(ops: Any, case: str, place: int) -> None:
    values = torch.zeros(24)
    values[place : place + len(HOSTILE[case])] = torch.tensor(HOSTILE[case])[: 24 - place]
    x = torch.stack((torch.ones(24), values, torch.ones(24)))[:, None].repeat(1, 3, 1)  # a good token on either side
    _, key_cache, value_cache = append(ops, x, [3, 4, 5], 16)
    assert_same(stored(value_cache, False, [3, 4, 5], 16), quantised(x[:, 2:]))
    if bool(values.isfinite().all()):  # else a rotation by nothing, inf * 0, is NaN elsewhere too
        assert_same(stored(key_cache, True, [3, 4, 5], 16), quantised(x[:, 1:2]))


def test_many_tokens(ops: Any) -> None:
    """Shared out over threads, with slots of -1 in between, which change nothing for the others."""
    x = torch.randn(300, 3 * 2, 64, generator=torch.Generator().manual_seed(5)) * 10 ** torch.linspace(-20, 20, 300)[:, None, None]
    slots = [-1 if t % 3 == 1 else t for t in range(300)]
    _, key_cache, value_cache = append(ops, x, slots, 80)
    kept = [t for t in slots if t >= 0]
    _, alone_keys, alone_values = append(ops, x[kept], kept, 80)
    assert torch.equal(key_cache, alone_keys) and torch.equal(value_cache, alone_values)
    assert_same(stored(value_cache, False, kept[::10], 80), quantised(x[kept[::10], 4:]))
