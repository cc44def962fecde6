"""Running the engine's Transformer on its own: a paged cache, a random block table and hand-made steps; and small transformers models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from engine import kernels
from engine.kv_cache import KVCache
from engine.models import StepBatch, Transformer

TOLERANCE = 3e-5  # max-abs difference of float32 logits (their deviation is about 1); two orders of the same sums differ by 5e-6

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in kernels.backends("cpu").items()
    if name not in ("cuda", "fast", "triton")  # those of a GPU
]


def ops_of(backend: str) -> Any:
    return kernels.select("cpu", backend)


def run_logits(model: Transformer, tokens: Sequence[int], chunks: Sequence[int] | None = None, seed: int = 0) -> Tensor:
    """Logits ``[T, V]`` at every position of one sequence, computed in steps of ``chunks`` tokens (default: one step)."""
    size, config = 16, model.config
    needed = -(-len(tokens) // size)
    cache = KVCache(
        config.num_layers, config.num_kv_heads, config.head_dim, num_blocks=2 * needed + 1, block_size=size, dtype=torch.float32
    )
    for layer in range(config.num_layers):  # what nobody wrote must not matter
        cache.key(layer).fill_(float("nan"))
        cache.value(layer).fill_(float("nan"))
    table = random.Random(seed).sample(range(2 * needed + 1), needed)
    rows, start = [], 0
    for chunk in chunks or [len(tokens)]:
        end = start + chunk
        batch = StepBatch(
            tokens=torch.tensor(tokens[start:end], dtype=torch.int32),
            positions=torch.arange(start, end, dtype=torch.int32),
            slots=torch.tensor([table[p // size] * size + p % size for p in range(start, end)], dtype=torch.int32),
            query_start=torch.tensor([0, chunk], dtype=torch.int32),
            context_len=torch.tensor([end], dtype=torch.int32),
            block_table=torch.tensor([table], dtype=torch.int32),
            logit_rows=torch.arange(chunk),
        )
        rows.append(model.forward_logits(batch, cache))
        start = end
    assert start == len(tokens)
    return torch.cat(rows)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part shows in the logits: the usual 0.02 hides attention behind the residual."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 0.5 if name.endswith("bias") else noise * 0.2 + 1.0)


def hf_model(raw: dict[str, Any], seed: int = 0) -> Any:
    """A random transformers model of a config given as in ``config.json``."""
    config = transformers.AutoConfig.for_model(**{key: value for key, value in raw.items() if key not in ("architectures", "torch_dtype")})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return model


def hf_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float()


def some_tokens(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
