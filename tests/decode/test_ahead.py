"""Steps as on a GPU, over a device whose work is done at times that the host does not know: the same tokens, graphs, one step behind."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decode.fake_device import FakeDevice, on_fake_device
from decode.small_models import small_llama

from engine import Decoder, DraftModel, PromptLookup, choose_runner, kernels
from engine.drafters.draft import Draft
from engine.graph_runner import GraphRunner, Sizes, _columns, ladder
from engine.runner import Runner

PROMPTS = [[3, 4, 5], list(range(3, 60)), [99], [7] * 30, [5, 9] * 20]
# Those that the device draws for, by the head and by `sample`, and those that the host puts together; and all kinds in one batch.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 3},
    "top-k": {"temperature": 0.9, "top_k": 7, "seed": 3},
    "several": {"temperature": 0.8, "top_p": 0.8, "seed": 4, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.7, "seed": 1},
    "bias": {"logit_bias": {5: -3.0}},
    "min length": {"min_new_tokens": 9, "temperature": 1.5, "seed": 2},
    "top log-probabilities": {"logprobs": 3, "temperature": 1.0, "seed": 1},
    "processor": {"logits_processor": lambda tokens, logits: -logits, "temperature": 1.0, "seed": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "one token": {"max_new_tokens": 1},
    "ends": {"temperature": 2.0, "seed": 9, "stop_token_ids": list(range(2, 30))},
}


@pytest.fixture(scope="module")
def model():
    return small_llama()


def both(
    model: Any, options: dict[str, Any], draft: Any = None, **decoder_options: Any
) -> tuple[list[Any], list[Any], Decoder, FakeDevice]:
    """Outputs of the decoder as it is, and of one on the fake device."""
    options = {"max_new_tokens": 40, **options}
    drafts = [{} if draft is None else {"draft": draft()} for _ in range(2)]
    expected = Decoder(model, cache_tokens=4096, **drafts[0]).generate(PROMPTS, **options)
    decoder = Decoder(model, cache_tokens=4096, **drafts[1], **decoder_options)
    device = on_fake_device(decoder)
    outputs = decoder.generate(PROMPTS, **options)
    decoder.loop.pool.check([])
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks
    return outputs, expected, decoder, device


def assert_same(outputs: list[Any], expected: list[Any]) -> None:
    for output, other in zip(outputs, expected, strict=True):
        assert (output.token_ids, output.finish_reason, output.error) == (other.token_ids, other.finish_reason, other.error)
        assert output.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert output.processed_logprobs == pytest.approx(other.processed_logprobs, abs=1e-5)
        assert (output.top_logprobs is None) == (other.top_logprobs is None)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_tokens(model, name):
    outputs, expected, _, device = both(model, OPTIONS[name])
    assert_same(outputs, expected)
    assert name == "one token" or device.num_replays > 0


@pytest.mark.parametrize("chunk", [5, 33])
def test_prompts_in_chunks_beside_decoding(model, chunk):
    outputs, expected, *_ = both(model, OPTIONS["sampled"], prefill_chunk=chunk, max_batch_tokens=64)
    assert_same(outputs, expected)


def test_preemption_by_a_small_cache(model):
    expected = Decoder(model, cache_tokens=4096).generate(PROMPTS, max_new_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
    decoder = Decoder(model, cache_tokens=208)
    on_fake_device(decoder)
    outputs = decoder.generate(PROMPTS, max_new_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
    assert_same(outputs, expected)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


@pytest.mark.parametrize("verification", ["replay", "block"])
@pytest.mark.parametrize("width", [1, 3])
def test_drafts(model, width, verification):
    options = {"temperature": 0.7, "seed": 3, "verification": verification, "num_assistant_tokens": 3}
    outputs, expected, decoder, device = both(model, options, draft=lambda: [PromptLookup(), DraftModel(model, width=width)])
    assert_same(outputs, expected)
    assert decoder.stats().num_accepted > 0 and device.num_replays > 0


class Always:
    """Drafts whatever it may."""

    def draft(self, requests, limits):
        return [Draft.chain([7] * limit, [0.99] * limit) for limit in limits]

    def release(self, request):
        pass


@pytest.mark.parametrize("top_k", [None, 5])
def test_rows_of_followers_beside_those_of_drafts(model, top_k):
    """More rows than a step may have tokens."""
    found = []
    for fake in (False, True):
        decoder = Decoder(model, cache_tokens=4096, max_batch_size=16, max_batch_tokens=16, draft=Always())
        if fake:
            on_fake_device(decoder)
        options = {"temperature": 1.0, "seed": 3, "top_k": top_k, "ignore_eos": True}
        first = decoder.submit([[7, 8, 9 + i] for i in range(4)], max_new_tokens=60, num_assistant_tokens=20, **options)
        for _ in range(6):
            decoder.step()
        second = decoder.submit([[5, 6]], max_new_tokens=8, num_return_sequences=12, **options)
        while decoder.has_work:
            decoder.step()
        found.append([(o.token_ids, o.finish_reason, o.error) for o in (*first.outputs, *second.outputs)])
    assert found[0] == found[1]


def test_a_processor_is_not_asked_for_a_request_that_has_ended(model):
    decoder = Decoder(model, cache_tokens=1024)
    on_fake_device(decoder)
    calls = []

    def processor(tokens, logits):
        calls.append(len(tokens))
        return logits

    decoder.submit([[3, 4, 5]], max_new_tokens=30, ignore_eos=True)
    for _ in range(3):
        decoder.step()
    submission = decoder.submit([[6, 7]], max_new_tokens=30, ignore_eos=True, logits_processor=processor)
    while not calls:
        decoder.step()
    decoder.abort(submission)
    before = len(calls)
    while decoder.has_work:
        decoder.step()
    assert len(calls) == before


def test_the_next_step_begins_before_the_tokens_of_the_last_are_there(model, monkeypatch):
    decoder = Decoder(model, cache_tokens=1024)
    device = on_fake_device(decoder)
    device.rng = SimpleNamespace(random=lambda: 1.0)  # type: ignore[assignment]  # nothing arrives before it is waited for
    behind = []
    start = GraphRunner.start

    def watched(self, plan):
        before = device.asked - device.done
        started = start(self, plan)
        behind.append(before)
        return started

    monkeypatch.setattr(GraphRunner, "start", watched)
    decoder.generate([[3, 4, 5]], max_new_tokens=20, ignore_eos=True)
    assert len(behind) == 20, "each token takes a step, and nothing is computed behind the last"
    assert behind[0] == 0 and all(behind[1:]), "copies of the step before were still on their way"


def test_sizes_come_again_as_graphs(model):
    decoder = Decoder(model, cache_tokens=4096)
    device = on_fake_device(decoder)
    for count in (3, 4, 3, 4):
        decoder.generate([[i + 3, 4, 5] for i in range(count)], max_new_tokens=12, ignore_eos=True)
    assert device.num_captures == 1, "three and four sequences are padded to the same size"
    assert device.num_replays == 4 * 11 - 1  # the first step of decoding has compiled what it needs, and prompts have sizes of their own


def test_the_ladder_covers_every_size_closely():
    for n in range(1, 3000):
        assert n <= ladder(n) <= max(n + 8, 1.25 * n)
        assert ladder(ladder(n)) == ladder(n)
    assert len({ladder(n) for n in range(1, 257)}) < 30  # so many graphs at most


def test_numbers_lie_apart_and_aligned():
    for sizes in (Sizes(1, 1, 1, 32, False, "fused"), Sizes(3, 7, 5, 128, True, "filtered"), Sizes(2, 9, 0, 32, True, "none")):
        columns, end = _columns(sizes), 0
        for column in columns:
            assert end <= column.start < end + 16 and column.start % 16 == 0
            end = column.start + column.words


class TestChoice:
    """Which runner a model on a GPU gets. There is no GPU here: the model only says that it is on one."""

    @staticmethod
    def choose(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, ops: Any) -> Runner:
        monkeypatch.setattr(choose_runner, "CudaDevice", lambda device: FakeDevice(random.Random(0)))
        model: Any = SimpleNamespace(device=torch.device("cuda", 0), ops=ops, addresses=tuple)
        return choose_runner.choose_runner(model, decoder.loop.cache, decoder.loop.scheduler, 256, None)

    def test_graphs_without_any_option(self, model, monkeypatch, caplog):
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        kernels.select.cache_clear()
        with caplog.at_level(logging.WARNING):
            ops = kernels.select("cuda")
            runner = self.choose(monkeypatch, Decoder(model, cache_tokens=256), ops)
        kernels.select.cache_clear()
        assert type(runner) is GraphRunner

    def test_without_triton_one_line_and_one_step_after_the_other(self, model, monkeypatch, caplog):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("engine.kernels.triton.unavailable", lambda device_type: "the package triton is not installed")
        kernels.select.cache_clear()
        with caplog.at_level(logging.WARNING):
            ops = kernels.select("cuda")
            runner = self.choose(monkeypatch, Decoder(model, cache_tokens=256), ops)
        kernels.select.cache_clear()
        assert type(runner) is Runner
        said = [record.getMessage() for record in caplog.records if record.name.startswith("engine")]
        assert len(said) == 1 and "triton: the package triton is not installed" in said[0]

    def test_a_cpu_has_steps_that_are_done_when_they_return(self, model):
        assert type(Decoder(model, cache_tokens=256).loop.runner) is Runner
