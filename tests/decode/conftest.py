"""Decoders for the tests of the loop, and the check that none of them leaks a block."""

from __future__ import annotations

import pytest
from decode.small_models import small_llama
from transformers import LlamaForCausalLM

from engine import Decoder


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
            assert not used.loop.scheduler.has_work
            used.loop.pool.check([])
            assert used.loop.pool.num_free == used.loop.pool.num_blocks
