"""Block verification and what requests ask for: every control holds, greedy requests and trees are verified by replay."""

from __future__ import annotations

import math
import re

import pytest
from decode.speculation_cases import (
    COUNT,
    STOPS,
    Target,
    check_idle,
    check_metrics,
    compare,
    kinds,
    outcome,
    target,
    total,
    watch,
)

from engine import Draft, RequestOutput

KINDS = list(kinds(101, STOPS["small"]))
INDICES = [i for i in range(COUNT) if "processor" not in KINDS[i // 8]]


def run(one: Target, draft, num_assistant_tokens: int | None, indices=INDICES, **options) -> list[RequestOutput]:
    preempt_every = options.pop("preempt_every", 0)
    decoder = watch(one.speculative(draft, **options), preempt_every)
    params = [one.params(i, verification="block", num_assistant_tokens=num_assistant_tokens) for i in indices]
    outputs = decoder.generate([one.requests[i][0] for i in indices], params=params)
    for output in outputs:
        check_metrics(output)
    check_idle(decoder)
    return outputs


def check_controls(one: Target, i: int, output: RequestOutput) -> None:
    prompt, options = one.requests[i]
    tokens, kind = output.token_ids, KINDS[i // 8]
    assert output.error is None and 0 < len(tokens) <= options["max_new_tokens"]
    assert all(math.isfinite(x) and x <= 0 for x in (*output.logprobs, *output.processed_logprobs))
    ends = {*options.get("stop_token_ids", ()), *(() if options["ignore_eos"] else one.decoder.config.eos_token_ids)}
    assert not ends.intersection(tokens[:-1])
    if output.finish_reason == "length":
        assert len(tokens) == options["max_new_tokens"] and tokens[-1] not in ends
    assert len(tokens) >= min(options.get("min_new_tokens", 0), options["max_new_tokens"]) or kind == "regex"
    assert set(tokens) <= set(options.get("allowed_token_ids", range(one.vocab_size)))
    assert not set(tokens).intersection(options.get("suppress_tokens", ()))
    assert not {t for t, bias in options.get("logit_bias", {}).items() if bias == -math.inf}.intersection(tokens)
    prefix = options.get("prefix_token_ids", [])
    assert tokens[: len(prefix)] == prefix[: len(tokens)]
    whole = prompt + tokens
    pairs = list(zip(whole, whole[1:], strict=False))
    assert not {tuple(word) for word in options.get("bad_words", ())}.intersection(pairs[len(prompt) - 1 :])
    if kind == "no_repeat_ngram_size":
        assert len(set(pairs[len(prompt) - 1 :])) == len(tokens)
    stops = (options["stop"],) if isinstance(options.get("stop"), str) else options.get("stop", ())
    if "min_new_tokens" not in options:
        assert output.text is not None and not any(stop in output.text for stop in stops)
    if kind == "regex" and output.finish_reason == "stop":
        assert re.fullmatch(options["regex"], output.text or "")
    if "logprobs" in options:
        assert output.top_logprobs is not None and all(len(top) == options["logprobs"] for top in output.top_logprobs)
        for token, raw, top in zip(tokens, output.logprobs, output.top_logprobs, strict=True):
            assert math.isclose(top.get(token, raw), raw, abs_tol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [("near", 5), ("near", None), ("same", 10), ("suffix", 4), ("list", 7), ("tree", 6)])
def test_every_control_holds(kind: str, count: int | None):
    one = target("llama")
    outputs = run(one, one.drafter(kind), count, max_batch_size=16)
    for i, output in zip(INDICES, outputs, strict=True):
        check_controls(one, i, output)
        if one.requests[i][1]["temperature"] == 0:
            assert [outcome(output)] == one.plain([i])
    sampled = [o for i, o in zip(INDICES, outputs, strict=True) if one.requests[i][1]["temperature"] > 0]
    assert count is None or total(sampled, "num_accepted") > (20 if kind == "suffix" else 400)


def test_a_chain_of_fixed_length_depends_on_the_request_alone():
    one = target("llama")
    indices = INDICES[::3]
    alone = run(one, one.drafter("near"), 4, indices, max_batch_size=1)
    together = run(one, one.drafter("near"), 4, indices, max_batch_size=32)
    compare([outcome(o) for o in together], [outcome(o) for o in alone], indices)
    assert [o.token_ids for o in alone] != [tokens for tokens, *_ in one.plain(indices)]  # another stream of tokens


def test_across_preemptions():
    one = target("llama")
    outputs = run(one, one.drafter("near"), 6, max_batch_size=16, cache_tokens=160, preempt_every=4)
    assert total(outputs, "num_preemptions") > 100
    for i, output in zip(INDICES, outputs, strict=True):
        check_controls(one, i, output)


class Bushes:
    """Drafts no chain, but trees that hold what will come."""

    def __init__(self, one: Target) -> None:
        self.one = one

    def draft(self, requests, limits) -> list[Draft]:
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            depth = limit // 2
            future = self.one.tokens(request)[request.num_tokens :][:depth]
            tokens = [t for token in future for t in ((token + 1) % 101, token)]
            parents = [2 * level for level in range(len(future)) for _ in range(2)]
            drafts.append(Draft(tuple(tokens), tuple(parents), (0.5,) * len(tokens)))
        return drafts

    def release(self, request) -> None: ...


def test_trees_are_verified_by_replay():
    """So where nothing but trees is drafted, the tokens are those of plain decoding."""
    one = target("llama")
    # Not where a sibling may be left out because nothing goes on after it.
    indices = [i for i in INDICES if not one.requests[i][1].keys() & {"stop_token_ids", "json_schema", "regex", "grammar"}]
    indices = [i for i in indices if one.requests[i][1]["ignore_eos"]]
    outputs = run(one, Bushes(one), 12, indices, max_batch_size=16)
    compare([outcome(o) for o in outputs], one.plain(indices), indices)
    assert total(outputs, "num_accepted") > 500
