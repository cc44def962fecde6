"""What a request keeps for its penalties, and what it would be after drafted tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.params import SamplingParams
from engine.request import Drawn, History, Lookahead, Request


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


class Matcher:
    """Stands in for a grammar's: takes in what has not been taken in, and refuses 13."""

    def __init__(self) -> None:
        self.consumed: list[int] = []

    def copy(self) -> Matcher:
        twin = Matcher()
        twin.consumed = list(self.consumed)
        return twin

    def advance(self, tokens: list[int], num_prompt_tokens: int) -> None:
        new = tokens[num_prompt_tokens + len(self.consumed) :]
        if 13 in new:
            raise ValueError("13 cannot be")
        self.consumed += new


def make_request(**options) -> Request:
    request = Request([5, 6, 5], SamplingParams(**options), seed=9, stream=4, max_new_tokens=9, end_token_ids=frozenset({2}))
    request.matcher = Matcher()
    request.controls = object()
    for token in (7, 5):
        request.append(Drawn(token, -1.0, -0.5))
        request.matcher.advance(request.tokens, 3)
    return request


@given(st.lists(st.integers(0, 9), max_size=8))
def test_a_lookahead_is_what_the_request_becomes(drafted: list[int]):
    request = make_request(repetition_penalty=1.2)
    ahead = Lookahead(request)
    states = [ahead]
    for token in drafted:
        ahead = Lookahead(ahead, token)
        states.append(ahead)
    real = make_request(repetition_penalty=1.2)
    for i, state in enumerate(states):
        assert state.tokens == real.tokens and state.drafted == tuple(drafted[:i])
        assert (state.num_tokens, state.num_new_tokens) == (real.num_tokens, real.num_new_tokens)
        assert (state.history.tokens, state.history.counts) == (real.history.tokens, real.history.counts)
        assert state.matcher.consumed == real.matcher.consumed
        assert (state.seed, state.stream, state.end_token_ids, state.prompt) == (9, 4, {2}, [5, 6, 5])
        assert state.params is request.params and state.controls is request.controls and state.request is request
        if i < len(drafted):
            real.append(Drawn(drafted[i], 0.0, 0.0))
            real.matcher.advance(real.tokens, 3)


def test_lookaheads_leave_each_other_and_the_request_alone():
    request = make_request(presence_penalty=0.5)
    before = (list(request.tokens), list(request.history.tokens), list(request.history.counts), list(request.matcher.consumed))
    first = Lookahead(request, 7)
    left, right = Lookahead(first, 8), Lookahead(first, 9)
    assert (left.tokens, right.tokens) == ([5, 6, 5, 7, 5, 7, 8], [5, 6, 5, 7, 5, 7, 9])
    assert (left.matcher.consumed, right.matcher.consumed) == ([7, 5, 7, 8], [7, 5, 7, 9])
    assert list(first.history.tokens) == [7, 5] and list(first.history.counts) == [2, 1]
    assert list(left.history.tokens) == [7, 5, 8] and list(right.history.tokens) == [7, 5, 9]
    with pytest.raises(ValueError, match="13 cannot be"):
        Lookahead(left, 13)
    assert left.matcher.consumed == [7, 5, 7, 8]
    after = (request.tokens, list(request.history.tokens), list(request.history.counts), request.matcher.consumed)
    assert after == before
    assert Lookahead(request).tokens == request.tokens


def test_a_restart_forgets_the_draft():
    request = make_request()
    request.draft = object()  # type: ignore[assignment]
    request.num_computed = 4
    request.restart()
    assert request.draft is None and request.num_computed == 0 and request.num_tokens == 5
