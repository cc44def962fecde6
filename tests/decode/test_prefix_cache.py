"""The prefix cache of a decoder: the same bits with a hit and without, for every kind of request, and nothing stale."""

from __future__ import annotations

import random

import pytest
import torch
from decode.small_models import small_llama

from engine import BeamParams, Decoder, DraftModel, PromptLookup, RequestOutput, SamplingParams

SHARED = [(7 * i * i + 3 * i) % 90 + 5 for i in range(100)]

KINDS: dict[str, list[SamplingParams]] = {
    "greedy": [SamplingParams(max_new_tokens=20, ignore_eos=True, logprobs=3)],
    "sampled": [SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=5)],
    "several": [SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=5, num_return_sequences=3)],
    "beams": [BeamParams(max_new_tokens=12, num_beams=4, num_return_sequences=2)],
    "groups": [BeamParams(max_new_tokens=12, num_beams=4, num_beam_groups=2, diversity_penalty=0.5)],
    "stochastic beams": [BeamParams(max_new_tokens=12, num_beams=3, do_sample=True, seed=5)],
}
KINDS["all"] = [params for kind in list(KINDS) for params in KINDS[kind]]


def drawn(outputs: list[RequestOutput]) -> list[tuple]:
    return [(o.token_ids, o.logprobs, o.processed_logprobs, o.top_logprobs, o.text, o.finish_reason, o.beam_score) for o in outputs]


def prompts(count: int) -> list[list[int]]:
    """Lengths around the edges of blocks, with and without an end of their own."""
    ends = [[], [3], [4] * 16, [5] * 17]
    return [SHARED[: (100, 96, 97, 95, 64, 31, 16, 15)[i % 8]] + ends[i % len(ends)] for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_bits_with_a_hit_and_without(llama, kind: str, dtype: torch.dtype):
    options = {"cache_tokens": 4096, "kv_dtype": dtype}
    plain, cached = Decoder(llama, **options), Decoder(llama, prefix_cache=True, **options)
    given = prompts(8)
    params = [KINDS[kind][i % len(KINDS[kind])] for i in range(8)]
    expected = drawn(plain.generate(given, params=params))
    for _ in range(2):
        outputs = cached.generate(given, params=params)
        assert drawn(outputs) == expected
        cached.loop.scheduler.check()
    # By now all that could be there was there: the full blocks before the last token, of beam groups before the last two.
    for output, p in zip(outputs, [each for each in params for _ in range(each.num_return_sequences)], strict=True):
        computed = 2 if getattr(p, "num_beam_groups", 1) > 1 else 1
        assert output.metrics.num_cached_tokens == (output.metrics.num_prompt_tokens - computed) // 16 * 16
    assert plain.stats().num_cached_tokens == 0 < cached.stats().num_cached_tokens


@pytest.mark.parametrize("draft", ["lookup", "model", "tree"])
def test_with_drafts(llama, draft: str):
    drafter = {"lookup": PromptLookup, "model": lambda: DraftModel(llama), "tree": lambda: DraftModel(small_llama(seed=1), width=2)}[
        draft
    ]()
    plain, cached = Decoder(llama, cache_tokens=4096), Decoder(llama, cache_tokens=4096, draft=drafter, prefix_cache=True)
    params = [SamplingParams(max_new_tokens=60, ignore_eos=True, temperature=t, seed=1) for t in (0.0, 0.5, 1.0, 0.0)]
    speculative = [
        SamplingParams(max_new_tokens=60, ignore_eos=True, temperature=t, seed=1, num_assistant_tokens=7) for t in (0.0, 0.5, 1.0, 0.0)
    ]
    expected = plain.generate(prompts(4), params=params)
    for _ in range(2):
        outputs = cached.generate(prompts(4), params=speculative)
        assert drawn(outputs) == drawn(expected)
        cached.loop.scheduler.check()
    assert sum(o.metrics.num_accepted for o in outputs) > 5
    # Accepted tokens are cached as well: the text so far, as the next turn of a conversation has it, is found up to its end.
    turns = [prompt + o.token_ids for prompt, o in zip(prompts(4), outputs, strict=True)]
    again = cached.generate(turns, max_new_tokens=5, ignore_eos=True)
    assert drawn(again) == drawn(plain.generate(turns, max_new_tokens=5, ignore_eos=True))
    assert all(o.metrics.num_cached_tokens >= (len(turn) - 1) // 16 * 16 - 16 for o, turn in zip(again, turns, strict=True))


def test_under_preemption_and_for_want_of_memory(llama):
    plain, small = Decoder(llama, cache_tokens=4096), Decoder(llama, cache_tokens=256, prefix_cache=True)
    rng = random.Random(0)
    given = [SHARED[: rng.choice([20, 40, 100])] + [rng.randrange(5, 90) for _ in range(rng.choice([0, 5, 20]))] for _ in range(24)]
    params = [SamplingParams(max_new_tokens=rng.randint(10, 50), temperature=1.0, seed=i, ignore_eos=True) for i in range(24)]
    outputs = small.generate(given, params=params)
    assert drawn(outputs) == drawn(plain.generate(given, params=params))
    assert sum(o.metrics.num_preemptions for o in outputs) > 3 and small.stats().num_cached_tokens > 500
    small.loop.scheduler.check()
    assert small.loop.pool.num_free == small.loop.pool.num_blocks


def test_requests_that_run_share_as_well(llama):
    decoder = Decoder(llama, cache_tokens=4096, prefix_cache=True)
    streams = [decoder.stream(SHARED[:64] + [i], max_new_tokens=30, ignore_eos=True) for i in range(8)]
    for stream in streams:
        next(stream)
    pool = decoder.loop.pool
    assert pool.num_blocks - pool.num_free <= 4 + 8 * 2
    for stream in streams:
        stream.close()
    assert pool.num_free == pool.num_blocks and pool.num_cached >= 4


def test_it_is_off_where_weights_may_change_and_follows_a_reset():
    model = small_llama(seed=5)
    decoder, cached = Decoder(model, cache_tokens=1024), Decoder(model, cache_tokens=1024, prefix_cache=True)
    options = {"max_new_tokens": 10, "ignore_eos": True}
    before = drawn(decoder.generate(SHARED, **options))
    assert drawn(cached.generate(SHARED, **options)) == before and decoder.loop.pool.num_cached == 0
    stream = cached.stream(SHARED, max_new_tokens=20, ignore_eos=True)
    tokens = next(stream).token_ids
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    after = drawn(decoder.generate(SHARED, **options))
    assert after != before
    cached.reset_prefix_cache()
    assert cached.loop.pool.num_cached == 0
    assert drawn(cached.generate(SHARED, **options)) == after
    # One that was running is computed anew from the tokens it has: nothing of it is from before.
    whole = SHARED + tokens
    rest = [t for event in stream for t in event.token_ids]
    assert rest == decoder.generate(whole, max_new_tokens=19, ignore_eos=True)[0].token_ids
    decoder.loop.pool.check([])
    cached.loop.pool.check([])


def test_a_model_by_path_has_it(bundled):
    assert bundled.loop.scheduler.prefix_cache and not Decoder.bundled(cache_tokens=64, prefix_cache=False).loop.scheduler.prefix_cache


def test_salts_of_calls(llama):
    decoder = Decoder(llama, cache_tokens=1024, prefix_cache=True)
    found = []
    for salt in (None, "a", "b", "a", None):
        (output,) = decoder.generate(SHARED, max_new_tokens=2, cache_salt=salt)
        found.append(output.metrics.num_cached_tokens)
    assert found == [0, 0, 0, 96, 96]


def test_no_reset_in_the_middle_of_a_step(llama):
    decoder = Decoder(llama, cache_tokens=1024, prefix_cache=True)

    def resetting(token_ids, logits):
        decoder.reset_prefix_cache()

    (output,) = decoder.generate([5, 6], logits_processor=resetting)
    assert output.error is not None and "this decoder is in the middle of a step" in output.error


@pytest.mark.parametrize("value", [1, "on", 0.0])
def test_a_switch_that_is_none(llama, value):
    with pytest.raises(TypeError, match="prefix_cache is .*; it must be True, False or None"):
        Decoder(llama, prefix_cache=value)
