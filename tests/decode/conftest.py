"""Small random models for the tests of the loop."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine import Decoder


def small_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A live random Llama whose logits are spread enough that draws differ."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2, "bos_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="session")
def decoder(llama: LlamaForCausalLM) -> Decoder:
    return Decoder(llama, cache_tokens=4096)


@pytest.fixture(scope="session")
def bundled() -> Decoder:
    return Decoder.bundled(cache_tokens=8192)


@pytest.fixture(autouse=True)
def no_block_leaks(request: pytest.FixtureRequest):
    """After every test the session's decoders are idle and every block is free."""
    yield
    for name in ("decoder", "bundled"):
        if name in request.fixturenames:
            used = request.getfixturevalue(name)
            assert not used.scheduler.has_work
            used.pool.check([])
            assert used.pool.num_free == used.pool.num_blocks
