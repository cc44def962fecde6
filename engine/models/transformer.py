"""The one decoder-only transformer: every supported family is a ``ModelConfig`` of it.

Pre-norm residual blocks (RMSNorm, Zhang and Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al.
2023) over a paged cache, SwiGLU (Shazeer 2020). It is a plain class over the owner's tensors, not an ``nn.Module``: with shared weights
nothing is copied, and a change to a live model is seen by the next step.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels.forward import one_call
from ..kernels.registry import Ops
from .batch import StepBatch
from .config import ModelConfig
from .rope import rope_tables
from .weights import Matrix, ModelWeights


class Cache(Protocol):
    """What forward needs of a KV cache: each layer's tensors in the layout of ``kernels/api.py``."""

    def key(self, layer: int) -> Tensor: ...

    def value(self, layer: int) -> Tensor: ...


class Transformer:
    """A model ready to run.

    Args:
        config: sizes and options.
        weights: the tensors; read where they lie.
        ops: the kernels (``engine.kernels.select``).

    On a CPU activations are float32 whatever the weights' dtype; on a GPU what meets the weights has their dtype.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        cos, sin = rope_tables(config.rope, config.max_position)
        self.cos, self.sin = cos.to(self.device), sin.to(self.device)  # float32 [max_position, rotary_dim / 2]
        self._activations = torch.float32 if weights.final_norm.is_cpu else self.dtype
        self._one_call = one_call(ops, config, weights, self.cos, self.sin)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype before any packing (the embedding's, where they differ)."""
        assert self.config.dtype is not None  # `load` has set it
        return self.config.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.final_norm.device

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights a step reads at least once: everything but the embedding table, of which it reads single rows."""
        weights = self.weights
        tensors: list[Matrix] = [weights.final_norm, weights.head]
        for layer in weights.layers:
            for part in vars(layer).values():
                tensors += part if isinstance(part, tuple) else [] if part is None else [part]
        return sum(tensor.nbytes for tensor in tensors)

    def forward_logits(self, batch: StepBatch, cache: Cache) -> Tensor:
        """Run the T tokens of a step, write their keys and values into ``cache``, and run the LM head on the rows ``batch.logit_rows``.

        Positions must lie below ``config.max_position`` and tokens below ``config.vocab_size``. Returns float32 ``[R, vocab_size]``. Where
        it is one call (``kernels.forward``), rows that nobody asks for end in the last layer; the bits are the same.
        """
        return self.logits(self.hidden(batch, cache)) if self._one_call is None else self._one_call.logits(batch, cache)

    @torch.no_grad()  # the weights may be Parameters that want gradients
    def hidden(self, batch: StepBatch, cache: Cache) -> Tensor:
        """All of ``forward_logits`` but the LM head, over any backend's ops: what the head meets, activations ``[R, hidden_size]``."""
        config, ops = self.config, self.ops
        linear, eps, dtype = ops.linear, config.norm_eps, self._activations
        interleaved, scale = config.rope.interleaved, config.head_dim**-0.5
        x = ops.embed(batch.tokens, self.weights.embedding)
        for i, layer in enumerate(self.weights.layers):
            key, value = cache.key(i), cache.value(i)
            qkv = linear(ops.rms_norm(x, layer.attention_norm, eps, dtype), layer.qkv, layer.qkv_bias)
            q = ops.rope_append(
                qkv, batch.positions, batch.slots, self.cos, self.sin, key, value, num_heads=config.num_heads,
                interleaved=interleaved, q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=eps,
            )  # fmt: skip
            attended = ops.paged_attention(
                q, key, value, batch.block_table, batch.query_start, batch.context_len, scale=scale, window=config.windows[i],
                tree_start=batch.tree_start, ancestors=batch.ancestors,
            )  # fmt: skip
            # x is this call's own tensor, so the sum may be written over it
            linear(attended.flatten(1), layer.out, layer.out_bias, residual=x, out=x)
            gate_up = linear(ops.rms_norm(x, layer.ffn_norm, eps, dtype), layer.gate_up, layer.gate_up_bias)
            linear(ops.silu_mul(gate_up), layer.down, layer.down_bias, residual=x, out=x)
        return ops.rms_norm(x, self.weights.final_norm, eps, dtype).index_select(0, batch.logit_rows)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head: float32 ``[R, vocab_size]`` of ``hidden [R, hidden_size]``."""
        out = torch.empty((len(hidden), self.config.vocab_size), device=hidden.device)
        return self.ops.linear(hidden, (self.weights.head,), out=out)
