"""Every option of a request: what is accepted, what it resolves to, and one sentence for everything else."""

from __future__ import annotations

import math

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


def test_unknown_options_suggest_the_nearest():
    with pytest.raises(TypeError, match=r"generate\(\) got an unknown option 'temprature'; did you mean 'temperature'\?"):
        SamplingParams.from_options("generate()", {"temprature": 1.0})
    with pytest.raises(TypeError, match="known options are max_new_tokens, "):
        SamplingParams.from_options("generate()", {"zzzz": 1})
    with pytest.raises(TypeError, match="got 'max_new_tokens' twice"):
        SamplingParams.from_options("generate()", {"max_new_tokens": 1, "max_tokens": 1})


def test_child_seeds_are_distinct_and_the_first_is_the_seed():
    seeds = [child_seed(seed, i) for seed in (0, 7, 2**64 - 1) for i in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**64 for s in seeds)
    assert child_seed(7, 0) == 7
