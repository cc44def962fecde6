"""The one decoder-only transformer: every supported family is a ``ModelConfig`` of it.

Pre-norm residual blocks (RMSNorm, Zhang and Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al.
2023) over a paged cache, SwiGLU (Shazeer 2020). It is a plain class over the owner's tensors, not an ``nn.Module``: with shared weights
nothing is copied, and a change to a live model is seen by the next step.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..kernels import HeadDraw, SampleResult, merge_draws
from ..kernels.forward import one_call
from ..kernels.registry import Ops
from ..parallel import Parallel
from .batch import StepBatch
from .config import ModelConfig
from .rope import rope_tables
from .shard import Shard
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
        parallel: the ranks of whose model this is one part (``shard.Shard``), its sizes in ``config``; None: it is the whole.

    On a CPU activations are float32 whatever the weights' dtype; on a GPU what meets the weights has their dtype.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops, parallel: Parallel | None = None) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        cos, sin = rope_tables(config.rope, config.max_position)
        self.cos, self.sin = cos.to(self.device), sin.to(self.device)  # float32 [max_position, rotary_dim / 2]
        self._activations = torch.float32 if weights.final_norm.is_cpu else self.dtype
        self.parallel = parallel
        self._one_call = one_call(ops, config, weights, self.cos, self.sin) if parallel is None else None
        parts = (weights.embedding, weights.final_norm, weights.head, *(part for layer in weights.layers for part in vars(layer).values()))
        tensors = (tensor for part in parts for tensor in (part if isinstance(part, tuple) else (part,)))
        self._live = [tensor for tensor in tensors if isinstance(tensor, torch.nn.Parameter)]
        self._in_order = "fast" not in ops.chosen.values()
        ranks = [] if parallel is None else [Shard(rank, parallel.size) for rank in range(parallel.size)]
        self._vocabularies = [shard.vocabulary(config.vocab_size) for shard in ranks]

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

    def addresses(self) -> list[int]:
        """Where a live model's parameters lie now: their owner may give them other storage between two steps (``.data = ``)."""
        return list(map(Tensor.data_ptr, self._live))

    def forward_logits(self, batch: StepBatch, cache: Cache) -> Tensor:
        """Run the T tokens of a step, write their keys and values into ``cache``, and run the LM head on the rows ``batch.logit_rows``.

        Positions must lie below ``config.max_position`` and tokens below ``config.vocab_size``. Returns float32 ``[R, vocab_size]``. Where
        it is one call (``kernels.forward``), rows that nobody asks for end in the last layer; the bits are the same. Of a model in parts
        rank 0 has that, the others the columns of their own vocabulary.
        """
        return self.logits(self.hidden(batch, cache)) if self._one_call is None else self._one_call.logits(batch, cache)

    @torch.no_grad()  # the weights may be Parameters that want gradients
    def hidden(self, batch: StepBatch, cache: Cache) -> Tensor:
        """All of ``forward_logits`` but the LM head, over any backend's ops: what the head meets, activations ``[R, hidden_size]``."""
        config, ops = self.config, self.ops
        linear, eps, dtype = ops.linear, config.norm_eps, self._activations
        whole = self.parallel is None or self.parallel.rank == 0
        interleaved, scale = config.rope.interleaved, config.head_dim**-0.5
        x = self._embed(batch.tokens)
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
            # x is this call's own tensor, so the sum may be written over it. Of parts, only one may add what was there.
            linear(attended.flatten(1), layer.out, layer.out_bias, residual=x if whole else None, out=x)
            self._sum(x)
            gate_up = linear(ops.rms_norm(x, layer.ffn_norm, eps, dtype), layer.gate_up, layer.gate_up_bias)
            linear(ops.silu_mul(gate_up), layer.down, layer.down_bias, residual=x if whole else None, out=x)
            self._sum(x)
        return ops.rms_norm(x, self.weights.final_norm, eps, dtype).index_select(0, batch.logit_rows)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head: float32 ``[R, vocab_size]`` of ``hidden [R, hidden_size]``; of a model in parts as ``forward_logits`` says."""
        head = self.weights.head
        out: Tensor = self.ops.linear(
            hidden, (head,), out=torch.empty((len(hidden), head.shape[0]), dtype=torch.float32, device=hidden.device)
        )
        if self.parallel is None or not len(out):
            return out
        return self.parallel.gather_columns(out, [tokens.stop - tokens.start for tokens in self._vocabularies])

    @torch.no_grad()
    def draw(self, hidden: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: Tensor) -> SampleResult:
        """The LM head and a token from each row (``kernels.sample_head``), of a model in parts from all of them, on every rank."""
        first = 0 if self.parallel is None else self._vocabularies[self.parallel.rank].start
        drawn = self.ops.sample_head(hidden, self.weights.head, temperature, seed, position, stream, first_token=first)
        if self.parallel is None:
            return merge_draws([drawn])
        # One gathering of 32-bit words, [9, R] of each part.
        words = torch.cat([part.view(-1, len(hidden)) for part in (drawn.tokens.int(), drawn.status, *map(_words, drawn[2:]))])
        return merge_draws([_draw_of(part) for part in self.parallel.all_gather(words)])

    @torch.no_grad()
    def sampled(self, logits: Tensor, *law: Tensor) -> SampleResult:
        """``kernels.sample`` of a step's ``logits`` with its first seven ``law``s. Of a model in parts rank 0 has them all and draws; it
        gives the tokens to the others, who have nothing else of the result."""
        parallel, ops = self.parallel, self.ops
        if parallel is None:
            return ops.sample(logits, *law, logprobs=0)
        if parallel.rank == 0:
            result: SampleResult = ops.sample(logits, *law, logprobs=0)
            parallel.share(result.tokens)
            return result
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        parallel.share(tokens)
        nothing = torch.zeros(len(logits), device=logits.device)
        return SampleResult(tokens, nothing.int(), nothing, nothing)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding. Of a vocabulary in parts: those that are here, zeros for others, and so from their sum every one."""
        ops, embedding = self.ops, self.weights.embedding
        if self.parallel is None:
            return ops.embed(tokens, embedding)
        own = self._vocabularies[self.parallel.rank]
        here = (tokens >= own.start) & (tokens < own.stop)
        x: Tensor = ops.embed(torch.where(here, tokens - own.start, 0), embedding)
        x = torch.where(here[:, None], x, 0.0)
        self._sum(x)
        return x

    def _sum(self, x: Tensor) -> None:
        """The one place where the parts of a model meet: ``x [T, H]`` of every rank becomes their sum."""
        if self.parallel is not None:
            self.parallel.sum_(x, self._in_order)


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _draw_of(words: Tensor) -> HeadDraw:
    """The part's draw from its words, which `Transformer.draw` put together."""
    tokens, status, scores, logprobs, largest, mass = words.split([1, 1, 1, 2, 2, 2])
    floats = (x.view(torch.float32) for x in (logprobs, largest, mass))
    return HeadDraw(tokens[0].long(), status[0], scores[0].view(torch.float32), *floats)
