"""The origin model and its two ways to decode, written anew from its description: the yardstick for everything said to match it.

It behaves as the published form B does, quirks included (numbered as in ``generate_super``'s docstring), so that a test can show both where
the engine agrees and what it deliberately does otherwise. Float32, no cache, one sequence at a time for beams.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OriginConfig:
    """The fields of the origin's config with their defaults."""

    model_type = "Tiny-K"

    def __init__(self, **fields: Any) -> None:
        self.dim = 768
        self.n_layers = 12
        self.n_heads = 16
        self.n_kv_heads: int | None = 8
        self.vocab_size = 6144
        self.hidden_dim: int | None = None
        self.multiple_of = 64
        self.norm_eps = 1e-5
        self.max_seq_len = 512
        self.dropout = 0.0
        self.flash_attn = True
        unknown = fields.keys() - vars(self).keys()
        assert not unknown, f"unknown fields {unknown}"
        vars(self).update(fields)

    def to_dict(self) -> dict[str, Any]:
        """What an exported folder's config.json holds."""
        return {**vars(self), "model_type": self.model_type, "architectures": ["Transformer"], "torch_dtype": "float32"}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).type_as(x) * self.weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of ``x [B, T, heads, D]`` as complex numbers, by tables ``[T, D / 2]``."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.complex(cos, sin)[None, :, None, :]
    return torch.view_as_real(turned).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, args: OriginConfig) -> None:
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_heads if args.n_kv_heads is None else args.n_kv_heads
        assert self.n_heads % self.n_kv_heads == 0
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.n_heads, self.head_dim)
        k = self.wk(x).view(batch, length, self.n_kv_heads, self.head_dim)
        v = self.wv(x).view(batch, length, self.n_kv_heads, self.head_dim)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        repeats = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, args: OriginConfig) -> None:
        super().__init__()
        hidden = args.hidden_dim
        if hidden is None:
            hidden = int(2 * 4 * args.dim / 3)
            hidden = args.multiple_of * math.ceil(hidden / args.multiple_of)
        self.w1 = nn.Linear(args.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderLayer(nn.Module):
    def __init__(self, args: OriginConfig) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The origin model. ``forward`` returns one object, reused by every call: logits of the last position, or of all with ``targets``."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, args: OriginConfig) -> None:
        super().__init__()
        self.args = self.config = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(DecoderLayer(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight
        half = args.dim // args.n_heads // 2
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(args.max_seq_len).float()[:, None] * frequencies
        self.register_buffer("freqs_cos", angles.cos(), persistent=False)
        self.register_buffer("freqs_sin", angles.sin(), persistent=False)
        self.OUT = SimpleNamespace(logits=None, last_loss=None)

    def all_logits(self, tokens: Tensor) -> Tensor:
        """``[B, T, V]`` at every position."""
        length = tokens.shape[1]
        assert length <= self.args.max_seq_len
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, self.freqs_cos[:length], self.freqs_sin[:length])
        return self.output(self.norm(h))

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **kwargs: Tensor) -> Any:
        tokens = kwargs.get("input_ids", tokens)
        targets = kwargs.get("attention_mask", targets)  # form B takes a mask for targets
        logits = self.all_logits(tokens)
        if targets is None:
            self.OUT.logits, self.OUT.last_loss = logits[:, -1:], None
        else:
            self.OUT.logits = logits
            self.OUT.last_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return self.OUT

    def _next_logits(self, tokens: Tensor) -> Tensor:
        """``[B, V]`` after the last ``max_seq_len`` tokens; positions start anew in a cut context."""
        return self(tokens[:, -self.args.max_seq_len :]).logits[:, -1].clone()

    @staticmethod
    def _keep_top(logits: Tensor, top_k: int | None) -> Tensor:
        """-inf below the k-th largest; ties with it stay."""
        if top_k is None:
            return logits
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < kth, -math.inf)

    @torch.inference_mode()
    def generate(
        self, idx: Tensor, stop_id: int | None = None, max_new_tokens: int = 256, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """New tokens ``[B, n]``; the stop token is not among them."""
        start = idx.shape[1]
        for _ in range(max_new_tokens):
            logits = self._next_logits(idx)
            if temperature == 0.0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(self._keep_top(logits / temperature, top_k or None).softmax(-1), 1)
            if stop_id is not None and bool(token == stop_id):  # with several rows and a stop: RuntimeError, as there
                break
            idx = torch.cat((idx, token), dim=1)
        return idx[:, start:]

    @torch.inference_mode()
    def generate_super(
        self,
        idx: Tensor,
        stop_id: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        do_sample: bool = False,
        num_beams: int = 1,
    ) -> Tensor:
        """Dispatch of form B, with its quirks: (1) the default call samples; (2) do_sample ignores num_beams; (3) temperature 0 becomes
        0.001, also for beams; (4, 5) beams go on after the stop token unless the best one has just ended; (6) beams need a batch of one."""
        if temperature <= 0:
            temperature = 0.001
        num_beams = max(num_beams, 1)
        if top_k is not None and top_k < 1:
            top_k = None
        if not do_sample and num_beams > 1:
            return self._beam_search(idx, max_new_tokens, num_beams, temperature, top_k, stop_id)
        greedy = not do_sample and temperature < 0.1
        return self.generate(idx, stop_id, max_new_tokens, 0.0 if greedy else temperature, top_k)

    def _beam_search(
        self, idx: Tensor, max_new_tokens: int, num_beams: int, temperature: float, top_k: int | None, stop_id: int | None
    ) -> Tensor:
        """New tokens of the best beam, the stop token among them; scores are sums of log-probabilities after temperature and top-k."""
        start = idx.shape[1]
        beams = [(idx, 0.0 if i == 0 else -math.inf) for i in range(num_beams)]
        for _ in range(max_new_tokens):
            candidates = []
            for tokens, score in beams:
                if score == -math.inf:
                    continue
                logits = self._next_logits(tokens)
                if temperature != 1.0:
                    logits = logits / temperature
                best = self._keep_top(logits, top_k).log_softmax(-1).topk(num_beams)
                for value, token in zip(best.values[0], best.indices[0], strict=True):
                    candidates.append((torch.cat((tokens, token.view(1, 1)), dim=1), score + value.item()))
            candidates.sort(key=lambda candidate: candidate[1], reverse=True)  # stable: ties keep beam, then rank
            beams = candidates[:num_beams]
            if stop_id is not None and beams[0][0][0, -1].item() == stop_id:
                break
        return beams[0][0][:, start:]
