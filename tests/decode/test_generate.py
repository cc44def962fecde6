"""`Decoder.generate` and `stream`: results beside transformers, ends, text, and events."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from decode.small_models import small_llama

from engine import Decoder, SamplingParams


def hf_greedy(model, prompt: list[int], n: int, **options) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers(decoder, llama):
    prompts = [[3, 4, 5], list(range(3, 60)), [99], [7] * 30]
    outputs = decoder.generate(prompts, max_new_tokens=60)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == hf_greedy(llama, prompt, 60)


def test_repetition_penalty_equals_transformers(decoder, llama):
    for penalty in (0.8, 1.3):
        output = decoder.generate([3, 4, 5, 4], max_new_tokens=40, repetition_penalty=penalty)[0]
        assert output.token_ids == hf_greedy(llama, [3, 4, 5, 4], 40, repetition_penalty=penalty)


def test_logprobs_are_the_models_own(decoder, llama):
    prompt = [3, 4, 5]
    output = decoder.generate(prompt, max_new_tokens=12, temperature=0.5, top_k=3, repetition_penalty=1.2, seed=1)[0]
    with torch.no_grad():
        logits = llama(torch.tensor([prompt + output.token_ids])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[range(2, 2 + len(output.token_ids)), output.token_ids]
    assert torch.allclose(torch.tensor(output.logprobs, dtype=torch.float64), expected, atol=1e-4)
    assert output.cumulative_logprob == pytest.approx(sum(output.logprobs))


def test_the_forms_of_prompts(decoder):
    options = {"max_new_tokens": 8}
    first, second = (decoder.generate(p, **options)[0].token_ids for p in ([5, 6, 7], [8, 9]))
    both = [first, second]

    def ids(prompts, **more):
        return [o.token_ids for o in decoder.generate(prompts, **more, **options)]

    assert ids([[5, 6, 7], [8, 9]]) == both
    assert ids((5, 6, 7)) == [first]
    assert ids(torch.tensor([5, 6, 7])) == [first]
    assert ids([torch.tensor([5, 6, 7]), [8, 9]]) == both
    left, right = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[5, 6, 7], [8, 9, 0]])
    assert ids(left, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]])) == both
    assert ids(right, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()) == both
    assert ids(torch.tensor([[5, 6, 7]], dtype=torch.int32)) == [first]
    assert ids(np.array([[5, 6, 7]])) == ids(list(np.array([5, 6, 7]))) == [first]
    huge_k = decoder.generate([5, 6, 7], top_k=2**40, stop=None, temperature=np.float64(0.0), seed=np.int64(3), **options)
    assert huge_k[0].token_ids == first


def test_greedy_is_never_random(decoder):
    for options in ({}, {"do_sample": False, "temperature": 2.0}, {"temperature": 0.0}, {"do_sample": True, "temperature": 0}):
        results = {tuple(decoder.generate([5, 6], max_new_tokens=10, **options)[0].token_ids) for _ in range(3)}
        assert results == {tuple(decoder.generate([5, 6], max_new_tokens=10)[0].token_ids)}


def test_ends(decoder):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 0}
    free = decoder.generate([5, 6], ignore_eos=True, **options)[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 30 and free.stop_reason is None
    stop, other = free.token_ids[10], free.token_ids[20]
    for more, ends in (
        ({"ignore_eos": True, "stop_token_ids": [stop]}, [stop]),
        ({"eos_token_id": stop}, [stop]),
        ({"stop_id": stop}, [stop]),
        ({"eos_token_id": [stop, other]}, [stop, other]),
        ({"eos_token_id": other, "stop_token_ids": [stop]}, [stop, other]),
    ):
        output = decoder.generate([5, 6], **options, **more)[0]
        length = min(free.token_ids.index(end) for end in ends) + 1
        assert output.token_ids == free.token_ids[:length]
        assert (output.finish_reason, output.stop_reason) == ("stop", output.token_ids[-1])


def test_the_models_own_end_token_ends(llama):
    decoder = Decoder(llama, cache_tokens=512)
    assert decoder.config.eos_token_ids == (2,)
    outputs = decoder.generate([[5, 6]] * 40, max_new_tokens=60, temperature=1.5, seed=0)
    ended = [o for o in outputs if o.finish_reason == "stop"]
    assert ended and all(o.token_ids[-1] == 2 and 2 not in o.token_ids[:-1] and o.stop_reason == 2 for o in ended)
    assert all(2 not in o.token_ids for o in outputs if o.finish_reason == "length")


def test_the_default_length_is_256_or_what_fits(decoder):
    assert len(decoder.generate([5] * 200, ignore_eos=True)[0].token_ids) == 56
    assert len(decoder.generate([5] * 255)[0].token_ids) == 1


def test_text_and_stop_strings(bundled):
    prompt = "def read_csv(path):\n"
    plain = bundled.generate(prompt, max_new_tokens=40)[0]
    assert plain.text and bundled.tokenizer.decode(plain.token_ids) == plain.text
    stop = plain.text[12:15]
    for stops in (stop, [stop, "never this"]):
        output = bundled.generate(prompt, max_new_tokens=40, stop=stops)[0]
        assert output.text == plain.text[: plain.text.find(stop)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert plain.token_ids[: len(output.token_ids)] == output.token_ids


def test_stop_strings_wherever_they_fall_in_the_tokens(bundled):
    """Every place of the text, inside a token and across several: the stream shows what stands before the first of it, and no more."""
    prompt = "def read_csv(path):\n"
    whole = bundled.generate(prompt, max_new_tokens=24)[0].text
    rng = random.Random(1)
    stops = [whole[at : at + length] for at in range(1, len(whole) - 6, 5) for length in [rng.choice([1, 2, 3, 6])]]
    params = [SamplingParams(max_new_tokens=24, stop=[stop, "never this"]) for stop in stops]
    shown = [""] * len(stops)
    for event in bundled.stream([prompt] * len(stops), params=params):
        at = event.prompt_index
        shown[at] += event.text
        if event.output is not None:
            assert (event.output.text, event.output.stop_reason) == (whole[: whole.find(stops[at])], stops[at])
    assert shown == [whole[: whole.find(stop)] for stop in stops] and len(set(shown)) > 5


def test_stream_gives_what_generate_gives(bundled):
    prompts = ["import os\n", "class A", "é漢"]
    options = {"max_new_tokens": 30, "temperature": 1.3, "seed": 4, "num_return_sequences": 2, "stop": "\n\n"}
    outputs = bundled.generate(prompts, **options)
    tokens: dict = {}
    text: dict = {}
    ended: dict = {}
    for event in bundled.stream(prompts, **options):
        key = event.prompt_index, event.index
        assert key not in ended, "an event after the last"
        tokens.setdefault(key, []).extend(event.token_ids)
        text[key] = text.get(key, "") + event.text
        if event.output is not None:
            ended[key] = event.output
    assert list(sorted(ended)) == [(o.prompt_index, o.index) for o in outputs]
    for output in outputs:
        key = output.prompt_index, output.index
        assert tokens[key] == output.token_ids == ended[key].token_ids
        assert text[key] == output.text == ended[key].text


def test_streams_may_be_interleaved_and_left(bundled):
    first = bundled.stream("import ", max_new_tokens=12)
    second = bundled.stream("class ", max_new_tokens=12)
    a = [next(first), next(second), next(first)]
    second.close()  # aborted: its blocks are free and the other goes on
    rest = list(first)
    whole = bundled.generate("import ", max_new_tokens=12)[0]
    assert [t for e in (a[0], a[2], *rest) for t in e.token_ids] == whole.token_ids


def test_a_stream_never_begun_holds_nothing(bundled):
    stream = bundled.stream("import ", max_new_tokens=4)
    assert not bundled.loop.scheduler.has_work
    del stream


def test_metrics(bundled):
    output = bundled.generate("import os", max_new_tokens=5)[0]
    metrics = output.metrics
    assert metrics.num_prompt_tokens == len(output.prompt_token_ids) == len(bundled.tokenizer.encode("import os"))
    assert metrics.num_new_tokens == 5 and metrics.num_preemptions == 0
    assert 0 < metrics.time_to_first_token <= metrics.total_time


def test_nan_fails_only_the_request_that_meets_it():
    model = small_llama(seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.nan
    # Untied head: only sequences that contain token 50 see NaN.
    decoder = Decoder(model, cache_tokens=1024)
    good, bad, leader = decoder.generate([[5, 6], [5, 50], [7]], max_new_tokens=10, eos_token_id=100)
    assert bad.finish_reason == "error" and "position 2 hold NaN" in bad.error and bad.token_ids == []
    assert good.error is None and leader.error is None
    assert good.token_ids == decoder.generate([5, 6], max_new_tokens=10, eos_token_id=100)[0].token_ids
    group = decoder.generate([50], max_new_tokens=4, num_return_sequences=3)
    assert [o.finish_reason for o in group] == ["error"] * 3
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks and not decoder.loop.scheduler.has_work


def test_rows_of_minus_infinity_fail_with_their_reason():
    decoder = Decoder(small_llama(seed=3), cache_tokens=1024)
    logits = decoder.model.forward_logits
    decoder.model.forward_logits = lambda *step: logits(*step) - math.inf  # type: ignore[method-assign]
    output = decoder.generate([5], max_new_tokens=4)[0]
    assert output.finish_reason == "error" and "every logit is -inf" in output.error


def test_an_exception_in_a_step_leaves_the_decoder_usable(llama):
    decoder = Decoder(llama, cache_tokens=1024)
    expected = decoder.generate([5, 6, 7], max_new_tokens=10)[0].token_ids
    forward, calls = decoder.model.forward_logits, 0

    def failing(batch, cache):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return forward(batch, cache)

    decoder.model.forward_logits = failing  # type: ignore[method-assign]
    bystander = decoder.stream([5, 6, 7], max_new_tokens=10)
    tokens = next(bystander).token_ids
    with pytest.raises(KeyboardInterrupt):
        decoder.generate([9] * 20, max_new_tokens=10, num_return_sequences=2, temperature=1.0)
    # The one that was running beside it starts over from its tokens and loses nothing.
    assert tokens + [t for e in bystander for t in e.token_ids] == expected
    decoder.loop.scheduler.check()
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


@pytest.mark.parametrize("where", ["sample", "advance"])
def test_an_exception_after_the_commit_harms_no_other_request(llama, monkeypatch, where: str):
    decoder = Decoder(llama, cache_tokens=1024)
    prompts = [[5, 6, 7], [9, 8], [11]]
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 2, "ignore_eos": True}
    expected = [decoder.generate(p, **options)[0].token_ids for p in prompts]
    streams = [decoder.stream(p, **options) for p in prompts]
    got = [next(s).token_ids for s in streams]
    calls = 0

    def failing(original):
        def wrapped(*args, **more):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return original(*args, **more)

        return wrapped

    if where == "sample":
        monkeypatch.setattr(decoder.loop.sampler, "draw", failing(decoder.loop.sampler.draw))
    else:  # between the first and the second row of a step
        monkeypatch.setattr(decoder.loop, "_advance", failing(decoder.loop._advance))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(5):
            decoder.step()
    for stream, tokens, whole in zip(streams, got, expected, strict=True):
        assert tokens + [t for e in stream for t in e.token_ids] == whole
    decoder.loop.scheduler.check()
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def test_a_tokenizer_that_raises_ends_only_its_request(bundled, monkeypatch):
    fine = bundled.generate("import os", max_new_tokens=10)[0]
    poison = bundled.generate("def f(", max_new_tokens=4)[0].token_ids[2]
    decode = bundled.tokenizer.decode

    def failing(ids):
        if ids and ids[-1] == poison:
            raise Exception("cannot")
        return decode(ids)

    monkeypatch.setattr(bundled.tokenizer, "decode", failing)
    bad, good = bundled.generate(["def f(", "import os"], max_new_tokens=10)
    assert bad.finish_reason == "error" and bad.error == f"the tokenizer cannot decode token {poison}: cannot"
    assert poison not in fine.token_ids and good.token_ids == fine.token_ids and good.finish_reason == "length"


def test_weights_changed_in_place_are_seen():
    model = small_llama(seed=5)
    decoder = Decoder(model, cache_tokens=512)
    before = decoder.generate([5, 6], max_new_tokens=10)[0].token_ids
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = decoder.generate([5, 6], max_new_tokens=10)[0].token_ids
    assert before != after == hf_greedy(model, [5, 6], 10)


def test_bfloat16_weights_and_cache():
    model = small_llama(seed=6).to(torch.bfloat16)
    decoder = Decoder(model, cache_tokens=512)
    assert decoder.loop.cache.dtype == torch.bfloat16
    exact = Decoder(model, cache_tokens=512, kv_dtype=torch.float32)
    prompt = list(range(3, 40))
    logprobs = [d.generate(prompt, max_new_tokens=1)[0].logprobs[0] for d in (decoder, exact)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.05)
    chunked = Decoder(model, cache_tokens=512, prefill_chunk=3)
    params = [SamplingParams(seed=s, temperature=1.0, max_new_tokens=20) for s in range(4)]
    a, b = ([o.token_ids for o in d.generate([prompt] * 4, params=params)] for d in (decoder, chunked))
    assert a == b
