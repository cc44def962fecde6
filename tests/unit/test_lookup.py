"""Drafts copied from earlier text, against plain scans of the whole text."""

from __future__ import annotations

import gc
import random
import weakref
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafters.draft import MAX_DRAFT
from engine.drafters.lookup import BETWEEN, DOUBT, MAX_MATCH, Occurrences, PromptLookup, SuffixLookup
from engine.params import SamplingParams
from engine.request import Drawn, Request

# Few different tokens, so that matches of all lengths and many occurrences come about.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def request_of(prompt, output=()) -> Request:
    request = Request(list(prompt), SamplingParams(), seed=0, stream=0, max_new_tokens=1000, end_token_ids=frozenset())
    write(request, output)
    return request


def write(request, output) -> None:
    for token in output:
        request.append(Drawn(token, 0.0, 0.0))


def finish(drafter, request) -> None:
    request.finish("length", text=None)
    drafter.release(request)


def one(drafter, request, limit=8):
    (draft,) = drafter.draft([request], [limit])
    assert draft.is_chain and len(draft) <= limit
    assert len(draft.tokens) == len(draft.parents) == len(draft.confidence)
    assert all(0 < c < 1 for c in draft.confidence)
    return draft


def ends_of(text, context, n) -> list[int]:
    """Where the last n of ``context`` stand in ``text`` with a token after them, latest first."""
    return [end for end in range(len(text) - 1, n - 1, -1) if len(context) >= n and text[end - n : end] == context[len(context) - n :]]


def length_at(text, end, context) -> int:
    return next(
        (m for m in range(min(end, len(context), MAX_MATCH)) if text[end - 1 - m] != context[-1 - m]), min(end, len(context), MAX_MATCH)
    )


def go_on(text, end, limit) -> list[int]:
    """What follows, the copy itself being part of the text."""
    text = list(text)
    for i in range(limit):
        text.append(text[end + i])
    return text[-limit:]


def plain_prompt_lookup(tokens, max_ngram, min_ngram, limit) -> list[tuple[int, float]]:
    for n in range(max_ngram, min_ngram - 1, -1):
        for end in ends_of(tokens, tokens, n)[:1]:
            match = length_at(tokens, end, tokens)
            return [(token, 1 / (1 + DOUBT / (match + i))) for i, token in enumerate(go_on(tokens, end, limit))]
    return []


def plain_suffix_lookup(tokens, store, min_match, min_probability, length_factor, limit) -> list[tuple[int, float]]:
    """With as many occurrences as there are."""
    found = [(length_at(text, end, tokens), text, end) for text in (tokens, store) for end in ends_of(text, tokens, min_match)]
    if not found:
        return []
    match = max(length for length, _, _ in found)
    limit = min(limit, max(1, int(length_factor * match)))
    going = [
        go_on(text, end, limit) if text is tokens else (text[end:] + [BETWEEN] * limit)[:limit]
        for length, text, end in found
        if length == match
    ]
    draft, product = [], Fraction(1)
    for i in range(limit):
        column = [text[i] for text in going]
        token = max(column, key=column.count)  # the first of the most frequent
        product *= Fraction(column.count(token), len(column))
        if token == BETWEEN or product < min_probability:
            break
        draft.append((token, column.count(token) / (len(column) + DOUBT / (match + i))))
        going = [text for text in going if text[i] == token]
    return draft


def same(draft, expected) -> None:
    assert list(draft.tokens) == [token for token, _ in expected]
    assert draft.confidence == pytest.approx([c for _, c in expected], rel=1e-12)


@given(TOKENS, TOKENS, st.integers(1, 6), st.data())
def test_prompt_lookup_is_a_plain_scan_at_every_step(prompt, output, max_ngram, data):
    min_ngram = data.draw(st.integers(1, max_ngram))
    drafter = PromptLookup(max_ngram, min_ngram)
    request = request_of(prompt)
    for token in output:
        limit = data.draw(st.integers(1, 20))
        same(one(drafter, request, limit), plain_prompt_lookup(request.tokens, max_ngram, min_ngram, limit))
        write(request, [token])


@settings(max_examples=60)
@given(st.lists(TOKENS, min_size=1, max_size=6), st.integers(1, 12), st.sampled_from([0, 1, 7, 40, 1000]), st.data())
def test_suffix_lookup_is_a_plain_scan_of_request_and_store(texts, min_match, store_tokens, data):
    min_probability = data.draw(st.sampled_from([0.0, 0.125, 0.5, 1.0]))  # exact in binary, as 0.1 is not
    length_factor = data.draw(st.sampled_from([0.3, 1.0, 64.0]))
    drafter = SuffixLookup(store_tokens, min_match, min_probability, length_factor)
    drafter.MAX_OCCURRENCES = 10**6
    store: list[int] = []
    for text in texts:
        cut = data.draw(st.integers(1, len(text)))
        request = request_of(text[:cut])
        for token in text[cut:]:
            if data.draw(st.booleans()):  # several tokens may come between two drafts
                limit = data.draw(st.integers(1, 20))
                expected = plain_suffix_lookup(request.tokens, store, min_match, min_probability, length_factor, limit)
                same(one(drafter, request, limit), expected)
            write(request, [token])
        finish(drafter, request)
        if len(text) > cut:
            store += [BETWEEN, *text[max(0, cut - MAX_MATCH) :]]
        store = store[max(0, len(store) - store_tokens) :]


@given(st.lists(st.tuples(TOKENS, st.integers(0, 70)), max_size=8), st.lists(st.integers(0, 2), max_size=5))
def test_occurrences_that_are_forgotten_are_not_found(changes, context):
    seen = Occurrences([], (4, 2, 1))
    text: list[int] = []
    for added, dropped in changes:
        seen.tokens += added
        text += added
        seen.update()
        dropped = min(dropped, len(text))
        seen.forget(dropped)
        text = text[dropped:]
        assert seen.tokens == text
        for n in (4, 2, 1):
            assert list(seen.find(context, n, 10**6)) == ends_of(text, context, n)
            assert list(seen.find(context, n, 2)) == ends_of(text, context, n)[:2]


@pytest.mark.parametrize("drafter", [PromptLookup(), SuffixLookup()])
@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_repetition_is_continued_for_as_long_as_is_asked(drafter, period):
    unit = list(range(period))
    request = request_of(unit * 10)
    draft = one(drafter, request, MAX_DRAFT)
    assert list(draft.tokens) == (unit * MAX_DRAFT)[:MAX_DRAFT]
    assert list(draft.confidence) == sorted(draft.confidence)


@pytest.mark.parametrize("make", [PromptLookup, SuffixLookup, lambda: PromptLookup(1, 1), lambda: SuffixLookup(min_match=1)])
def test_where_nothing_has_occurred_before_there_is_no_draft(make):
    drafter = make()
    for tokens in ([5], [5, 6], [5, 6, 7, 8, 9]):
        assert len(one(drafter, request_of(tokens))) == 0
    # The match at the end itself, which nothing follows, is none.
    assert len(one(drafter, request_of([1, 2, 3, 4]))) == 0


def test_the_longest_n_gram_goes_first_and_then_the_latest():
    #                     followed by 10          by 20      by 30
    tokens = [1, 2, 3, 10, 9, 1, 2, 3, 20, 8, 2, 3, 30, 1, 2, 3]
    assert one(PromptLookup(3, 1), request_of(tokens), 1).tokens == (20,)
    assert one(PromptLookup(2, 1), request_of(tokens), 1).tokens == (30,)


def test_the_majority_of_the_longest_matches_decides():
    four = [1, 2, 3, 4]
    tokens = [*four, 5, *four, 5, *four, 6, 7, *four]  # 5 twice, 6 once and later
    draft = one(SuffixLookup(length_factor=0.25), request_of(tokens), 8)
    same(draft, [(5, 2 / (3 + DOUBT / 4))])
    # A longer match outvotes shorter ones, however many they are.
    tokens = [9, *four, 6, *four, 5, *four, 5, 9, *four]
    assert one(SuffixLookup(), request_of(tokens), 1).tokens == (6,)


def test_a_draft_ends_where_the_votes_are_too_divided():
    divided = [9, 0, 0, 1, 9, 0, 0, 2, 8, 0, 0, 3, 9, 0, 0]  # after 9 0 0 once 1, once 2
    assert one(SuffixLookup(min_probability=0.51), request_of(divided)).tokens == ()
    assert one(SuffixLookup(min_probability=0.5), request_of(divided)).tokens[:1] == (2,)


def test_only_the_latest_occurrences_vote():
    old, new = [1, 2, 3], [1, 2, 4]
    tokens = old * 50 + new * SuffixLookup.MAX_OCCURRENCES + [1, 2]
    assert one(SuffixLookup(), request_of(tokens), 1).tokens == (4,)


def test_outputs_of_finished_requests_are_drafted_from():
    drafter = SuffixLookup()
    prompt, output = [1, 2, 3], [10, 11, 12, 13, 14]
    first = request_of(prompt, output)
    assert len(one(drafter, first)) == 0
    finish(drafter, first)
    again = request_of(prompt)  # the end of the prompt is known, too
    assert list(one(drafter, again, 8).tokens) == output  # and not past the end of the output
    write(again, output[:2])
    assert list(one(drafter, again, 2).tokens) == output[2:4]
    # Two outputs never run into each other.
    finish(drafter, request_of([7, 7], [8]))
    assert len(one(drafter, request_of([13, 14]))) == 0


@pytest.mark.parametrize("drafter", [SuffixLookup(0), PromptLookup()])
def test_nothing_is_kept_where_nothing_may_be(drafter):
    finish(drafter, request_of([1, 2, 3], [4, 5, 6]))
    assert len(one(drafter, request_of([1, 2, 3]))) == 0


def test_a_preempted_request_comes_back_and_is_not_stored():
    drafter = SuffixLookup()
    request = request_of([1, 2, 3], [4, 1, 2])
    before = one(drafter, request)
    assert before.tokens[:1] == (3,)
    drafter.release(request)
    assert len(one(drafter, request_of([9, 4, 1]))) == 0
    assert one(drafter, request) == before


def test_the_store_is_bounded_and_drops_the_oldest():
    rng = random.Random(0)
    size = 5 * 51  # five outputs, each with what stands between them
    drafter = SuffixLookup(store_tokens=size)
    outputs = [[rng.randrange(10**6) for _ in range(50)] for _ in range(40)]
    for output in outputs:
        request = request_of(output[:2], output[2:])
        one(drafter, request)
        finish(drafter, request)
        store = drafter._store
        assert len(store.tokens) <= size
        assert len(store._latest) <= size * 3 and all(len(places) == len(store.tokens) for places in store._earlier.values())
    known = [len(one(drafter, request_of(output[10:14]), 5)) > 0 for output in outputs]
    assert known == [False] * 35 + [True] * 5
    # One that is longer than the store keeps its end.
    output = [rng.randrange(10**6) for _ in range(1000)]
    finish(drafter, request_of([0], output))
    assert list(one(drafter, request_of(output[990:994]), 5).tokens) == output[994:999]
    assert len(one(drafter, request_of(output[100:104]), 5)) == 0
    assert len(drafter._store.tokens) == size


@pytest.mark.parametrize("make", [PromptLookup, SuffixLookup])
@pytest.mark.parametrize("finished", [True, False])
def test_a_released_request_is_let_go(make, finished):
    drafter = make()
    request = request_of([1, 2, 1, 2], [1, 2])
    assert len(one(drafter, request)) > 0
    alive = weakref.ref(request)
    if finished:
        finish(drafter, request)
    else:
        drafter.release(request)
        drafter.release(request)  # unknown by now
    del request
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("make", [PromptLookup, SuffixLookup])
def test_requests_side_by_side_are_as_alone(make):
    """Drafts of interleaved requests, in calls with other requests, are those of each alone."""
    rng = random.Random(1)
    texts = [[rng.randrange(4) for _ in range(60)] for _ in range(5)]
    together, alone = make(), [make() for _ in texts]
    requests, twins = ([request_of(text[:3]) for text in texts] for _ in range(2))
    for _ in range(200):
        chosen = rng.sample(range(5), rng.randint(1, 5))
        limits = [rng.randint(1, 10) for _ in chosen]
        drafts = together.draft([requests[i] for i in chosen], limits)
        assert drafts == [one(alone[i], twins[i], limit) for i, limit in zip(chosen, limits, strict=True)]
        for i in chosen:
            more = texts[i][len(requests[i].tokens) :][: rng.randint(0, 2)]
            write(requests[i], more)
            write(twins[i], more)
    assert together.draft([], []) == []


def test_two_requests_of_equal_content_are_two():
    drafter = PromptLookup()
    first, second = request_of([1, 2, 1, 2]), request_of([1, 2, 1, 2])
    drafter.draft([first, second], [4, 4])
    write(first, [3, 1, 2])
    assert one(drafter, first, 1).tokens == (3,)
    assert one(drafter, second, 1).tokens == (1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookup(0), "max_ngram is 0; it must be an integer from 1 to 32"),
        (lambda: PromptLookup(33), "max_ngram is 33; it must be an integer from 1 to 32"),
        (lambda: PromptLookup(2, 3), "min_ngram is 3; it must be an integer from 1 to 2"),
        (lambda: PromptLookup(3, 0), "min_ngram is 0; it must be an integer from 1 to 3"),
        (lambda: SuffixLookup(-1), "store_tokens is -1; it must be an integer of at least 0"),
        (lambda: SuffixLookup(min_match=0), "min_match is 0; it must be an integer from 1 to 32"),
        (lambda: SuffixLookup(min_probability=1.5), "min_probability is 1.5; it must be a number from 0 to 1"),
        (lambda: SuffixLookup(min_probability=float("nan")), "min_probability is nan; it must be a number from 0 to 1"),
        (lambda: SuffixLookup(length_factor=0), "length_factor is 0; it must be a number above 0, at most 64"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PromptLookup("3"), "max_ngram"),
        (lambda: PromptLookup(True), "max_ngram"),
        (lambda: PromptLookup(3, None), "min_ngram"),
        (lambda: SuffixLookup(1e4), "store_tokens"),
        (lambda: SuffixLookup(min_match=2.0), "min_match"),
        (lambda: SuffixLookup(min_probability="0.1"), "min_probability"),
        (lambda: SuffixLookup(length_factor=[1]), "length_factor"),
    ],
)
def test_options_of_the_wrong_type(make, name):
    with pytest.raises(TypeError, match=f"{name} is .*; it must be "):
        make()
