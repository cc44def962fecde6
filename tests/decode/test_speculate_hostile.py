"""Drafters that draft anything at all: right, wrong or impossible, it changes nothing but the number of steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from decode.small_models import small_llama
from decode.speculation_cases import COUNT, Target, check_cell, check_idle, run_streams, target, total, watch

from engine import Decoder, Draft, DraftModel
from engine.request import Request

V = 101
# Makes a draft of what will come (all of it), and the limit.
Make = Callable[[random.Random, list[int], int], Draft]


class Hostile:
    """Drafts what ``make`` makes of it."""

    def __init__(self, target: Target, make: Make) -> None:
        self.target, self.make, self.rng = target, make, random.Random(0)
        self.known: set[Request] = set()

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        assert all(1 <= limit <= 63 and not request.finished for request, limit in zip(requests, limits, strict=True))
        self.known |= set(requests)
        futures = (self.target.tokens(request)[request.num_tokens :] for request in requests)
        return [self.make(self.rng, future, limit) for future, limit in zip(futures, limits, strict=True)]

    def release(self, request: Request) -> None:
        self.known.discard(request)


def chain(tokens: Sequence[int]) -> Draft:
    return Draft.chain(tokens, [0.9] * len(tokens))


def random_tokens(rng, future, limit):
    return chain([rng.randrange(V) for _ in range(rng.randint(0, limit))])


def always_wrong(rng, future, limit):
    return chain([(token + 1) % V for token in future[:limit]])


def the_truth(rng, future, limit):
    return chain(future[:limit])


def half_the_truth(rng, future, limit):
    return chain([*future[: rng.randrange(limit)], *[rng.randrange(V) for _ in range(limit)]][:limit])


def too_much(rng, future, limit):
    return chain([*future, *[5] * 500])


def fewer_parents(rng, future, limit):
    return Draft(tuple(future[:limit]), tuple(range(limit // 2)), (0.5,) * limit)


def fewer_tokens(rng, future, limit):
    return Draft(tuple(future[: limit // 2]), tuple(range(limit)), (0.5,) * limit)


def fewer_confidences(rng, future, limit):
    return Draft(tuple(future[:limit]), tuple(range(limit)), (0.5,) * rng.randrange(limit))


def no_confidences(rng, future, limit):
    return Draft(tuple(future[:limit]), tuple(range(limit)))


def odd_confidences(rng, future, limit):
    odd = [math.nan, 2.0, -1.0, math.inf, -math.inf, 1e300, -1e-300, 1.0, 0.0]
    return Draft.chain(future[:limit], [rng.choice(odd) for _ in future[:limit]])


def out_of_vocabulary(rng, future, limit):
    return chain([rng.choice([token, token, token, -1, V, 10**9, -(2**40), 2**63]) for token in future[:limit]])


def no_such_parents(rng, future, limit):
    return Draft(tuple(future[:limit]), tuple(rng.choice([i, i, i, i, -1, i + 1, limit, 64, 10**9, -(10**9)]) for i in range(limit)))


def past_the_end(rng, future, limit):
    """On beyond an end-of-sequence token or what ends the request."""
    return chain([*future[: rng.randrange(limit)], 2, *[rng.randrange(V) for _ in range(limit)]])


def duplicate_siblings(rng, future, limit):
    """The truth twice at each depth, in turn going on from the first and from the second."""
    tokens, parents, parent = [], [], 0
    for depth, token in enumerate(future[: limit // 2]):
        tokens += [token, token]
        parents += [parent, parent]
        parent = 2 * depth + rng.choice([1, 2])
    return Draft(tuple(tokens), tuple(parents), (0.5,) * len(tokens))


def tree(rng, future, limit):
    """Full of others, with the truth at a random place of each depth."""
    nodes: list[tuple[int, int]] = []  # token, parent
    level, right, size = [0], 0, 0
    for token in future:
        width = rng.randint(1, 6)
        places = sorted(rng.choice(level) for _ in range(width)) + [right]
        rng.shuffle(places)
        here = [(token if parent == right and i == places.index(right) else rng.randrange(V), parent) for i, parent in enumerate(places)]
        if size + len(here) > limit:
            break
        level = list(range(size + 1, size + 1 + len(here)))
        right = level[places.index(right)]
        nodes += here
        size += len(here)
    return Draft(tuple(token for token, _ in nodes), tuple(parent for _, parent in nodes), (0.4,) * len(nodes))


def unordered(rng, future, limit):
    """Such a tree with its nodes in any order."""
    draft = tree(rng, future, limit)
    order = rng.sample(range(1, len(draft) + 1), len(draft))
    place = {0: 0} | {node: i for i, node in enumerate(order, 1)}
    return Draft(tuple(draft.tokens[n - 1] for n in order), tuple(place[draft.parents[n - 1]] for n in order), draft.confidence)


def wide_tree(rng, future, limit):
    """The truth as the last child of each node, below many others."""
    tokens, parents, parent = [], [], 0
    for token in future:
        others = [t for t in rng.sample(range(V), 20) if t != token]
        if len(tokens) + len(others) + 1 > limit:
            break
        tokens += [*others, token]
        parents += [parent] * (len(others) + 1)
        parent = len(tokens)
    return Draft(tuple(tokens), tuple(parents), (0.5,) * len(tokens))


def empty(rng, future, limit):
    return Draft()


def the_same_for_ever(rng, future, limit):
    return chain([17, 44, 44, 5, 2, 61])


def as_lists(rng, future, limit):
    """What a drafter may make of it that knows no tuples."""
    return Draft(list(future[:limit]), list(range(limit)), [0.5] * limit)  # type: ignore[arg-type]


def senseless_proposals(rng, future, limit):
    return Draft(tuple(future[:limit]), tuple(range(limit)), proposal=tuple("masses" for _ in range(rng.randrange(5))))


NEVER = [always_wrong, empty]
RIGHT = [the_truth, no_confidences, odd_confidences, fewer_confidences, as_lists, senseless_proposals]
OFTEN = [half_the_truth, fewer_parents, fewer_tokens, out_of_vocabulary, no_such_parents, past_the_end, duplicate_siblings, tree, unordered]
OFTEN += [too_much]
RARELY = [wide_tree, random_tokens, the_same_for_ever]


@pytest.mark.parametrize("make", [*NEVER, *RIGHT, *OFTEN, *RARELY], ids=lambda make: make.__name__)
def test_it_changes_nothing(make: Make):
    one = target("llama")
    drafter = Hostile(one, make)
    # 63 and None: all that the batch's budget of tokens leaves room for.
    outputs = check_cell(one, watch(one.speculative(drafter, max_batch_size=9)), (3, 10, 63, None), range(0, COUNT, 2))
    assert not drafter.known
    accepted, forwards, tokens = (total(outputs, f"num_{name}") for name in ("accepted", "forwards", "new_tokens"))
    if make in NEVER:
        assert accepted == 0 and forwards == tokens
    elif make in RIGHT:
        assert accepted == total(outputs, "num_drafted")
        assert all(o.metrics.num_drafted for i, o in enumerate(outputs) if i % 4 < 3 and o.metrics.num_new_tokens > 3)
    else:
        assert accepted > (150 if make in OFTEN else 5)


def test_two_hostile_ones_and_a_model():
    one = target("mistral window")
    drafters = [Hostile(one, lambda rng, f, limit: rng.choice([empty, tree, random_tokens])(rng, f, limit)), one.drafter("near")]
    outputs = check_cell(one, watch(one.speculative(drafters, max_batch_size=16, cache_tokens=640)), (5, 30, None))
    assert total(outputs, "num_accepted") > 500


def test_requests_go_on_without_one_that_raises(caplog):
    one = target("llama")

    def raising(rng, future, limit):
        if rng.random() < 0.05:
            raise LookupError("nothing comes to mind")
        return chain(future[:limit])

    drafter = Hostile(one, raising)
    decoder = watch(one.speculative(drafter))
    indices = range(0, COUNT, 4)
    assert run_streams(one, decoder, indices) == (len(indices), 0)
    assert not drafter.known and not decoder.loop.speculator._failed
    failures = [record for record in caplog.records if record.name == "engine.drafters"]
    assert 0 < len(failures) <= len(indices)  # a drafter that has failed is not asked again for the same request
    assert all("drafter Hostile failed, and" in record.message for record in failures)


def test_one_that_cannot_release_a_request_is_let_be(caplog):
    one = target("llama")

    class Clinging(Hostile):
        def release(self, request):
            raise LookupError("it is gone already")

    decoder = watch(one.speculative(Clinging(one, the_truth)))
    assert run_streams(one, decoder, range(0, 40, 4)) == (10, 0)
    assert sum("drafter Clinging failed to release a request" in record.message for record in caplog.records) == 10


def test_another_is_asked_instead_of_one_that_raises(caplog):
    one = target("llama")

    def raising(rng, future, limit):
        raise LookupError("nothing comes to mind")

    decoder = watch(one.speculative([Hostile(one, raising), Hostile(one, the_truth)]))
    outputs = decoder.generate(one.requests[0][0], params=one.params(0, num_assistant_tokens=3))
    assert total(outputs, "num_accepted") == total(outputs, "num_drafted") > 0
    assert len(caplog.records) == 1


def test_one_that_answers_for_others(caplog):
    one = target("llama")

    class Miscounting(Hostile):
        def draft(self, requests, limits):
            return super().draft(requests, limits)[1:]

    decoder = one.speculative(Miscounting(one, the_truth))
    options = {"seed": 0, "temperature": 1.0}
    (output,) = decoder.generate([5, 6], num_assistant_tokens=2, **options)
    assert output.token_ids == one.decoder.generate([5, 6], **options)[0].token_ids and output.metrics.num_drafted == 0
    (failure,) = caplog.records
    assert str(failure.exc_info[1]) == "drafter Miscounting returned 0 drafts for 1 requests; it must return one for each"
    check_idle(decoder)


@pytest.mark.parametrize(
    "answer",
    [
        None, [None], [[1, 2]], [Draft(("a",), (0,), (0.5,))], [Draft((1.5, None), (0, 1), (0.5, 0.5))], [Draft((1,), ([],), (0.5,))],
        [Draft((1,), (0,), ("x",))],
    ],
)  # fmt: skip
def test_an_answer_that_is_no_draft_is_named(llama: Any, answer: Any, caplog):
    class Broken:
        def draft(self, requests: Any, limits: Any) -> Any:
            return answer

        def release(self, request: Any) -> None: ...

    decoder = Decoder(llama, draft=Broken(), cache_tokens=1024)
    (output,) = decoder.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)
    assert output.token_ids == Decoder(llama, cache_tokens=1024).generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)[0].token_ids
    (failure,) = caplog.records
    assert isinstance(failure.exc_info[1], TypeError) and str(failure.exc_info[1]).startswith("drafter Broken returned")
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks and not decoder.loop.scheduler.has_work


def test_sequences_of_other_tokens_are_not_believed(llama: Any):
    """A draft with the right tokens, and with the sequences of other ones: penalties must see the tokens."""
    options = {"max_new_tokens": 40, "ignore_eos": True, "repetition_penalty": 1.5, "frequency_penalty": 1.0, "temperature": 0.7, "seed": 3}
    plain = Decoder(llama, cache_tokens=4096).generate([1, 2, 3], **options)[0]
    truth = [1, 2, 3, *plain.token_ids]

    class Stale:
        def __init__(self) -> None:
            self.inner = DraftModel(small_llama(seed=1))

        def draft(self, requests: Any, limits: Any) -> Any:
            (wrong,) = self.inner.draft(requests, limits)
            at = requests[0].num_tokens
            return [replace(wrong, tokens=tuple(truth[at : at + len(wrong)]))]

        def release(self, request: Any) -> None:
            self.inner.release(request)

    stale = Stale()
    decoder = Decoder(llama, draft=stale, cache_tokens=4096)
    stale.inner.check(decoder.config, None)
    stale.inner.bind(decoder.config, max_batch_size=8, block_size=16)
    output = decoder.generate([1, 2, 3], num_assistant_tokens=5, **options)[0]
    assert (output.token_ids, output.logprobs) == (plain.token_ids, plain.logprobs)
    assert output.metrics.num_accepted > 20
