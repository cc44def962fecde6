"""A transformer's forward as one call into ``engine.kernels._cpu`` (``csrc/cpu/forward.cpp``): the kernels behind ``cpu``'s ops, called in
the order of ``Transformer.forward_logits``, so the same bits; without Python in between, and without memory to allocate.

Matrices in rows belong to a live model, whose owner may give its parameters other storage between two steps (``.to()``, ``.data = ``). So
their addresses, dtypes and shapes are read again before every step, which takes microseconds, and the model is described anew when one of
them has changed. Packed matrices are the engine's own and stay.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, cpu
from .packed import PackedWeight
from .registry import Ops

# The ops that it stands for.
OPS = ("embed", "linear", "rms_norm", "rope_append", "paged_attention", "silu_mul")

_address = Tensor.data_ptr
_kind = operator.attrgetter("dtype", "shape")


def one_call(ops: Ops, config: Any, weights: Any, cos: Tensor, sin: Tensor) -> Forward | None:
    """The forward of a model whose ops are ``ops``; None unless those that it stands for are all the C++ backend's own: another backend's,
    or what a profiler wraps around one, must be called op by op."""
    own = all(getattr(ops, name) is getattr(cpu, name) for name in OPS)
    return Forward(config, weights, cos, sin) if own else None


class Forward:
    """One model's forward. Safe to call from several threads, over caches of their own.

    Args:
        config: its sizes and options: the fields of ``engine.models.ModelConfig`` that ``Transformer.forward_logits`` uses.
        weights: its tensors, as ``engine.models.ModelWeights``.
        cos, sin: its rotary tables, float32 ``[max_position, rot / 2]``.

    The tensors of a cache, and those of a ``StepBatch``, are those that it had when it was first seen; the numbers in them may change.
    """

    def __init__(self, config: Any, weights: Any, cos: Tensor, sin: Tensor) -> None:
        self._config, self._weights, self._cos, self._sin = config, weights, cos, sin
        self._watched = tuple(_plain_tensors(weights))
        self._model: tuple[Any, Any, Any] = (None, None, None)  # addresses and kinds of what is watched, and the model described by them
        self._cache, self._step = _Last(functools.partial(_describe_cache, config)), _Last(_describe_step)
        if all(isinstance(w, PackedWeight) for layer in weights.layers for w in layer.qkv):
            # The engine's own copy. Norms and biases may still be a live model's: they are read where they lie now, and kept there.
            self._kept, self._watched = [t.detach() for t in self._watched], ()
            self._current_model()

    def logits(self, batch: Any, cache: Any) -> Tensor:
        """Logits of the step's ``logit_rows``: float32 ``[R, vocab_size]``."""
        model, described, step = self._current_model(), self._cache.of(cache), self._step.of(batch)
        out = torch.empty((len(batch.logit_rows), self._config.vocab_size), dtype=torch.float32)
        model.logits(described, step, out.data_ptr())
        return out

    def _current_model(self) -> Any:
        addresses, kinds, model = self._model
        now, kinds_now = tuple(map(_address, self._watched)), tuple(map(_kind, self._watched))
        if addresses != now or kinds != kinds_now:
            if 0 in now:
                raise ValueError("a weight of the live model has no storage any more")
            model = _describe(self._config, self._weights, self._cos, self._sin)
            self._model = (now, kinds_now, model)
        return model


class _Last:
    """What ``make`` made of the last object it was asked for, which is not kept alive by this."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._last: tuple[Callable[[], Any], Any] = (lambda: self, None)

    def of(self, thing: Any) -> Any:
        last, made = self._last
        if last() is not thing:
            made = self._make(thing)
            self._last = (weakref.ref(thing), made)
        return made


def _plain_tensors(weights: Any) -> Iterator[Tensor]:
    """Every tensor of the model that is not packed."""
    for part in (weights.embedding, weights.final_norm, weights.head, *(p for layer in weights.layers for p in vars(layer).values())):
        for t in part if isinstance(part, tuple) else (part,):
            if isinstance(t, Tensor):
                yield t


# ---- a model, a cache and a step, as the C++ side takes them: it trusts the shapes and dtypes that are checked here ----


def _describe(config: Any, weights: Any, cos: Tensor, sin: Tensor) -> Any:
    hidden, head_dim, queries = config.hidden_size, config.head_dim, config.num_heads * config.head_dim
    qkv = queries + 2 * config.num_kv_heads * head_dim
    layers = [
        (
            _norm(layer.attention_norm, hidden),
            _product(layer.qkv, layer.qkv_bias, hidden, qkv),
            _norm(layer.q_norm, head_dim),
            _norm(layer.k_norm, head_dim),
            _product(layer.out, layer.out_bias, queries, hidden),
            _norm(layer.ffn_norm, hidden),
            _product(layer.gate_up, layer.gate_up_bias, hidden, 2 * config.ffn_size),
            _product(layer.down, layer.down_bias, config.ffn_size, hidden),
            window,
        )
        for layer, window in zip(weights.layers, config.windows, strict=True)
    ]
    for layer in weights.layers:
        if layer.q_norm is not None and layer.q_norm.dtype != layer.k_norm.dtype:
            raise TypeError(f"k_norm must have the dtype of q_norm, {layer.q_norm.dtype}, got {layer.k_norm.dtype}")
    return cpu._cpu.ForwardModel(
        embedding=_product((weights.embedding,), None, hidden, config.vocab_size),
        layers=layers,
        final_norm=_norm(weights.final_norm, hidden),
        head=_product((weights.head,), None, hidden, config.vocab_size),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        max_position=cos.shape[0],
        half=cos.shape[1],
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=head_dim,
        norm_eps=config.norm_eps,
        attention_scale=head_dim**-0.5,
        interleaved=config.rope.interleaved,
    )


def _norm(weight: Tensor | None, width: int) -> tuple[int, int]:
    """Its address and dtype."""
    if weight is None:
        return 0, 0
    checks.rms_norm(torch.empty(1, width), weight, torch.float32)
    return weight.data_ptr(), cpu._DTYPE[weight.dtype]


def _product(weights: Sequence[Any], biases: Sequence[Tensor | None] | None, k: int, n: int) -> tuple[tuple[int, ...], int, int]:
    """Its segments as ``_cpu.linear`` takes them, their format, and k."""
    x = torch.empty(1, k)
    width = checks.linear(x, weights, biases, None, None)
    plan = cpu._linear_plan(x, weights, biases, None, None)
    if width != n or plan is None:
        raise ValueError(f"weights must have shape [N, {k}] with {n} rows in all, got {[tuple(w.shape) for w in weights]}")
    *_, segments, kind = plan
    return segments, kind, k


def _describe_cache(config: Any, cache: Any) -> Any:
    keys = [cache.key(i) for i in range(config.num_layers)]
    values = [cache.value(i) for i in range(config.num_layers)]
    sizes = {checks.cache(key, value) for key, value in zip(keys, values, strict=True)}
    shape, dtype = sizes.pop(), keys[0].dtype
    if sizes or any(key.dtype != dtype for key in keys):
        raise ValueError("cache must have one shape and dtype in all layers")
    if (shape.num_kv_heads, shape.head_dim) != (config.num_kv_heads, config.head_dim):
        raise ValueError(
            f"cache must have {config.num_kv_heads} KV heads of {config.head_dim}, got {shape.num_kv_heads} of {shape.head_dim}"
        )
    addresses = [t.data_ptr() for t in keys], [t.data_ptr() for t in values]
    return cpu._cpu.ForwardCache(*addresses, cpu._cache_dtype(keys[0]), shape.num_blocks, shape.block_size)


def _describe_step(batch: Any) -> Any:
    checks.step(batch)
    cpu._on_cpu("tokens", batch.tokens)
    sequences, max_blocks = batch.block_table.shape
    tensors = (
        batch.tokens, batch.positions, batch.slots, batch.query_start, batch.context_len, batch.block_table, batch.logit_rows,
        batch.tree_start, batch.ancestors,
    )  # fmt: skip
    return cpu._cpu.ForwardStep(*cpu._addresses(tensors), len(batch.tokens), sequences, max_blocks, len(batch.logit_rows))
