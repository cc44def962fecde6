"""The forward as one call: to the bit what ``Transformer`` computes op by op over the same backend, whatever the model, the step and the
weights' owner do; and what it refuses, it refuses before it writes anything."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import kernels
from engine.kernels import cpu, forward
from engine.kv_cache import KVCache
from engine.models import StepBatch, Transformer
from engine.models.config import ModelConfig
from engine.models.rope import RopeConfig
from engine.models.weights import LayerWeights, ModelWeights

pytestmark = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))

SIZE = 16
VOCABULARY = 77


@pytest.fixture(autouse=True)
def pool_as_before() -> Iterator[None]:
    before = cpu._cpu.num_threads()
    yield
    cpu._cpu.set_num_threads(before)


def config_of(**changes: Any) -> ModelConfig:
    options: dict[str, Any] = {
        "family": "test", "vocab_size": VOCABULARY, "hidden_size": 40, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "ffn_size": 52, "norm_eps": 1e-5, "max_position": 200, "rope": RopeConfig(theta=100.0, rotary_dim=16), "windows": (0, 0, 0),
    }  # fmt: skip
    return ModelConfig(**{**options, **changes})


def weights_of(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype | None = None,
    fused: bool = False,
    packed: str | None = None,
) -> ModelWeights:
    """Random tensors; ``fused``: qkv and gate_up as one matrix each; ``packed``: all matrices, in this format."""
    generator = torch.Generator().manual_seed(0)
    hidden, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def matrix(rows: int, columns: int) -> Any:
        weight = (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)
        return kernels.pack(weight, packed) if packed else weight

    def vector(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size, generator=generator)).to(norm_dtype or dtype)

    def matrices(rows: Sequence[int], columns: int) -> tuple[Any, ...]:
        return tuple(matrix(n, columns) for n in ([sum(rows)] if fused else rows))

    def biases(wanted: bool, of: Sequence[Any]) -> tuple[Tensor, ...] | None:
        return tuple(torch.randn(w.shape[0], generator=generator).to(dtype) for w in of) if wanted else None

    layers = []
    for _ in range(config.num_layers):
        qkv, out = matrices((queries, keys, keys), hidden), (matrix(hidden, queries),)
        gate_up, down = matrices((config.ffn_size, config.ffn_size), hidden), (matrix(hidden, config.ffn_size),)
        layers.append(
            LayerWeights(
                attention_norm=vector(hidden),
                qkv=qkv,
                qkv_bias=biases(config.qkv_bias, qkv),
                out=out,
                out_bias=biases(config.out_bias, out),
                q_norm=vector(config.head_dim) if config.qk_norm else None,
                k_norm=vector(config.head_dim) if config.qk_norm else None,
                ffn_norm=vector(hidden),
                gate_up=gate_up,
                gate_up_bias=biases(config.mlp_bias, gate_up),
                down=down,
                down_bias=biases(config.mlp_bias, down),
            )
        )
    embedding = matrix(VOCABULARY, hidden)
    return ModelWeights(embedding, tuple(layers), vector(hidden), embedding if config.tied_head else matrix(VOCABULARY, hidden))


def cache_of(config: ModelConfig, num_blocks: int = 40, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(config.num_layers, config.num_kv_heads, config.head_dim, num_blocks=num_blocks, block_size=SIZE, dtype=dtype)
    for layer in range(config.num_layers):
        cache.key(layer).fill_(float("nan"))
        cache.value(layer).fill_(float("nan"))
    return cache


def step_of(spans: Sequence[tuple[int, int]], rows: Sequence[int] | None = None, seed: int = 0) -> StepBatch:
    """A step that computes tokens ``start..end`` of sequence s for each span; sequence s owns every len(spans)-th block. The tokens and
    blocks of a sequence are the same in every step. ``rows``: default all."""
    sequences = len(spans)
    width = max(-(-end // SIZE) for _, end in spans)
    text = [torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(100 * seed + s)).tolist() for s in range(sequences)]
    tables = [[sequences * b + s for b in range(width)] for s in range(sequences)]
    positions = [p for start, end in spans for p in range(start, end)]
    starts = [0]
    for start, end in spans:
        starts.append(starts[-1] + end - start)
    slots = [tables[s][p // SIZE] * SIZE + p % SIZE for s, span in enumerate(spans) for p in range(*span)]
    return StepBatch(
        tokens=torch.tensor([text[s][p] for s, span in enumerate(spans) for p in range(*span)], dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([end for _, end in spans], dtype=torch.int32),
        block_table=torch.tensor(tables, dtype=torch.int32),
        logit_rows=torch.arange(len(positions)) if rows is None else torch.tensor(rows, dtype=torch.int64),
    )


# Prompts of unequal lengths, chunks over block edges, single tokens, several tokens behind a context.
SPANS = [
    [(0, 1), (0, 33), (0, 16)],
    [(1, 2), (33, 34), (16, 17)],
    [(2, 20), (34, 36), (17, 18)],
    [(20, 21), (36, 37), (18, 60)],
]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kv head": {"config": {"num_kv_heads": 1, "num_layers": 1, "windows": (0,)}},
    "tied, fused": {"config": {"tied_head": True}, "fused": True},
    "biases": {"config": {"qkv_bias": True, "out_bias": True, "mlp_bias": True}, "dtype": torch.bfloat16},
    "q and k norms": {"config": {"qk_norm": True, "num_kv_heads": 4}, "norm_dtype": torch.bfloat16},
    "interleaved, partly rotated": {"config": {"rope": RopeConfig(theta=50.0, rotary_dim=6, interleaved=True)}, "dtype": torch.float16},
    "windows": {"config": {"windows": (5, 0, 30)}, "dtype": torch.bfloat16, "norm_dtype": torch.float32},
    "windows everywhere": {"config": {"windows": (5, 17, 16)}},
    "heads wider than hidden": {"config": {"head_dim": 24, "rope": RopeConfig(theta=100.0, rotary_dim=24)}, "cache": torch.bfloat16},
    "packed": {"packed": "float32", "config": {"tied_head": True, "mlp_bias": True}},
    "packed bfloat16": {"packed": "bfloat16", "dtype": torch.bfloat16, "fused": True, "cache": torch.bfloat16},
    "int8": {"packed": "int8", "config": {"qkv_bias": True, "mlp_bias": True}, "dtype": torch.bfloat16},
    "gate and up in whole panels of one": {"packed": "float32", "config": {"ffn_size": 96, "mlp_bias": True}, "fused": True},
    "int8, likewise": {"packed": "int8", "config": {"ffn_size": 64}, "fused": True},
    "int4, likewise": {"packed": "int4", "config": {"ffn_size": 32, "mlp_bias": True}, "fused": True},
    "int4": {"packed": "int4", "config": {"qk_norm": True, "windows": (7, 0, 7)}},
}  # fmt: skip


def models_of(name: str) -> tuple[Transformer, Transformer, torch.dtype]:
    """A model that runs as one call, the same one op by op, and the cache's dtype."""
    case = dict(CASES[name])
    config = config_of(**case.pop("config", {}))
    cache_dtype = case.pop("cache", torch.float32)
    weights, ops = weights_of(config, **case), kernels.select("cpu", "cpu")
    wrapped = dataclasses.replace(ops, silu_mul=lambda x: ops.silu_mul(x))
    return Transformer(config, weights, ops), Transformer(config, weights, wrapped), cache_dtype


def equal_caches(config: ModelConfig, one: KVCache, other: KVCache) -> bool:
    pairs = [(getattr(one, part)(i), getattr(other, part)(i)) for i in range(config.num_layers) for part in ("key", "value")]
    return all(torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9)) for a, b in pairs)


def snapshot(config: ModelConfig, cache: KVCache) -> list[Tensor]:
    return [getattr(cache, part)(i).clone() for i in range(config.num_layers) for part in ("key", "value")]


@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_ops(name: str) -> None:
    model, plain, dtype = models_of(name)
    assert model._one_call is not None and plain._one_call is None
    caches = [cache_of(model.config, dtype=dtype) for _ in range(2)]
    for spans in SPANS:
        step = step_of(spans)
        expected = plain.forward_logits(step, caches[0])
        assert expected.isfinite().all()
        assert torch.equal(model.forward_logits(step, caches[1]), expected)
        assert equal_caches(model.config, caches[0], caches[1])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "packed" in case])
def test_many_rows(name: str) -> None:
    """More than the products take at a time, on several threads."""
    model, plain, dtype = models_of(name)
    cpu._cpu.set_num_threads(3)
    caches = [cache_of(model.config, dtype=dtype) for _ in range(2)]
    step = step_of([(0, 130), (0, 101), (0, 1)])
    assert torch.equal(model.forward_logits(step, caches[0]), plain.forward_logits(step, caches[1]))
    assert equal_caches(model.config, *caches)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_row_alone(threads: int) -> None:
    """A row has the bits that it has alone and on one thread. Sizes large enough to be shared out."""
    config = config_of(hidden_size=256, ffn_size=512, num_heads=8, head_dim=32, rope=RopeConfig(theta=100.0, rotary_dim=32))
    model = Transformer(config, weights_of(config), kernels.select("cpu", "cpu"))
    spans = [(0, 60), (0, 35), (0, 1)]
    cpu._cpu.set_num_threads(1)
    expected = model.forward_logits(step_of(spans), cache_of(config))
    cpu._cpu.set_num_threads(threads)
    for _ in range(5):
        assert torch.equal(model.forward_logits(step_of(spans), cache_of(config)), expected)
    cache, rows = cache_of(config), []
    for end in range(1, 61):  # the first sequence token by token; its blocks are those of a step of its own
        rows.append(model.forward_logits(step_of([(end - 1, end)]), cache))
    assert torch.equal(torch.cat(rows), expected[:60])


@pytest.mark.parametrize(
    "rows", [[], [0], [49], [0, 33, 49], [49, 3, 3, 17], list(range(49, -1, -1)), [*range(50), 49, 49], [5] * 80], ids=len
)
def test_rows_that_are_wanted(rows: list[int]) -> None:
    """Any rows, in any order, several times or never; the cache gets all tokens' keys and values."""
    model, plain, dtype = models_of("biases")
    caches = cache_of(model.config, dtype=dtype), cache_of(model.config, dtype=dtype)
    step = step_of(SPANS[0], rows)
    expected = plain.forward_logits(step_of(SPANS[0]), caches[0])
    logits = model.forward_logits(step, caches[1])
    assert logits.shape == (len(rows), VOCABULARY) and torch.equal(logits, expected[rows])
    assert torch.equal(plain.forward_logits(step, caches[0]), expected[rows])
    assert equal_caches(model.config, *caches)
    following = step_of(SPANS[1])
    assert torch.equal(model.forward_logits(following, caches[1]), plain.forward_logits(following, caches[0]))


def test_trees() -> None:
    """Drafts that are trees, beside a sequence without; windows that cut them."""
    for name in ("plain", "windows"):
        model, plain, dtype = models_of(name)
        caches = cache_of(model.config, dtype=dtype), cache_of(model.config, dtype=dtype)
        for m, cache in zip((model, plain), caches, strict=True):
            m.forward_logits(step_of([(0, 20), (0, 9)]), cache)
        step = step_of([(20, 25), (9, 10)])
        depths = [0, 1, 1, 2, 2]  # 0 -> 1, 2; 1 -> 3; 2 -> 4
        step = dataclasses.replace(
            step,
            positions=torch.tensor([20 + d for d in depths] + [9], dtype=torch.int32),
            tree_start=torch.tensor([20, -1], dtype=torch.int32),
            ancestors=torch.tensor([0b1, 0b11, 0b101, 0b1011, 0b10101, 0], dtype=torch.int64),
            logit_rows=torch.tensor([0, 3, 4, 5]),
        )
        assert torch.equal(model.forward_logits(step, caches[0]), plain.forward_logits(step, caches[1]))


def test_a_live_owner_changes_the_weights() -> None:
    """In place, by other storage, by another dtype and back: the next step sees it. Another shape is refused, until it is mended."""
    model, plain, _ = models_of("plain")
    step, cache = step_of(SPANS[0]), cache_of(model.config)
    seen = [model.forward_logits(step, cache)]

    def changed() -> bool:
        seen.append(model.forward_logits(step, cache))
        return torch.equal(seen[-1], plain.forward_logits(step, cache)) and not torch.equal(seen[-1], seen[-2])

    layer = model.weights.layers[1]
    layer.out[0].mul_(1.5)
    assert changed()
    layer.down[0].data = layer.down[0] * 0.5
    assert changed()
    layer.ffn_norm.data = layer.ffn_norm.to(torch.bfloat16) * 0.7
    assert changed()
    for w in layer.qkv:
        w.data = w.to(torch.bfloat16)
    assert changed()
    model.weights.head.data = model.weights.head.half()
    assert changed()
    good = layer.gate_up[0].data
    layer.gate_up[0].data = torch.zeros(52, 41)
    for m in (model, plain):
        with pytest.raises(ValueError, match=r"weights\[0\] must have shape \[N, K\] with K = 40, got \(52, 41\)"):
            m.forward_logits(step, cache)
    layer.gate_up[0].data = torch.zeros(51, 40)
    with pytest.raises(ValueError, match=r"103|104"):
        model.forward_logits(step, cache)
    layer.gate_up[0].data = good.t().contiguous().t()
    with pytest.raises(ValueError, match="contiguous"):
        model.forward_logits(step, cache)
    layer.gate_up[0].data = good[:8]  # at the same address
    with pytest.raises(ValueError, match="rows in all"):
        model.forward_logits(step, cache)
    layer.gate_up[0].data = good
    assert torch.equal(model.forward_logits(step, cache), seen[-1])


def test_packed_weights_are_the_models_own() -> None:
    """Norms that a live owner gives other storage are not followed, and what was there is kept."""
    config = config_of()
    weights = weights_of(config, packed="float32")
    model = Transformer(config, weights, kernels.select("cpu", "cpu"))
    step, cache = step_of(SPANS[0]), cache_of(config)
    expected = model.forward_logits(step, cache)
    for layer in weights.layers:
        layer.ffn_norm.data = torch.zeros(7)
    assert torch.equal(model.forward_logits(step, cache), expected)


def with_entry(step: StepBatch, name: str, index: int | tuple[int, int], value: int) -> StepBatch:
    tensor = getattr(step, name).clone()
    tensor[index] = value
    return dataclasses.replace(step, **{name: tensor})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("tokens", 3, VOCABULARY, r"tokens must hold values in \[0, 77\), got 77 at 3"),
        ("tokens", 49, -1, r"tokens must hold values in \[0, 77\), got -1 at 49"),
        ("positions", 0, 200, r"positions must hold values in \[0, 200\), got 200 at 0"),
        ("positions", 49, -1, r"positions must hold values in \[0, 200\), got -1 at 49"),
        ("slots", 2, 640, r"slots must hold values in \[-1, 640\), got 640 at 2"),
        ("slots", 2, -2, r"slots must hold values in \[-1, 640\), got -2 at 2"),
        ("query_start", 3, 51, r"query_start must run from 0 to the 50 rows of q, got 0 to 51"),
        ("query_start", 1, 40, r"query_start must not decrease, got 40 then 34 at sequence 1"),
        ("context_len", 1, 32, r"context_len\[1\] must be in \[33 queries, 48 slots of block_table\], got 32"),
        ("block_table", (1, 2), 40, r"block_table\[1, 2\] must be in \[0, 40\), got 40"),
        ("logit_rows", 0, 50, r"logit_rows must hold values in \[0, 50\), got 50 at 0"),
        ("logit_rows", 49, -1, r"logit_rows must hold values in \[0, 50\), got -1 at 49"),
    ],
)
def test_bad_values_are_refused_before_any_work(name: str, index: Any, value: int, message: str) -> None:
    model, _, _ = models_of("windows")
    cache, step = cache_of(model.config), step_of(SPANS[0])
    before = snapshot(model.config, cache)
    with pytest.raises(ValueError, match=message):
        model.forward_logits(with_entry(step, name, index, value), cache)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(before, snapshot(model.config, cache), strict=True))


@pytest.mark.parametrize("name", ["tokens", "positions", "slots", "query_start", "context_len", "block_table", "logit_rows"])
def test_bad_tensors(name: str) -> None:
    model, _, _ = models_of("plain")
    cache, step = cache_of(model.config), step_of(SPANS[0])
    good = getattr(step, name)
    for bad, error in (
        (good.to(torch.float32), TypeError),
        (torch.stack([good, good], dim=-1)[..., 0], ValueError),
        (good[None], ValueError),
        (good.tolist(), TypeError),
        (good.to("meta"), ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=name if name != "tokens" or error is TypeError else "tokens|positions"):
            model.forward_logits(dataclasses.replace(step, **{name: bad}), cache)
    half_a_tree = dataclasses.replace(step, tree_start=torch.tensor([-1, -1, -1], dtype=torch.int32))
    with pytest.raises(ValueError, match="tree_start and ancestors must both be given"):
        model.forward_logits(half_a_tree, cache)
    if name != "logit_rows":
        with pytest.raises(ValueError, match="must have shape"):
            model.forward_logits(dataclasses.replace(step, **{name: good[:-1]}), cache)


def test_caches() -> None:
    """Caches in turn are told apart, also after one is gone; one of another model is refused."""
    model, plain, _ = models_of("plain")
    caches = [cache_of(model.config) for _ in range(2)]
    for spans in SPANS:
        for seed, cache in enumerate(caches):
            step = step_of(spans, seed=seed)
            mirror = cache_of(model.config)
            for part in ("key", "value"):
                for i in range(model.config.num_layers):
                    getattr(mirror, part)(i).copy_(getattr(cache, part)(i))
            assert torch.equal(model.forward_logits(step, cache), plain.forward_logits(step, mirror))
    for _ in range(5):
        assert model.forward_logits(step_of(SPANS[0]), cache_of(model.config)).isfinite().all()
    other = cache_of(dataclasses.replace(model.config, head_dim=24))
    with pytest.raises(ValueError, match=r"cache must have 2 KV heads of 16, got 2 of 24"):
        model.forward_logits(step_of(SPANS[0]), other)


def test_hostile_values_stay_in_their_rows() -> None:
    """A token whose embedding is NaN, infinite or huge spoils its own sequence from there on, and no bit of the others."""
    model, plain, _ = models_of("plain")
    step = step_of(SPANS[0])
    expected = model.forward_logits(step, cache_of(model.config))
    victim = int(step.tokens[20])  # the 20th row is in the second sequence, which are rows 1 to 33
    touched = {int(r) for r in range(50) if int(step.tokens[r]) == victim}
    assert touched <= set(range(1, 34))
    for value in (math.nan, math.inf, -math.inf, 3e38):
        row = model.weights.embedding[victim].clone()
        model.weights.embedding[victim] = value
        logits = model.forward_logits(step, cache_of(model.config))
        assert torch.equal(logits.isnan(), plain.forward_logits(step, cache_of(model.config)).isnan())
        untouched = [*range(min(touched)), *range(34, 50)]
        assert torch.equal(logits[untouched], expected[untouched])
        model.weights.embedding[victim] = row


def test_which_ops_are_called() -> None:
    """One call stands for the C++ backend's own ops only."""
    config, ops = config_of(), kernels.select("cpu", "cpu")
    weights = weights_of(config)
    rope = Transformer(config, weights, ops)
    assert isinstance(forward.one_call(ops, config, weights, rope.cos, rope.sin), forward.Forward)
    calls: list[str] = []

    def counted(name: str, *args: Any, **options: Any) -> Any:
        calls.append(name)
        return getattr(ops, name)(*args, **options)

    for name in forward.OPS:
        model = Transformer(config, weights, dataclasses.replace(ops, **{name: functools.partial(counted, name)}))
        assert model._one_call is None
        model.forward_logits(step_of(SPANS[0]), cache_of(config))
    assert {name: calls.count(name) for name in forward.OPS} == {
        "embed": 1, "linear": 13, "rms_norm": 7, "rope_append": 3, "paged_attention": 3, "silu_mul": 3,
    }  # fmt: skip
    assert Transformer(config, weights, kernels.select("cpu", "reference"))._one_call is None


def test_several_python_threads_at_once() -> None:
    """Over one model, each with a cache of its own."""
    model, _, _ = models_of("biases")
    steps = [step_of([(0, n), (0, 51 - n)], seed=n) for n in (1, 20, 50)]
    expected = [model.forward_logits(step, cache_of(model.config)) for step in steps]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(60):
            if not torch.equal(model.forward_logits(steps[which], cache_of(model.config)), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong
