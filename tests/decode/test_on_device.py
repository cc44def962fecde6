"""What a graph of a step must not have taken in when it was captured: numbers, requests, weights. On a device whose work is done late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode.fake_device import on_fake_device
from decode.small_models import small_llama

from engine import Decoder, SamplingParams

PROMPTS = [[5, 6, 7], list(range(10, 27)), [9] * 33]
KINDS: dict[str, dict[str, Any]] = {
    "the head draws": {"temperature": 1.0},
    "filtered": {"temperature": 1.5, "top_k": 30, "top_p": 0.9},
    "the host draws": {"temperature": 1.0, "repetition_penalty": 1.3, "logprobs": 1},
}


def given(kind: str, seed: int) -> list[SamplingParams]:
    return [SamplingParams(**KINDS[kind], seed=seed + i, max_new_tokens=12, ignore_eos=True) for i in range(len(PROMPTS))]


def decode(decoder: Decoder, kind: str, seed: int) -> list[list[int]]:
    outputs = decoder.generate(PROMPTS, params=given(kind, seed))
    assert all(output.error is None for output in outputs)
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_replay_other_seeds_and_other_requests(kind: str) -> None:
    expected = {seed: decode(Decoder(small_llama(), cache_tokens=512), kind, seed) for seed in (0, 100)}
    assert expected[0] != expected[100]
    decoder = Decoder(small_llama(), cache_tokens=512)
    device = on_fake_device(decoder)
    assert decode(decoder, kind, 0) == expected[0]
    captures, replays = device.num_captures, device.num_replays
    assert decode(decoder, kind, 100) == expected[100]
    assert decode(decoder, kind, 0) == expected[0]
    assert device.num_captures == captures > 0 and device.num_replays >= 2 * replays


def test_graphs_see_weights_that_change_in_place() -> None:
    live, other = small_llama(), small_llama(seed=9)
    decoder = Decoder(live, cache_tokens=512)
    device = on_fake_device(decoder)
    before = decode(decoder, "the head draws", 0)
    captures = device.num_captures
    with torch.no_grad():
        for mine, its in zip(live.parameters(), other.parameters(), strict=True):
            mine.copy_(its)
    assert decode(decoder, "the head draws", 0) == decode(Decoder(other, cache_tokens=512), "the head draws", 0) != before
    assert device.num_captures == captures > 0


def test_graphs_are_captured_anew_where_weights_have_other_storage() -> None:
    live, other = small_llama(), small_llama(seed=9)
    decoder = Decoder(live, cache_tokens=512)
    device = on_fake_device(decoder)
    decode(decoder, "the head draws", 0)
    captures = device.num_captures
    for mine, its in zip(live.parameters(), other.parameters(), strict=True):
        mine.data = its.data.clone()
    assert decode(decoder, "the head draws", 0) == decode(Decoder(other, cache_tokens=512), "the head draws", 0)
    assert device.num_captures == 2 * captures
