"""Decoding over an int8 cache: near the exact one, and by the token law whatever the chunks, the batch, the drafts and the beams."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from decode.small_models import small_llama

from engine import BeamParams, Decoder, DraftModel, SamplingParams

PROMPTS = [list(range(3, 40)), list(range(50, 90)), [7] * 20, [5, 6]]
SAMPLED = [SamplingParams(seed=s, temperature=1.0, max_new_tokens=24) for s in range(len(PROMPTS))]


@functools.cache
def decoder(**options) -> Decoder:
    return Decoder(small_llama(seed=6), kv_dtype=torch.int8, **{"cache_tokens": 1024, **options})


def test_near_the_exact_cache():
    exact = Decoder(small_llama(seed=6), cache_tokens=1024)
    assert decoder().loop.cache.dtype == torch.int8
    a, b = ([o.logprobs[0] for o in d.generate(PROMPTS, max_new_tokens=1)] for d in (decoder(), exact))
    assert a != b
    assert a == pytest.approx(b, abs=0.05)


@pytest.mark.parametrize("options", [{"prefill_chunk": 3}, {"max_batch_size": 1}, {"cache_tokens": 128, "block_size": 32}], ids=str)
def test_the_token_law(options: dict):
    """Also where requests are preempted and computed again, so that quantised keys and values are."""
    other = decoder(**options)
    a, b = ([o.token_ids for o in d.generate(PROMPTS, params=SAMPLED)] for d in (decoder(), other))
    assert a == b


def test_drafts_change_nothing():
    """Trees by the model with noise on its weights: what is accepted is moved within the cache, scales with it."""
    drafting_model = small_llama(seed=6)
    with torch.no_grad():
        drafting_model.lm_head.weight.add_(0.05 * torch.randn_like(drafting_model.lm_head.weight))
    plain = [o.token_ids for o in decoder().generate(PROMPTS, params=SAMPLED)]
    drafting = decoder(draft=DraftModel(drafting_model, width=3))
    outputs = drafting.generate(PROMPTS, params=[replace(p, num_assistant_tokens=8) for p in SAMPLED])
    assert [o.token_ids for o in outputs] == plain
    assert sum(o.metrics.num_accepted for o in outputs) > 10


def test_beams_share_and_copy_blocks():
    params = BeamParams(num_beams=4, max_new_tokens=20)
    together = decoder().generate(PROMPTS, params=params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert decoder().generate([prompt], params=params)[0].token_ids == output.token_ids
