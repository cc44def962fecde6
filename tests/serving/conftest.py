"""Models for the tests of serving, and the decoder that their results are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from decode.small_models import small_llama
from serving.async_helpers import baseline, run
from transformers import LlamaForCausalLM

from engine import AsyncDecoder, Decoder


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="session")
def alone(llama: LlamaForCausalLM) -> Decoder:
    """What requests give when they run alone."""
    return Decoder(llama, cache_tokens=4096)


@pytest.fixture(scope="session")
def bundled() -> Decoder:
    return Decoder.bundled(cache_tokens=8192)


@pytest.fixture
def served(llama: LlamaForCausalLM) -> Iterator[Callable[..., AsyncDecoder]]:
    """Makes ``AsyncDecoder``s; at the end none may hold a block, and all are closed."""
    made: list[AsyncDecoder] = []

    def make(model: Any = None, **options: Any) -> AsyncDecoder:
        if model is None:
            options = {"cache_tokens": 1024, **options}
        made.append(AsyncDecoder(llama if model is None else model, **options))
        return made[-1]

    yield make
    for decoder in made:
        run(decoder.close())
        baseline(decoder)
