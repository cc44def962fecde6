"""Small products on a busy machine: threads of torch's pool would only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreted import stop


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=10.0, help="how long `pytest -m soak` keeps its load up (default: 10)")


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        for module in dict.fromkeys(item.module for item in session.items if isinstance(item, pytest.Function)):
            if "INTERPRETED" in vars(module):
                module.INTERPRETED.begin()


def pytest_unconfigure() -> None:
    stop()


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the program of the test's module found (``interpreted.Interpreted``)."""
    outcome: dict[str, Any] = request.module.INTERPRETED.outcome()
    return outcome


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
