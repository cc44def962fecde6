"""What a request keeps for its penalties."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.params import SamplingParams
from engine.request import Drawn, History, Request


@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9), max_size=12))
def test_history_counts_occurrences_in_the_output(prompt: list[int], output: list[int]):
    history = History(prompt)
    for token in output:
        history.add(token)
    assert list(history.tokens) == list(dict.fromkeys(prompt + output))
    counts = Counter(output)
    assert list(history.counts) == [counts[token] for token in history.tokens]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, None),
        ({"repetition_penalty": 1.2}, [5, 6, 7]),
        ({"presence_penalty": 0.5}, [7]),
        ({"frequency_penalty": -0.5}, [7]),
        ({"repetition_penalty": 1.2, "presence_penalty": 0.5}, [5, 6, 7]),
    ],
)
def test_history_is_kept_only_under_a_penalty(options: dict, tokens: list[int] | None):
    request = Request([5, 6, 5], SamplingParams(**options), seed=0, stream=0, max_new_tokens=4, end_token_ids=frozenset())
    request.append(Drawn(7, -1.0, -0.5))
    assert request.tokens == [5, 6, 5, 7]
    assert (None if request.history is None else list(request.history.tokens)) == tokens
