"""Single tokens moved within the cache: where their keys and values end up, and that nothing else changes."""

from __future__ import annotations

import random

import pytest
import torch

from engine import kernels
from engine.kv_cache import KVCache


@pytest.fixture(params=["cpu", "reference"])
def ops(request: pytest.FixtureRequest) -> kernels.Ops:
    if (reason := kernels.backends("cpu")[request.param]) is not None:
        pytest.skip(reason)
    return kernels.select("cpu", request.param)


def numbered(block_size: int, dtype: torch.dtype = torch.float32) -> KVCache:
    """Every slot, layer, head and lane with values of its own."""
    cache = KVCache(2, 3, 8, num_blocks=5, block_size=block_size, dtype=dtype)
    for layer in range(2):
        for tensor, base in ((cache.key(layer), 1), (cache.value(layer), -1)):
            tensor.copy_((base * (torch.arange(tensor.numel()) + 10_000 * layer + 1)).view(tensor.shape).to(dtype))
    return cache


def by_slot(cache: KVCache, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as ``[layer, slot, kv head, head_dim]``, read from the layouts that kernels/api.py states."""
    keys = torch.stack([cache.key(layer) for layer in range(2)])  # [layer, block, head, sub-block, head_dim, 16]
    values = torch.stack([cache.value(layer) for layer in range(2)])  # [layer, block, head, token, head_dim]
    return keys.permute(0, 1, 3, 5, 2, 4).reshape(2, 5 * block_size, 3, 8), values.permute(0, 1, 3, 2, 4).reshape(2, 5 * block_size, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_move_between_any_slots(ops: kernels.Ops, block_size: int, dtype: torch.dtype, seed: int):
    rng = random.Random(seed)
    cache = numbered(block_size, dtype)
    before = by_slot(cache, block_size)
    count = rng.randint(1, 40)
    sources = [rng.randrange(5 * block_size) for _ in range(count)]
    targets = rng.sample(range(5 * block_size), count)  # some of which others are read from
    cache.move_tokens(ops, sources, targets)
    for old, new in zip(before, by_slot(cache, block_size), strict=True):
        expected = old.clone()
        expected[:, targets] = old[:, sources]
        assert torch.equal(new, expected)


def test_overlapping_moves_read_everything_first(ops: kernels.Ops):
    """A path that is compacted: each token goes to where another of the path may still have been; and one that turns in a circle."""
    for sources, targets in (([20, 22, 23, 40], [19, 20, 22, 23]), ([19, 20, 22], [20, 22, 40]), ([1, 2, 3], [2, 3, 1])):
        cache = numbered(16)
        old = by_slot(cache, 16)
        cache.move_tokens(ops, sources, targets)
        for was, now in zip(old, by_slot(cache, 16), strict=True):
            assert torch.equal(now[:, targets], was[:, sources])
            rest = [slot for slot in range(80) if slot not in targets]
            assert torch.equal(now[:, rest], was[:, rest])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"source": [80]}, ValueError, "source"),
        ({"target": [-1]}, ValueError, "target"),
        ({"target": [1, 2]}, ValueError, "target"),
        ({"source": torch.tensor([1])}, TypeError, "source"),
        ({"value_cache": torch.zeros(1, 5, 3, 16, 8)}, ValueError, "layers"),
        ({"key_cache": torch.zeros(2, 5, 3, 1, 8, 8)}, ValueError, "key_cache"),
    ],
)
def test_wrong_arguments_are_named(ops: kernels.Ops, change: dict, error: type[Exception], named: str):
    good = {"key_cache": torch.zeros(2, 5, 3, 1, 8, 16), "value_cache": torch.zeros(2, 5, 3, 16, 8), "source": [1], "target": [2]}
    arguments = [torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for v in (good | change).values()]
    with pytest.raises(error, match=named):
        ops.move_tokens(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 48])
def test_blocks_are_copied_whole_in_every_layer(block_size: int, dtype: torch.dtype):
    cache = numbered(block_size, dtype)
    before = by_slot(cache, block_size)
    cache.copy_blocks([])
    cache.copy_blocks([(0, 3), (0, 1), (2, 4)])
    for old, new in zip(before, by_slot(cache, block_size), strict=True):
        expected = old.unflatten(1, (5, block_size))[:, [0, 0, 2, 0, 2]].flatten(1, 2)
        assert torch.equal(new, expected)
