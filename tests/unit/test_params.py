"""Every option of a request: what is accepted, what it resolves to, and one sentence for everything else."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from engine.params import SamplingParams, child_seed


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 2.0}, 0.0),
        ({"top_k": 5}, 0.0),
    ],
)
def test_when_a_request_is_greedy(options: dict, temperature: float):
    assert SamplingParams(**options).draw_temperature == temperature


@pytest.mark.parametrize(("top_k", "drawn"), [(None, 0), (0, 0), (-1, 0), (1, 1), (50, 50)])
def test_top_k_off(top_k: int | None, drawn: int):
    assert SamplingParams(top_k=top_k).draw_top_k == drawn


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -0.1}, ValueError, "temperature is -0.1; it must be a finite number of at least 0"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": math.inf}, ValueError, "temperature is inf"),
        ({"temperature": "hot"}, TypeError, "temperature is 'hot'"),
        ({"temperature": True}, TypeError, "temperature is True"),
        ({"top_k": -2}, ValueError, "top_k is -2; it must be a positive integer, or None, 0 or -1 for off"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0; it must be an integer of at least 1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens is 2.0"),
        ({"seed": -1}, ValueError, "seed is -1; it must be an integer from 0"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"stream": 2**31}, ValueError, "stream is 2147483648"),
        ({"stream": 2**31 - 1, "num_return_sequences": 2}, ValueError, "must not pass 2"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences is 0"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0; it must be a finite number above 0"),
        ({"do_sample": "yes"}, TypeError, "do_sample is 'yes'"),
        ({"ignore_eos": None}, TypeError, "ignore_eos is None"),
        ({"stop": ""}, ValueError, "stop is ''"),
        ({"stop": ["a", ""]}, ValueError, "stop is"),
        ({"stop": 5}, TypeError, "stop is 5"),
        ({"stop_token_ids": 1.5}, TypeError, "stop_token_ids is 1.5"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids is -1"),
        ({"eos_token_id": "end"}, TypeError, "eos_token_id is 'end'"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0; it must be a number above 0, at most 1"),
        ({"top_p": 1.0000001}, ValueError, "top_p is 1.0000001"),
        ({"top_p": math.nan}, ValueError, "top_p is nan"),
        ({"top_p": "0.9"}, TypeError, "top_p is '0.9'; it must be a number above 0, at most 1"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1; it must be a number from 0 to 1"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ({"min_p": True}, TypeError, "min_p is True"),
        ({"repetition_penalty": 1e31}, ValueError, "repetition_penalty is 1e+31; it must lie within 1e-30 and 1e+30"),
        ({"presence_penalty": 2.1}, ValueError, "presence_penalty is 2.1; it must be a number from -2 to 2"),
        ({"presence_penalty": math.nan}, ValueError, "presence_penalty is nan"),
        ({"frequency_penalty": -2.1}, ValueError, "frequency_penalty is -2.1; it must be a number from -2 to 2"),
        ({"frequency_penalty": "x"}, TypeError, "frequency_penalty is 'x'"),
        ({"logit_bias": [1, 2]}, TypeError, "logit_bias is [1, 2]; it must be a mapping of token ids to numbers"),
        ({"logit_bias": {"5": 1.0}}, TypeError, "logit_bias, a token id, is '5'; it must be an integer of at least 0"),
        ({"logit_bias": {-5: 1.0}}, ValueError, "logit_bias, a token id, is -5"),
        (
            {"logit_bias": {5: math.inf}},
            ValueError,
            "logit_bias[5] is inf; it must be a number from -1e+30 to 1e+30, or -inf (never drawn)",
        ),
        ({"logit_bias": {5: math.nan}}, ValueError, "logit_bias[5] is nan"),
        ({"logit_bias": {5: -1e31}}, ValueError, "logit_bias[5] is -1e+31"),
        ({"logit_bias": {5: None}}, TypeError, "logit_bias[5] is None"),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids is empty; it must name at least one token, or be None (all)"),
        ({"allowed_token_ids": [-1]}, ValueError, "allowed_token_ids is -1"),
        ({"allowed_token_ids": "abc"}, TypeError, "allowed_token_ids is 'abc'"),
        ({"suppress_tokens": [1.5]}, TypeError, "suppress_tokens is 1.5; it must be an integer of at least 0"),
        ({"suppress_tokens": {5: 1}}, TypeError, "suppress_tokens is {5: 1}; it must be one value or a list of them"),
        ({"bad_words": ""}, ValueError, "bad_words holds ''; a word must have at least one character or token id"),
        ({"bad_words": ["a", []]}, ValueError, "bad_words holds []"),
        ({"bad_words": [5, 6]}, TypeError, "bad_words holds the number 5; it must hold strings or lists of token ids"),
        ({"bad_words": [[5, -6]]}, ValueError, "bad_words is -6"),
        ({"bad_words": 5}, TypeError, "bad_words is 5"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens is -1; it must be an integer of at least 0"),
        ({"min_new_tokens": 1.0}, TypeError, "min_new_tokens is 1.0"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, ValueError, "min_new_tokens is 6; it must be at most max_new_tokens, which is 5"),
        ({"logprobs": -1}, ValueError, "logprobs is -1; it must be an integer of at least 0"),
        ({"logprobs": True}, TypeError, "logprobs is True"),
        ({"logits_processor": 5}, TypeError, "logits_processor is 5"),
        ({"logits_processor": [abs, 5]}, TypeError, "it must be a callable or several of them"),
        ({"json_schema": "{"}, ValueError, "json_schema is '{', which is not JSON: "),
        ({"json_schema": "[1]"}, ValueError, "json_schema is '[1]'; it must be a dict, JSON text of an object, or True (any JSON)"),
        ({"json_schema": False}, ValueError, "json_schema is False"),
        ({"json_schema": 5}, TypeError, "json_schema is 5"),
        ({"json_schema": {"enum": {1, 2}}}, ValueError, "json_schema cannot be written as JSON: "),
        ({"json_schema": {"minimum": math.nan}}, ValueError, "json_schema cannot be written as JSON: "),
        ({"stop": ["a", "\ud800"]}, ValueError, "stop holds '\\ud800', with a lone surrogate, which is not Unicode text"),
        ({"bad_words": "\ud800"}, ValueError, "bad_words holds '\\ud800', with a lone surrogate"),
        ({"regex": "a\udfff"}, ValueError, "regex holds 'a\\udfff', with a lone surrogate"),
        ({"regex": ""}, ValueError, "regex is ''; it must be a non-empty string"),
        ({"regex": 5}, TypeError, "regex is 5"),
        ({"grammar": ["start: x"]}, TypeError, "grammar is ['start: x']; it must be a non-empty string"),
        ({"regex": "a", "grammar": "b"}, ValueError, "regex and grammar are both given; at most one of json_schema, regex, grammar"),
    ],
)
def test_bad_values(options: dict, error: type[Exception], words: str):
    with pytest.raises(error, match=None) as caught:
        SamplingParams(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_and_strings_become_tuples():
    params = SamplingParams(eos_token_id=2, stop_token_ids=[3, 4], stop="end")
    assert (params.eos_token_id, params.stop_token_ids, params.stop) == ((2,), (3, 4), ("end",))


def test_other_engines_names_are_known():
    params = SamplingParams.from_options("generate()", {"max_tokens": 5, "n": 2, "stop_strings": ["x"], "stop_id": 9})
    assert (params.max_new_tokens, params.num_return_sequences, params.stop, params.eos_token_id) == (5, 2, ("x",), (9,))


@pytest.mark.parametrize(
    ("alias", "value", "name", "expected"),
    [
        ("min_tokens", 3, "min_new_tokens", 3),
        ("bad_words_ids", [[5, 6]], "bad_words", ((5, 6),)),
        ("top_logprobs", 4, "logprobs", 4),
        ("logits_processors", [abs], "logits_processor", (abs,)),
        ("beam_width", 3, "num_beams", 3),
        ("beam_size", 3, "num_beams", 3),
        ("guided_json", {}, "json_schema", "{}"),
        ("guided_regex", "a", "regex", "a"),
        ("guided_grammar", "start: A", "grammar", "start: A"),
    ],
)
def test_names_of_the_controls(alias: str, value, name: str, expected):
    assert getattr(SamplingParams.from_options("generate()", {alias: value}), name) == expected
    with pytest.raises(TypeError, match=f"got {name!r} twice"):
        SamplingParams.from_options("generate()", {alias: value, name: value})


def test_every_option_is_documented():
    for option in fields(SamplingParams):
        assert f"\n        {option.name}: " in SamplingParams.__doc__


def test_none_is_off():
    off = SamplingParams()
    for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids", "suppress_tokens",
                 "bad_words", "min_new_tokens", "logprobs", "logits_processor", "json_schema", "regex", "grammar"):  # fmt: skip
        assert SamplingParams(**{name: None}) == off


def test_what_becomes_of_the_values():
    bias = {5: -math.inf, np.int64(6): 2}
    params = SamplingParams(
        logit_bias=bias, bad_words=["end", [5, 6], np.array([7])], suppress_tokens={9}, allowed_token_ids=range(3), logits_processor=abs,
        json_schema={"type": "object"}, top_p=1, min_p=0, stop="x",
    )  # fmt: skip
    bias[7] = 1.0  # the caller's, no longer ours
    assert params.logit_bias == {5: -math.inf, 6: 2.0}
    assert params.bad_words == ("end", (5, 6), (7,))
    assert (params.suppress_tokens, params.allowed_token_ids, params.logits_processor) == ((9,), (0, 1, 2), (abs,))
    assert params.structure == ("json_schema", '{"type": "object"}')
    assert replace(params, seed=3) != params and replace(params) == params
    assert isinstance(hash(params), int)
    assert SamplingParams(json_schema=True).structure == ("json_schema", "{}")
    assert SamplingParams(json_schema='{"a" : 1}').structure == ("json_schema", '{"a": 1}')
    assert SamplingParams(bad_words="end").bad_words == ("end",)
    assert SamplingParams().structure is None
    for edge in (1e30, -1e30):
        assert SamplingParams(logit_bias={1: edge}).logit_bias == {1: edge}


def test_unknown_options_suggest_the_nearest():
    with pytest.raises(TypeError, match=r"generate\(\) got an unknown option 'temprature'; did you mean 'temperature'\?"):
        SamplingParams.from_options("generate()", {"temprature": 1.0})
    with pytest.raises(TypeError, match="unknown option 'presence_penalties'; did you mean 'presence_penalty'"):
        SamplingParams.from_options("generate()", {"presence_penalties": 1.0})
    with pytest.raises(TypeError, match="known options are max_new_tokens, "):
        SamplingParams.from_options("generate()", {"zzzz": 1})
    with pytest.raises(TypeError, match="got 'max_new_tokens' twice"):
        SamplingParams.from_options("generate()", {"max_new_tokens": 1, "max_tokens": 1})


def test_child_seeds_are_distinct_and_the_first_is_the_seed():
    seeds = [child_seed(seed, i) for seed in (0, 7, 2**64 - 1) for i in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**64 for s in seeds)
    assert child_seed(7, 0) == 7
