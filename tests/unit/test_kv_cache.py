"""The cache's bytes; blocks copied and single tokens moved within it: where keys and values end up, and that nothing else changes."""

from __future__ import annotations

import random

import pytest
import torch

from engine import kernels
from engine.kv_cache import KVCache, available_memory, block_bytes, size_cache

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


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
            tensor.copy_((base * (torch.arange(tensor.numel()) + 10_000 * layer + 1)).view(tensor.shape).to(dtype))  # int8 wraps around
    return cache


def by_slot(cache: KVCache, block_size: int) -> tuple[torch.Tensor, ...]:
    """Keys and values as ``[layer, slot, kv head, head_dim]``, read from the layouts that kernels/api.py states; then scales as bytes."""
    keys = torch.stack([cache.key(layer) for layer in range(2)])  # [layer, block, head, sub-block, head_dim, 16]
    values = torch.stack([cache.value(layer) for layer in range(2)])  # [layer, block, head, token, head_dim]
    if cache.dtype == torch.int8:  # [layer, block, head, sub-block, 16 * head_dim + 16 * 4]
        parts = []
        for is_key, tensor in ((True, keys), (False, values)):
            elements, scales = tensor.flatten(-2).split((8 * 16, 4 * 16), dim=-1)
            elements = elements.unflatten(-1, (8, 16)).mT if is_key else elements.unflatten(-1, (16, 8))
            parts += [elements, scales.unflatten(-1, (16, 4))]
        return tuple(part.permute(0, 1, 3, 4, 2, 5).reshape(2, 5 * block_size, 3, -1) for part in parts)
    return keys.permute(0, 1, 3, 5, 2, 4).reshape(2, 5 * block_size, 3, 8), values.permute(0, 1, 3, 2, 4).reshape(2, 5 * block_size, 3, 8)


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize(("dtype", "of_a_token"), [(torch.float32, 2 * 8 * 4), (torch.bfloat16, 2 * 8 * 2), (torch.int8, 2 * (8 + 4))])
def test_bytes(dtype: torch.dtype, of_a_token: int):
    cache = KVCache(2, 3, 8, num_blocks=5, block_size=48, dtype=dtype)
    assert cache.num_bytes == 5 * block_bytes(2, 3, 8, 48, dtype) == 5 * 48 * 2 * 3 * of_a_token
    assert cache.dtype == dtype


def test_a_dtype_that_is_not_served():
    with pytest.raises(ValueError, match=r"kv_dtype is torch.float16; the cache can hold torch.float32, torch.bfloat16 or torch.int8"):
        KVCache(2, 3, 8, num_blocks=5, block_size=16, dtype=torch.float16)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 48])
def test_blocks_are_copied_whole_in_every_layer(ops: kernels.Ops, block_size: int, dtype: torch.dtype):
    cache = numbered(block_size, dtype)
    before = by_slot(cache, block_size)
    cache.copy_blocks(ops, [])
    cache.copy_blocks(ops, [(0, 3), (0, 1), (2, 4)])
    for old, new in zip(before, by_slot(cache, block_size), strict=True):
        expected = old.unflatten(1, (5, block_size))[:, [0, 0, 2, 0, 2]].flatten(1, 2)
        assert torch.equal(new, expected)


@pytest.mark.parametrize("seed", range(10))
def test_blocks_are_copied_one_after_the_other(ops: kernels.Ops, seed: int):
    """Also where a copy reads or writes what one before it has written, or writes what one before it has read."""
    rng = random.Random(seed)
    copies = [tuple(rng.sample(range(5), 2)) for _ in range(rng.randint(2, 12))]
    if seed == 0:
        copies = [(1, 3), (4, 1), (3, 4), (0, 4)]
    cache = numbered(16)
    holds = list(range(5))
    before = by_slot(cache, 16)
    cache.copy_blocks(ops, copies)
    for source, target in copies:
        holds[target] = holds[source]
    for old, new in zip(before, by_slot(cache, 16), strict=True):
        assert torch.equal(new, old.unflatten(1, (5, 16))[:, holds].flatten(1, 2))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([5], [0], r"source must hold values in \[0, 5\), got 5"),
        ([0], [-1], r"target must hold values in \[0, 5\), got -1"),
        ([0, 1], [2, 2], "target must hold distinct blocks that are not in source, got 2 at 1"),
        ([0, 1], [2, 0], "target must hold distinct blocks that are not in source, got 0 at 1"),
        ([0, 1], [2], "target"),
    ],
)
def test_copies_that_cannot_be(ops: kernels.Ops, source: list[int], target: list[int], message: str):
    caches = torch.zeros(2, 5, 3, 1, 8, 16), torch.zeros(2, 5, 3, 16, 8)
    with pytest.raises(ValueError, match=message):
        ops.copy_blocks(*caches, torch.tensor(source, dtype=torch.int32), torch.tensor(target, dtype=torch.int32))


def test_tokens_that_were_drawn_are_fed(ops: kernels.Ops):
    tokens, drawn = torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([7, 8])
    ops.feed_tokens(tokens, torch.tensor([-1, 1, 0, 1], dtype=torch.int32), drawn)
    assert tokens.tolist() == [1, 8, 7, 8]
    ops.feed_tokens(tokens, torch.full((4,), -1, dtype=torch.int32), drawn[:0])
    assert tokens.tolist() == [1, 8, 7, 8]
    for source, error, message in (
        ([0, 2, 0, 0], ValueError, r"source must hold values in \[-1, 2\), got 2"),
        ([0, -2, 0, 0], ValueError, r"source must hold values in \[-1, 2\), got -2"),
        ([0], ValueError, r"source must have shape \[T\] = \(4,\), got \(1,\)"),
    ):
        with pytest.raises(error, match=message):
            ops.feed_tokens(tokens, torch.tensor(source, dtype=torch.int32), drawn)
    with pytest.raises(TypeError, match="drawn must be int64"):
        ops.feed_tokens(tokens, tokens, drawn.int())


def test_float8_is_for_gpus():
    with pytest.raises(ValueError, match="kv_dtype is torch.float8_e4m3fn, which is for GPUs; on a CPU torch.int8 takes the same memory"):
        KVCache(2, 3, 8, num_blocks=5, block_size=16, dtype=torch.float8_e4m3fn)
    cache = KVCache(2, 3, 8, num_blocks=5, block_size=48, dtype=torch.float8_e4m3fn, device="meta")
    assert cache.num_bytes == 5 * block_bytes(2, 3, 8, 48, cache.dtype) == 5 * 48 * 2 * 3 * 2 * (8 + 4)
    assert cache.key(1).shape == cache.value(1).shape == (5, 3, 3, 12, 16)


def test_the_cpus_kernels_refuse_float8():
    cpu = pytest.importorskip("engine.kernels.cpu")
    if cpu.unavailable("cpu") is not None:
        pytest.skip(cpu.unavailable("cpu"))
    caches = [torch.zeros(2, 1, 1, 12, 16).to(torch.float8_e4m3fn) for _ in range(2)]
    ids, table = torch.zeros(1, dtype=torch.int32), torch.zeros(4, 4)
    message = "key_cache is torch.float8_e4m3fn, which is for GPUs; the C\\+\\+ kernels have float32, bfloat16 and int8"
    with pytest.raises(TypeError, match=message):
        cpu.rope_append(torch.zeros(1, 24), ids, ids, table, table, *caches, num_heads=1)
    with pytest.raises(TypeError, match=message):
        cpu.paged_attention(torch.zeros(1, 1, 8), *caches, ids[None], torch.tensor([0, 1], dtype=torch.int32), ids + 1, scale=1.0)


def test_the_cache_of_a_gpu_takes_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9_000, 20_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2_000)
    assert available_memory(torch.device("cuda")) == 10_000
    assert size_cache(None, 10**6, 16, 100, "cuda") == 85
    assert size_cache(None, 160, 16, 100, "cuda") == 10
    assert size_cache(1600, 0, 16, 100, "cuda") == 100
    with pytest.raises(MemoryError, match="cache_tokens is 1616, which takes 10100 bytes; 10000 are free, enough for 1600 tokens"):
        size_cache(1616, 0, 16, 100, "cuda")
    with pytest.raises(MemoryError, match="the cache may take 8500, 85% of what is free"):
        size_cache(None, 16, 16, 9000, "cuda")
