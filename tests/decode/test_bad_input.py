"""Bad input: one sentence naming the argument, its value and what is allowed, before any work; the decoder stays usable."""

from __future__ import annotations

import json
import math

import pytest
import torch
from decode.small_models import small_llama

from engine import Decoder, DraftModel, PromptLookup, SamplingParams, SuffixLookup
from engine.drafters.speculator import BUNDLED

CALLS = [
    ((""), {}, ValueError, "prompt 0 is empty"),
    (([]), {}, ValueError, "prompts is an empty list"),
    (([[5], []]), {}, ValueError, "prompt 1 is empty"),
    (([[5], [4096]]), {}, ValueError, "prompt 1 holds token id 4096; the model's vocabulary has ids 0 to 4095"),
    (([-1]), {}, ValueError, "prompt 0 holds token id -1"),
    ((7), {}, TypeError, "prompts is a int; it must be a string, a list of strings"),
    ((None), {}, TypeError, "prompts is a NoneType"),
    (([5, "a"]), {}, TypeError, "prompt 0 is 5"),
    (([[5.0]]), {}, TypeError, "prompt 0 is [5.0]"),
    ((torch.tensor([[1.0]])), {}, TypeError, "prompts is a tensor of torch.float32"),
    ((torch.tensor([[True]])), {}, TypeError, "prompts is a tensor of torch.bool"),
    ((torch.zeros(1, 1, 1, dtype=torch.long)), {}, ValueError, "prompts is a tensor of shape [1, 1, 1]"),
    ((torch.zeros(0, 3, dtype=torch.long)), {}, ValueError, "prompts is a tensor of shape [0, 3]"),
    ((torch.tensor([[5, 6]])), {"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask has shape [1, 3]"),
    ((torch.tensor([[5, 6]])), {"attention_mask": torch.zeros(1, 2)}, ValueError, "prompt 0 is empty"),
    (([[5, 6]]), {"attention_mask": torch.ones(1, 2)}, TypeError, "attention_mask goes with a tensor of prompts"),
    (([5] * 2048), {}, ValueError, "prompt 0 has 2048 tokens; the model's length of 2048 leaves room for none after it"),
    (([5] * 2000), {"max_new_tokens": 49}, ValueError, "max_new_tokens is 49; after the 2000 tokens of prompt 0"),
    (([5]), {"temperature": -1.0}, ValueError, "temperature is -1.0"),
    ((b"abc"), {}, TypeError, "prompts is a bytes"),
    (([b"abc"]), {}, TypeError, "prompt 0 is b'abc'"),
    (("\ud800"), {}, ValueError, "lone surrogate"),
    ((torch.tensor([[5, 6]])), {"attention_mask": [[1, 1]]}, TypeError, "attention_mask is a list"),
    ((torch.tensor([[5, 6]])), {"attention_mask": torch.tensor([[0.0, -9.0]])}, ValueError, "attention_mask holds values other"),
    (([5]), {"params": 5}, TypeError, "params is a int"),
    (([5]), {"temperature": 1e39}, ValueError, "temperature is 1e+39; it must lie within"),
    (([5]), {"repetition_penalty": 1e-50}, ValueError, "repetition_penalty is 1e-50"),
    (([5]), {"top_k": -7}, ValueError, "top_k is -7"),
    (([5]), {"temprature": 1.0}, TypeError, "did you mean 'temperature'?"),
    (([5]), {"stop_token_ids": [4096]}, ValueError, "stop_token_ids holds 4096; the model's vocabulary has ids 0 to 4095"),
    (([5]), {"eos_token_id": 9999}, ValueError, "eos_token_id holds 9999"),
    (([5]), {"params": SamplingParams(), "seed": 1}, TypeError, "generate() got both params and seed"),
    (([[5], [6]]), {"params": [SamplingParams()]}, ValueError, "params is a list of 1; with 2 prompts"),
    (([5]), {"params": [{"seed": 1}]}, ValueError, "it must be as many SamplingParams"),
    (([5]), {"top_p": 0}, ValueError, "top_p is 0; it must be a number above 0, at most 1"),
    (([5]), {"min_p": 2}, ValueError, "min_p is 2; it must be a number from 0 to 1"),
    (([5]), {"presence_penalty": 3}, ValueError, "presence_penalty is 3; it must be a number from -2 to 2"),
    (([5]), {"frequency_penalty": 3}, ValueError, "frequency_penalty is 3"),
    (([5]), {"logit_bias": {4096: 1.0}}, ValueError, "logit_bias holds 4096; the model's vocabulary has ids 0 to 4095"),
    (([5]), {"logit_bias": {1: math.inf}}, ValueError, "logit_bias[1] is inf"),
    (([5]), {"allowed_token_ids": [1, 5000]}, ValueError, "allowed_token_ids holds 5000"),
    (([5]), {"allowed_token_ids": ()}, ValueError, "allowed_token_ids is empty"),
    (([5]), {"allowed_token_ids": [5, 6], "suppress_tokens": [5, 6, 7]}, ValueError, "allowed_token_ids is (5, 6), all of which"),
    (([5]), {"temperature": 10**400}, ValueError, "temperature is beyond the range of floats"),
    (([5]), {"num_return_sequences": 10**6}, ValueError, "num_return_sequences is 1000000; it must be an integer from 1 to 65536"),
    (([5]), {"regex": r"[^\s\S]"}, ValueError, "which cannot be used: no text can satisfy it"),
    (([5]), {"grammar": "start: start"}, ValueError, "which cannot be used: no text can satisfy it"),
    (([5]), {"suppress_tokens": 5000}, ValueError, "suppress_tokens holds 5000"),
    (([5]), {"bad_words": [[1, 5000]]}, ValueError, "bad_words holds 5000"),
    (([5]), {"bad_words": [1]}, TypeError, "bad_words holds the number 1"),
    (([5]), {"min_new_tokens": 257}, ValueError, "min_new_tokens is 257; it must be at most max_new_tokens, which is 256 here"),
    (([5]), {"min_tokens": 9, "max_tokens": 8}, ValueError, "min_new_tokens is 9; it must be at most max_new_tokens, which is 8"),
    (([5]), {"logprobs": 4097}, ValueError, "logprobs is 4097; the model's vocabulary has only 4096 tokens"),
    (([5]), {"logits_processor": "f"}, TypeError, "logits_processor is 'f'"),
    (([5]), {"json_schema": "{"}, ValueError, "json_schema is '{', which is not JSON"),
    (([5]), {"json_schema": {"type": "nonsense"}}, ValueError,
     "json_schema is '{\"type\": \"nonsense\"}', which cannot be used: Invalid type: nonsense"),
    (([5]), {"json_schema": {"enum": []}}, ValueError, "which cannot be used: Unsatisfiable schema"),
    (([5]), {"regex": "a(["}, ValueError, "regex is 'a([', which cannot be used: "),
    (([5]), {"regex": "[^\\s\\S]"}, ValueError, "regex is '[^\\\\s\\\\S]', which "),
    (([5]), {"grammar": "start: nowhere"}, ValueError, "grammar is 'start: nowhere', which cannot be used: "),
    (([5]), {"regex": "a+", "allowed_token_ids": [300]}, ValueError, "regex is 'a+', and no text of the allowed_token_ids can satisfy it"),
    (([5]), {"regex": "(a){0}", "ignore_eos": True}, ValueError, "regex is '(a){0}', which only the empty text satisfies"),
    (([5]), {"regex": "a", "json_schema": True}, ValueError, "json_schema and regex are both given"),
    (([5]), {"num_beams": 0}, ValueError, "num_beams is 0; it must be an integer from 1 to"),
    (([5]), {"num_beams": 2.0}, TypeError, "num_beams is 2.0"),
    (([5]), {"num_beams": 5000}, ValueError, "num_beams is 5000; it must be at most the model's vocabulary of 4096"),
    (([5]), {"num_beams": 65}, ValueError, "num_beams is 65; max_batch_size allows 64 sequences at once"),
    (([5]), {"num_beams": 4, "num_return_sequences": 5}, ValueError, "num_return_sequences is 5; it must be at most num_beams, which is 4"),
    (([5]), {"num_beams": 4, "early_stopping": "always"}, ValueError, "early_stopping is 'always'; it must be True, False or 'never'"),
    (([5]), {"num_beams": 4, "early_stopping": 1}, ValueError, "early_stopping is 1; it must be True, False or 'never'"),
    (([5]), {"num_beams": 4, "length_penalty": math.nan}, ValueError, "length_penalty is nan; it must be a number from -7 to 7"),
    (([5]), {"num_beams": 4, "length_penalty": "1"}, TypeError, "length_penalty is '1'"),
    (([5]), {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, ValueError,
     "num_beam_groups is 3; it must divide num_beams, which is 4"),
    (([5]), {"num_beams": 4, "num_beam_groups": 2}, ValueError, "diversity_penalty is 0.0 with num_beam_groups 2; it must be above 0"),
    (([5]), {"num_beams": 4, "diversity_penalty": 1.0}, ValueError, "diversity_penalty is 1.0 with num_beam_groups 1"),
    (([5]), {"num_beams": 4, "diversity_penalty": -1.0}, ValueError, "diversity_penalty is -1.0"),
    (([5]), {"length_penalty": 0.5}, TypeError, "generate() got length_penalty without num_beams"),
    (([5]), {"num_beams": 4, "temperature": 0.0}, ValueError, "temperature is 0.0; with num_beams above 1 it must be above 0, or None"),
    (([5]), {"num_beams": 4, "top_p": 0.9}, ValueError, "top_p is 0.9; it cannot be used with num_beams above 1"),
    (([5]), {"num_beams": 4, "min_p": 0.1}, ValueError, "min_p is 0.1; it cannot be used with num_beams above 1"),
    (([5]), {"num_beams": 4, "logprobs": 2}, ValueError, "logprobs is 2; it cannot be used with num_beams above 1"),
    (([5]), {"num_beams": 4, "stop": "x"}, ValueError, "stop is ('x',); it cannot be used with num_beams above 1"),
    (([5]), {"num_beams": 4, "do_sample": True, "min_new_tokens": 2}, ValueError,
     "min_new_tokens is 2; it cannot be used with do_sample=True and num_beams above 1"),
    (([5]), {"num_beams": 4, "do_sample": True, "logit_bias": {1: 1.0}}, ValueError, "logit_bias is {1: 1.0}; it cannot be used with"),
    (([5]), {"num_beams": 4, "do_sample": True, "length_penalty": 0.0}, ValueError, "length_penalty is 0.0; it cannot be used with"),
    (([5]), {"no_repeat_ngram_size": 0}, ValueError, "no_repeat_ngram_size is 0; it must be an integer of at least 1, or None (off)"),
    (([5]), {"prefix_token_ids": [4096]}, ValueError, "prefix_token_ids holds 4096; the model's vocabulary has ids 0 to 4095"),
    (([5]), {"prefix_token_ids": [7, 8], "max_new_tokens": 1}, ValueError, "prefix_token_ids has 2 tokens; it must have at most"),
    (([5]), {"prefix_token_ids": [7], "eos_token_id": 7}, ValueError, "prefix_token_ids holds 7, which ends the output"),
    (([5] * 100), {"num_beams": 16, "max_new_tokens": 100}, ValueError,
     "prompt of 100 tokens + max_new_tokens 100, num_beams 16, needs 118 cache blocks of 16 tokens; the whole cache has 64"),
    (([5] * 600), {"max_new_tokens": 1000}, ValueError, "needs 100 cache blocks of 16 tokens; the whole cache has 64"),
]  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.bundled(cache_tokens=1024)


@pytest.mark.parametrize(("prompts", "options", "error", "words"), CALLS, ids=[words[:40] for *_, words in CALLS])
def test_one_sentence_before_any_work(decoder: Decoder, prompts, options, error, words):
    steps = decoder.loop.num_steps
    with pytest.raises(error) as caught:
        decoder.generate(prompts, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if "params" not in options:
        with pytest.raises(error):
            decoder.stream(prompts, **options)  # at the call, not at the first event
    assert decoder.loop.num_steps == steps and not decoder.loop.scheduler.has_work
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def test_the_decoder_stays_usable(decoder: Decoder):
    assert len(decoder.generate([5, 6], max_new_tokens=3)[0].token_ids) == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cache_tokens": 8}, ValueError, "cache_tokens is 8; it must be at least one block of 16 tokens"),
        ({"cache_tokens": 10**12}, MemoryError, "cache_tokens is 1000000000000, which takes"),
        ({"block_size": 20}, ValueError, "block_size is 20; it must be a positive multiple of 16"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size is 0"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk is 0"),
        ({"max_batch_tokens": 2}, ValueError, "max_batch_tokens is 2; it must be at least max_batch_size, which is 64"),
        ({"kv_dtype": torch.float64}, ValueError, "kv_dtype is torch.float64"),
        ({"kv_dtype": torch.float8_e4m3fn}, ValueError, "kv_dtype is torch.float8_e4m3fn, which is for GPUs"),
        ({"kernels": "quick"}, ValueError, "backend is 'quick'; known backends are auto, cpu, "),
        ({"tokenizer": "nowhere"}, FileNotFoundError, "tokenizer 'nowhere' not found"),
        ({"tokenizer": 5}, TypeError, "tokenizer is a int"),
        ({"max_batch_size": 2.5}, TypeError, "max_batch_size is 2.5; it must be an integer"),
        ({"cache_tokens": "x"}, TypeError, "cache_tokens is 'x'; it must be an integer or None"),
        ({"kv_dtype": "float32"}, TypeError, "kv_dtype is 'float32'"),
        ({"max_position": 5000}, ValueError, "max_position is 5000"),
    ],
)
def test_a_decoder_that_cannot_be(options, error, words):
    with pytest.raises(error) as caught:
        Decoder.bundled(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_memory_for_less_than_one_block_is_said(monkeypatch):
    monkeypatch.setattr("engine.kv_cache.available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="one cache block of 16 tokens takes .* bytes, and the cache may take 250"):
        Decoder.bundled()


def test_text_without_a_tokenizer(llama):
    decoder = Decoder(llama, cache_tokens=256)
    with pytest.raises(ValueError, match="this decoder has no tokenizer: pass token ids"):
        decoder.generate("hello")
    with pytest.raises(ValueError, match="stop is .* but this decoder has no tokenizer; use stop_token_ids"):
        decoder.generate([5], stop="x")
    with pytest.raises(ValueError, match="bad_words holds 'x', but this decoder has no tokenizer; use token ids"):
        decoder.generate([5], bad_words="x")
    for options in ({"json_schema": True}, {"regex": "a"}, {"grammar": 'start: "a"'}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is given, but this decoder has no tokenizer"):
            decoder.generate([5], **options)
    assert decoder.generate([5], max_new_tokens=2)[0].text is None


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model is a int"):
        Decoder(5)
    with pytest.raises(ValueError, match="model is a Linear"):
        Decoder(torch.nn.Linear(2, 2))


SPECULATIVE = [
    ({"num_assistant_tokens": -1}, ValueError, "num_assistant_tokens is -1; it must be an integer from 0 to 63, or None (as many as pay)"),
    ({"num_assistant_tokens": 64}, ValueError, "num_assistant_tokens is 64; it must be an integer from 0 to 63"),
    ({"num_assistant_tokens": True}, TypeError, "num_assistant_tokens is True; it must be an integer from 0 to 63"),
    ({"num_assistant_tokens": "3"}, TypeError, "num_assistant_tokens is '3'"),
    ({"num_assistant_tokens": 2.0}, TypeError, "num_assistant_tokens is 2.0"),
    ({"num_speculative_tokens": -2}, ValueError, "num_assistant_tokens is -2"),
    ({"num_draft_tokens": 3, "num_assistant_tokens": 3}, TypeError, "got 'num_assistant_tokens' twice"),
    ({"speculative": "yes"}, TypeError, "speculative is 'yes'; it must be True or False"),
    ({"speculative": 1}, TypeError, "speculative is 1; it must be True or False"),
    ({"speculative": False, "num_assistant_tokens": 3}, ValueError,
     "num_assistant_tokens is 3; with speculative=False it must be 0 or None"),
    ({"speculative": True, "num_assistant_tokens": 0}, ValueError,
     "num_assistant_tokens is 0; with speculative=True it must be at least 1, or None"),
    ({"verification": "x"}, ValueError, "verification is 'x'; it must be 'replay' or 'block'"),
    ({"verification": 3}, ValueError, "verification is 3; it must be 'replay' or 'block'"),
    ({"verification": "block", "logits_processor": max}, ValueError, "verification is 'block'; it cannot be used with a logits_processor"),
    ({"num_beams": 2, "speculative": True}, ValueError, "speculative is True; it cannot be used with num_beams above 1"),
    ({"num_beams": 2, "num_assistant_tokens": 3}, ValueError, "num_assistant_tokens is 3; it cannot be used with num_beams above 1"),
    ({"num_beams": 2, "verification": "block"}, ValueError, "verification is 'block'; it cannot be used with num_beams above 1"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "words"), SPECULATIVE, ids=[words[:50] for *_, words in SPECULATIVE])
def test_options_of_speculation(llama, decoder: Decoder, options, error, words):
    """With a drafter and without: what cannot be is the same."""
    for one in (decoder, Decoder(llama, cache_tokens=256, draft=PromptLookup())):
        with pytest.raises(error) as caught:
            one.generate([5], **options)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not one.loop.scheduler.has_work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative": True}, "speculative is True"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens is 3"),
        ({"verification": "block"}, "verification is 'block'"),
    ],
)
def test_speculation_without_a_drafter(decoder: Decoder, options, words):
    with pytest.raises(ValueError) as caught:
        decoder.generate([[5], [6]], params=[SamplingParams(), SamplingParams(**options)])
    assert str(caught.value) == f"{words}, but this decoder has no drafter; use Decoder(model, draft=...)"
    assert not decoder.loop.scheduler.has_work
    for off in ({"speculative": False}, {"num_assistant_tokens": 0}, {"speculative": None, "verification": None}):
        assert len(decoder.generate([5], max_new_tokens=2, **off)[0].token_ids) == 2


NO_DRAFTER = "it must be a model, a path, 'bundled', a drafter (PromptLookup(), SuffixLookup(), DraftModel(...)), a list of these, or None"


@pytest.mark.parametrize(
    ("draft", "error", "words"),
    [
        (lambda: 5, TypeError, f"draft is a int; {NO_DRAFTER}"),
        (lambda: True, TypeError, "draft is a bool; it must be a model"),
        (lambda: {}, TypeError, "draft is a dict; it must be a model"),
        (lambda: PromptLookup, TypeError, "draft is a type; it must be a model"),
        (lambda: [PromptLookup(), None], TypeError, "draft is a NoneType; it must be a model"),
        (lambda: [], ValueError, "draft is an empty list; it must name at least one drafter, or be None"),
        (lambda: [PromptLookup(), ()], ValueError, "draft is an empty list"),
        (lambda: "nowhere", FileNotFoundError, "draft: 'nowhere' does not exist"),
        (lambda: torch.nn.Linear(2, 2), ValueError, "draft: model is a Linear"),
        (lambda: small_llama().to("meta"), ValueError, "draft: model LlamaForCausalLM is on device meta; it must be on one of cpu, cuda"),
        (lambda: small_llama(vocab_size=99), ValueError,
         "draft model LlamaForCausalLM has a vocabulary of 99 tokens; it must have the model's 101"),
        (lambda: small_llama(max_position_embeddings=128), ValueError,
         "draft model LlamaForCausalLM has a length of 128 tokens; it must have at least the model's 256, or use Decoder(max_position="),
        (lambda: [one := DraftModel(small_llama()), one], ValueError, "draft holds the same drafter twice"),
        (lambda: "", ValueError, "draft is ''; it must be a path"),
        (lambda: SuffixLookup(length_factor=None), TypeError, "length_factor is None; it must be a number"),
    ],
)  # fmt: skip
def test_a_draft_that_cannot_be(llama, draft, error, words):
    with pytest.raises(error) as caught:
        Decoder(llama, cache_tokens=256, draft=draft())
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_draft_model_serves_one_decoder(llama):
    model = DraftModel(small_llama(seed=1))
    with pytest.raises(RuntimeError, match="draft model LlamaForCausalLM belongs to no decoder yet"):
        model.pool  # noqa: B018
    with pytest.raises(ValueError, match="vocabulary of 99"):  # of the other one: this one stays free
        Decoder(llama, cache_tokens=256, draft=[model, small_llama(vocab_size=99)])
    Decoder(llama, cache_tokens=256, draft=model)
    with pytest.raises(ValueError, match="drafts for another decoder already"):
        Decoder(llama, cache_tokens=256, draft=model)
    for width, error in ((0, ValueError), (64, ValueError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"width is {width!r}; it must be an integer from 1 to 63"):
            DraftModel(llama, width=width)


def test_a_draft_with_another_tokenizer(tmp_path):
    for file in BUNDLED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    text = (BUNDLED / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").unlink()
    other = json.loads(text)
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ValueError, match="draft model .* has another tokenizer than the model; the same ids must mean the same text"):
        Decoder.bundled(cache_tokens=256, draft=tmp_path)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    Decoder.bundled(cache_tokens=256, draft=[tmp_path, "bundled"])
