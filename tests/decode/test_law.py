"""One token law: a request's tokens depend on nothing but itself."""

from __future__ import annotations

import math
import random

import pytest
from decode.small_models import small_llama
from torch import Tensor

from engine import Decoder, RequestOutput, SamplingParams


def random_request(rng: random.Random, seed: int) -> tuple[list[int], SamplingParams]:
    prompt = [rng.randrange(3, 101) for _ in range(rng.choice([1, 2, 15, 16, 17, 40, 90]))]
    params = SamplingParams(
        max_new_tokens=rng.randint(20, 60),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([None, 1, 5, 40]),
        top_p=rng.choice([None, None, 0.5, 0.9]),
        min_p=rng.choice([None, None, 0.02, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0, 0, 1.5]),
        frequency_penalty=rng.choice([0, 0, -0.5]),
        logit_bias=rng.choice([{}, {5: 3.0, 6: -math.inf, 100: 1.0}]),
        allowed_token_ids=rng.choice([None, None, None, range(0, 101, 2)]),
        suppress_tokens=rng.choice([(), range(0, 101, 5)]),
        bad_words=rng.choice([(), [[t, u] for t in range(101) for u in range(t % 11, 101, 11)]]),
        min_new_tokens=rng.choice([0, 4, 20]),
        stop_token_ids=rng.choice([(), (), range(60, 70)]),
        logprobs=rng.choice([0, 0, 1, 7]),
        logits_processor=rng.choice([None, None, None, towards_the_past]),
        seed=seed,
        ignore_eos=rng.choice([True, True, False]),
    )
    return prompt, params


def towards_the_past(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor that depends on all tokens so far."""
    logits[token_ids[-3:]] += len(token_ids) % 3
    return logits


@pytest.fixture(scope="module")
def requests() -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(5)
    return [random_request(rng, seed) for seed in range(33)]


@pytest.fixture(scope="module")
def alone(decoder: Decoder, requests) -> list[tuple]:
    """What each request gives by itself."""
    outputs = [decoder.generate(prompt, params=params)[0] for prompt, params in requests]
    assert len({tuple(o.token_ids[:20]) for o in outputs}) > 25  # the model is not so dull that everything agrees
    assert all(o.error is None for o in outputs)
    return [drawn(o) for o in outputs]


def drawn(output: RequestOutput) -> tuple:
    return output.token_ids, output.logprobs, output.processed_logprobs, output.top_logprobs, output.processed_top_logprobs


def same(decoder: Decoder, requests, alone) -> list:
    outputs = decoder.generate([prompt for prompt, _ in requests], params=[params for _, params in requests])
    # The logits agree to the bit, so the log-probabilities do.
    assert [drawn(o) for o in outputs] == alone
    return outputs


def test_in_a_batch_of_others(decoder, requests, alone):
    same(decoder, requests, alone)


def test_in_any_order(decoder, requests, alone):
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    same(decoder, [requests[i] for i in order], [alone[i] for i in order])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_with_prefill_chunks(llama, requests, alone, chunk: int):
    same(Decoder(llama, cache_tokens=4096, prefill_chunk=chunk), requests, alone)


def test_with_a_small_batch_and_other_blocks(llama, requests, alone):
    same(Decoder(llama, cache_tokens=4096, max_batch_size=3, max_batch_tokens=5, block_size=32), requests, alone)


def test_across_preemptions(llama, requests, alone):
    # 10 blocks: two or three of these requests at a time, so the young are preempted again and again.
    outputs = same(Decoder(llama, cache_tokens=160), requests, alone)
    assert sum(o.metrics.num_preemptions for o in outputs) > 3


def test_with_any_number_of_threads(decoder, requests, alone):
    from engine.kernels import cpu

    if decoder.ops.chosen["linear"] != "cpu":
        pytest.skip("the C++ kernels are not built")
    before = cpu._cpu.num_threads()
    try:
        for threads in (1, 3):
            cpu._cpu.set_num_threads(threads)
            same(decoder, requests, alone)
    finally:
        cpu._cpu.set_num_threads(before)


def test_samples_of_one_prompt_differ_and_replay_alone(decoder):
    prompt = [5, 6, 7] * 7
    options = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    outputs = decoder.generate(prompt, num_return_sequences=6, seed=11, **options)
    assert [o.index for o in outputs] == list(range(6))
    assert len({tuple(o.token_ids) for o in outputs}) == 6
    for output in outputs:
        replayed = decoder.generate(prompt, seed=output.seed, stream=output.stream, **options)[0]
        assert (replayed.token_ids, replayed.logprobs) == (output.token_ids, output.logprobs)


def test_samples_share_their_prompts_blocks(llama):
    decoder = Decoder(llama, cache_tokens=4096)
    stream = decoder.stream([9] * 64, num_return_sequences=8, max_new_tokens=40, temperature=1.0, ignore_eos=True)
    next(stream)
    # 4 full blocks of prompt once, and for each sample what it writes itself.
    assert decoder.loop.pool.num_blocks - decoder.loop.pool.num_free <= 4 + 8
    stream.close()
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def test_more_samples_than_the_batch_holds(llama, decoder):
    options = {"num_return_sequences": 7, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    few = Decoder(llama, cache_tokens=4096, max_batch_size=3).generate([4, 5], **options)
    assert [o.token_ids for o in few] == [o.token_ids for o in decoder.generate([4, 5], **options)]


def test_prompts_of_one_call_have_their_own_noise_and_replay_alone(decoder):
    options = {"max_new_tokens": 16, "temperature": 1.0, "ignore_eos": True}
    outputs = decoder.generate([[8, 9]] * 4, seed=1, **options)
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    for output in outputs:
        assert decoder.generate([8, 9], seed=output.seed, **options)[0].token_ids == output.token_ids


def test_an_unseeded_draw_follows_torch_and_reports_its_seed(decoder):
    import torch

    options = {"max_new_tokens": 16, "temperature": 1.0}
    torch.manual_seed(3)
    first = decoder.generate([8, 9], **options)[0]
    second = decoder.generate([8, 9], **options)[0]
    torch.manual_seed(3)
    again = decoder.generate([8, 9], **options)[0]
    assert first.token_ids == again.token_ids != second.token_ids
    assert decoder.generate([8, 9], seed=second.seed, **options)[0].token_ids == second.token_ids


def test_another_model_of_the_same_shape_gives_other_tokens(decoder, requests, alone):
    """The tests above can tell: they fail when the logits are others."""
    other = Decoder(small_llama(seed=1), cache_tokens=4096)
    prompt, params = requests[0]
    assert other.generate(prompt, params=params)[0].token_ids != alone[0][0]


def test_each_token_is_what_the_law_gives_at_its_position(decoder, llama):
    """The loop hands the sampler the request's own seed and stream and the token's absolute position: drawn again by the oracle from
    transformers' logits."""
    import torch

    from engine import kernels

    prompt = [5, 6, 7, 8]
    options = {"max_new_tokens": 40, "temperature": 0.9, "top_k": 20, "seed": 2**63 + 5, "ignore_eos": True}
    for output in decoder.generate(prompt, num_return_sequences=2, **options):
        n = len(output.token_ids)
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        drawn = kernels.select("cpu", "reference").sample(
            logits.contiguous(),
            torch.full((n,), 0.9),
            torch.full((n,), 20, dtype=torch.int32),
            torch.ones(n),
            torch.zeros(n),
            torch.full((n,), 5 - 2**63, dtype=torch.int64),
            torch.arange(len(prompt), len(prompt) + n, dtype=torch.int32),
            torch.full((n,), output.stream, dtype=torch.int32),
        )
        assert drawn.tokens.tolist() == output.token_ids
