"""Each control through the whole loop: the tokens are those that the oracle draws from the logits the loop saw."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from decode.small_models import small_llama
from torch import Tensor

from engine import Decoder, SamplingParams
from engine.kernels import reference
from engine.kernels.api import EndTokens, LogitBias, Penalties, SampleResult

VOCAB = 101
PROMPT = [5, 6, 7, 6]


def even_tokens(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor: tokens of the same parity as the length are twice as far from zero."""
    logits[len(token_ids) % 2 :: 2] *= 2.0
    return logits


CONTROLS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "top_k, top_p and min_p": {"top_k": 12, "top_p": 0.8, "min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.0},
    "all penalties": {"repetition_penalty": 0.7, "presence_penalty": -2, "frequency_penalty": 0.8},
    "logit_bias": {"logit_bias": {3: 4.0, 9: -math.inf, 22: 1e30, 48: -1e30, 50: 2.5} | {i: -1e30 for i in (22,)}},
    "allowed_token_ids": {"allowed_token_ids": [100, 3, 31, 32, 33, 64, 95, 96]},
    "suppress_tokens": {"suppress_tokens": range(0, 101, 2)},
    "bad_words": {"bad_words": [[t, u] for t in range(3, 101) for u in (t - 1, t - 2, t - 3)] + [[6, 22], [7, 6, 1], [40]]},
    "min_new_tokens": {"min_new_tokens": 20, "stop_token_ids": list(range(10, 60))},
    "logits_processor": {"logits_processor": even_tokens},
}
CONTROLS["all of them"] = {name: value for options in CONTROLS.values() for name, value in options.items()} | {
    "allowed_token_ids": range(3, 101),
    "suppress_tokens": range(0, 101, 7),
}


def recorded(decoder: Decoder, monkeypatch, prompt: list[int], **options) -> tuple[Any, Tensor]:
    """A single request's output, and the row of logits that each of its tokens was drawn from."""
    rows: list[Tensor] = []
    run = decoder.loop.runner.run

    def recording(plan):
        logits = run(plan)
        if logits is not None:
            rows.append(logits.clone())
        return logits

    with monkeypatch.context() as patched:
        patched.setattr(decoder.loop.runner, "run", recording)
        output = decoder.generate(prompt, **options)[0]
    return output, torch.cat(rows)


def law(logits: Tensor, prompt: list[int], new: list[int], options: dict[str, Any], logprobs: int = 0) -> SampleResult:
    """The oracle's draws at all positions of an output at once, its arguments written from the definitions of the options."""
    n, params = len(new), SamplingParams(**options)
    before = [prompt + new[:i] for i in range(n)]
    if params.logits_processor:
        logits = torch.stack([even_tokens(tokens, row.clone()) for tokens, row in zip(before, logits, strict=True)])

    counts = [Counter(new[:i]) for i in range(n)]
    seen = [sorted(set(tokens)) for tokens in before]
    biases = []
    for tokens in before:
        bias = dict(params.logit_bias) | dict.fromkeys(params.suppress_tokens, -math.inf)
        bias |= {word[-1]: -math.inf for word in params.bad_words if tuple((tokens + [0])[-len(word) : -1]) == word[:-1]}
        biases.append(sorted(bias.items()))
    ends = {*params.stop_token_ids, 2}
    mask = torch.full((n, 4), -1, dtype=torch.int32)
    if params.allowed_token_ids is not None:
        for word in range(4):
            value = sum(1 << (i & 31) for i in params.allowed_token_ids if i >> 5 == word)
            mask[:, word] = value - (1 << 32) if value >= 1 << 31 else value

    def starts(lists):
        return torch.tensor([0, *(len(entries) for entries in lists)]).cumsum(0).int()

    def every(value, dtype):
        return torch.full((n,), value, dtype=dtype)

    return reference.sample(
        logits,
        every(params.temperature, torch.float32),
        every(params.top_k or 0, torch.int32),
        every(params.top_p or 1.0, torch.float32),
        every(params.min_p or 0.0, torch.float32),
        every(params.seed, torch.int64),
        torch.arange(len(prompt), len(prompt) + n, dtype=torch.int32),
        every(0, torch.int32),
        penalties=Penalties(
            every(params.repetition_penalty, torch.float32),
            every(params.presence_penalty, torch.float32),
            every(params.frequency_penalty, torch.float32),
            torch.tensor([t for ids in seen for t in ids], dtype=torch.int32),
            torch.tensor([c[t] for ids, c in zip(seen, counts, strict=True) for t in ids], dtype=torch.int32),
            starts(seen),
        ),
        bias=LogitBias(
            torch.tensor([t for bias in biases for t, _ in bias], dtype=torch.int32),
            torch.tensor([b for bias in biases for _, b in bias], dtype=torch.float32),
            starts(biases),
        ),
        end_tokens=EndTokens(
            torch.tensor(sorted(ends) * n, dtype=torch.int32), every(len(prompt) + params.min_new_tokens, torch.int32), starts([ends] * n)
        ),
        allowed=mask,
        logprobs=logprobs,
    )


@pytest.mark.parametrize("name", CONTROLS)
def test_draws_are_the_oracles(decoder, monkeypatch, name: str):
    common = {"temperature": 1.2, "seed": 3, "max_new_tokens": 48}
    options = common | CONTROLS[name]
    output, logits = recorded(decoder, monkeypatch, PROMPT, logprobs=3, **options)
    drawn = law(logits, PROMPT, output.token_ids, options, logprobs=3)
    assert output.error is None and drawn.tokens.tolist() == output.token_ids
    assert torch.allclose(drawn.processed_logprobs, torch.tensor(output.processed_logprobs), atol=1e-5)
    if name not in ("logits_processor", "all of them"):  # those are of the model's own row, which the oracle was not given
        assert torch.allclose(drawn.logprobs, torch.tensor(output.logprobs), atol=1e-5)
    for tokens, logprobs, top in zip(
        drawn.processed_top_tokens.tolist(), drawn.processed_top_logprobs, output.processed_top_logprobs, strict=True
    ):
        assert list(top) == [t for t in tokens if t >= 0]
        assert torch.allclose(torch.tensor(list(top.values())), logprobs[: len(top)], atol=1e-5)
    # It makes a difference, at this law and seed: the test could tell a control that never arrives.
    plain = decoder.generate(PROMPT, **common)[0]
    assert plain.token_ids != output.token_ids


def test_what_is_ruled_out_never_appears(decoder):
    options = {"temperature": 1.5, "num_return_sequences": 8, "max_new_tokens": 40, "seed": 1, "ignore_eos": True}
    allowed = {100, 3, 31, 32, 33, 64, 95, 96}
    for output in decoder.generate(PROMPT, allowed_token_ids=allowed, **options):
        assert set(output.token_ids) <= allowed
    for output in decoder.generate(PROMPT, suppress_tokens=range(0, 101, 2), logit_bias={5: -math.inf}, **options):
        assert all(t % 2 and t != 5 for t in output.token_ids)
    words = [[t, t] for t in range(101)] + [[3, 4, 5], [9]]
    for output in decoder.generate(PROMPT, bad_words=words, **options):
        tokens = PROMPT + output.token_ids
        assert not any(a == b for a, b in zip(tokens[3:], tokens[4:], strict=False)) and 9 not in output.token_ids


def test_a_bad_word_may_begin_in_the_prompt(decoder):
    first = decoder.generate(PROMPT, max_new_tokens=1)[0].token_ids[0]
    assert decoder.generate(PROMPT, max_new_tokens=1, bad_words=[[7, 6, first]])[0].token_ids[0] != first
    assert decoder.generate(PROMPT, max_new_tokens=1, bad_words=[[5, 6, first], [*PROMPT, 5, first], [first, 5]])[0].token_ids[0] == first


def test_bad_words_as_strings_are_taken_with_and_without_a_space(bundled):
    options = {"temperature": 1.0, "num_return_sequences": 6, "max_new_tokens": 40, "seed": 3}
    prompt = "def read(self):\n    return"
    assert any("self" in o.text for o in bundled.generate(prompt, **options))
    encode = bundled.tokenizer.encode
    for outputs in (bundled.generate(prompt, bad_words="self", **options), bundled.generate(prompt, bad_words=["None", "self"], **options)):
        for output in outputs:
            assert not {encode("self")[0], encode(" self")[0]} & set(output.token_ids)


def test_min_new_tokens_holds_every_end_back(decoder):
    options = {"temperature": 1.0, "seed": 2, "max_new_tokens": 30, "num_return_sequences": 12}
    ends = list(range(20, 70))
    early = decoder.generate(PROMPT, stop_token_ids=ends, **options)
    assert min(len(o.token_ids) for o in early) < 4
    for minimum in (1, 7, 30):
        outputs = decoder.generate(PROMPT, stop_token_ids=ends, min_new_tokens=minimum, **options)
        assert all(len(o.token_ids) >= minimum for o in outputs)
        assert all(t not in ends for o in outputs for t in o.token_ids[:minimum])
    # min_new_tokens 7 means that the 8th token may be an end, not only a later one.
    outputs = decoder.generate(PROMPT, stop_token_ids=ends, min_new_tokens=7, **options)
    assert min(len(o.token_ids) for o in outputs) == 8


def test_min_new_tokens_and_stop_strings(bundled):
    prompt = "def read_csv(path):\n"
    plain = bundled.generate(prompt, max_new_tokens=40)[0]
    stop = plain.text[4:6]
    assert bundled.generate(prompt, max_new_tokens=40, stop=stop)[0].text == plain.text[: plain.text.find(stop)]
    for minimum in (3, 10, 40):
        output = bundled.generate(prompt, max_new_tokens=40, stop=stop, min_new_tokens=minimum)[0]
        unsearched = bundled.tokenizer.decode(plain.token_ids[:minimum])
        at = plain.text.find(stop, len(unsearched))
        assert output.text == (plain.text if at < 0 else plain.text[:at])
        events = list(bundled.stream(prompt, max_new_tokens=40, stop=stop, min_new_tokens=minimum))
        assert "".join(e.text for e in events) == output.text


def test_logprobs_of_each_are_as_many_as_it_asks_for(decoder):
    params = [SamplingParams(max_new_tokens=5, logprobs=n, temperature=1.0, top_k=3, seed=1) for n in (2, 0, 101, 5)]
    outputs = decoder.generate([PROMPT] * 4, params=params)
    full = outputs[2]
    for output, p in zip(outputs, params, strict=True):
        assert output.token_ids == full.token_ids and output.logprobs == full.logprobs
        assert output.processed_logprobs == full.processed_logprobs
        if p.logprobs == 0:
            assert output.top_logprobs is None and output.processed_top_logprobs is None
            continue
        for token, raw, top, all_of_it in zip(output.token_ids, output.logprobs, output.top_logprobs, full.top_logprobs, strict=True):
            assert list(top.items()) == list(all_of_it.items())[: p.logprobs] and all_of_it[token] == raw
        for top in output.processed_top_logprobs:
            assert len(top) == min(3, p.logprobs)
    assert all(sum(map(math.exp, top.values())) == pytest.approx(1.0, abs=1e-4) for top in full.top_logprobs)
    assert all(sum(map(math.exp, top.values())) == pytest.approx(1.0, abs=1e-4) for top in full.processed_top_logprobs)
    assert full.cumulative_logprob == pytest.approx(sum(full.logprobs))


def test_events_carry_logprobs(decoder):
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1, "logprobs": 2}
    whole = decoder.generate(PROMPT, **options)[0]
    events = list(decoder.stream(PROMPT, **options))
    assert [x for e in events for x in e.logprobs] == whole.logprobs
    assert [x for e in events for x in e.top_logprobs] == whole.top_logprobs
    assert all(e.top_logprobs is None for e in decoder.stream(PROMPT, max_new_tokens=2))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"bad_words": [[t, u] for t in range(3, 101) for u in range(t % 7, 101, 7)] + [[42]]},
        {"suppress_tokens": list(range(0, 101, 3))},
        {"min_new_tokens": 25},
        {"min_new_tokens": 25, "repetition_penalty": 1.2, "bad_words": [[22], [48, 42], [28, 85]], "suppress_tokens": [2, 11, 77]},
    ],
)
def test_greedy_tokens_equal_transformers(decoder, llama, options: dict):
    theirs = {("bad_words_ids" if name == "bad_words" else name): value for name, value in options.items()}
    for prompt in (PROMPT, [9] * 5, list(range(3, 40))):
        end = decoder.generate(prompt, max_new_tokens=12, ignore_eos=True)[0].token_ids[3]
        with torch.no_grad():
            expected = llama.generate(
                torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=end, **theirs
            )[0, len(prompt) :].tolist()
        assert decoder.generate(prompt, max_new_tokens=60, eos_token_id=end, **options)[0].token_ids == expected


def test_logit_bias_equals_transformers_sequence_bias(decoder, llama):
    bias = {22: -3.0, 48: 2.5, 60: 4.0, 7: -math.inf}
    with torch.no_grad():
        expected = llama.generate(
            torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, pad_token_id=0, sequence_bias={(t,): b for t, b in bias.items()}
        )[0, 4:].tolist()
    assert decoder.generate(PROMPT, max_new_tokens=40, logit_bias=bias)[0].token_ids == expected


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"allowed_token_ids": [5], "bad_words": [[5]]}, "bad_words and allowed_token_ids leave none with a logit above -inf"),
        ({"logit_bias": dict.fromkeys(range(101), -math.inf)}, "logit_bias leaves none with a logit above -inf"),
        ({"bad_words": [[6, t] for t in range(101)]}, "bad_words leaves none"),
        ({"allowed_token_ids": [2], "min_new_tokens": 3}, "min_new_tokens and allowed_token_ids leave none"),
    ],
)
def test_a_request_that_rules_everything_out_names_its_options(decoder, options: dict, why: str):
    good = {"temperature": 1.0, "seed": 1, "max_new_tokens": 12}
    params = [SamplingParams(**good), SamplingParams(**options), SamplingParams(**good)]
    first, bad, second = decoder.generate([PROMPT] * 3, params=params)
    assert bad.finish_reason == "error" and bad.token_ids == [] and bad.logprobs == []
    assert bad.error.startswith("no token can be drawn at position 4: ") and why in bad.error and "\n" not in bad.error
    assert first.token_ids == second.token_ids == decoder.generate(PROMPT, **good)[0].token_ids


def test_the_position_named_is_where_it_happened(decoder):
    output = decoder.generate(PROMPT, max_new_tokens=12, allowed_token_ids=[8, 9], bad_words=[[8, 8], [9, 9], [8, 9, 8], [9, 8, 9]])[0]
    assert output.finish_reason == "error" and len(output.token_ids) == 2
    assert output.error.startswith("no token can be drawn at position 6: bad_words and allowed_token_ids leave none")
    assert len(output.logprobs) == len(output.processed_logprobs) == 2


def test_followers_of_a_prompt_as_short_as_they_are_many(decoder):
    """As many rows wanted as tokens computed, yet not each once."""
    expected = decoder.generate([5, 6], max_new_tokens=6)[0]
    for output in decoder.generate([5, 6], max_new_tokens=6, num_return_sequences=2):
        assert (output.token_ids, output.logprobs) == (expected.token_ids, expected.logprobs)


def test_numbers_at_the_edge_of_what_is_allowed(decoder):
    """They pass the kernel's own checks, whose numbers are float32."""
    for options in (
        {"logit_bias": {5: 1e30, 6: -1e30}},
        {"repetition_penalty": 1e30},
        {"repetition_penalty": 1e-30},
        {"temperature": 1e30, "top_p": 1e-300, "min_p": 1e-300},
        {"temperature": 1e-30, "min_p": 1.0, "top_p": 0.99999999},
        {"temperature": 1.0, "presence_penalty": 2, "frequency_penalty": -2, "top_k": 10**12},
    ):
        output = decoder.generate(PROMPT, max_new_tokens=4, seed=1, **options)[0]
        assert output.error is None and len(output.token_ids) == 4


def test_a_model_of_an_odd_vocabulary_has_a_last_word_of_its_mask():
    decoder = Decoder(small_llama(vocab_size=97), cache_tokens=512)
    outputs = decoder.generate([5], allowed_token_ids=[96], max_new_tokens=3)
    assert outputs[0].token_ids == [96] * 3
