from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI
from server.server_helpers import SECONDS, Running, running

from engine import Decoder


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


@pytest.fixture(scope="session")
def alone() -> Decoder:
    """The same model, to compare with."""
    return Decoder.bundled(cache_tokens=8192)


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as one:
        yield one
