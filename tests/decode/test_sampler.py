"""The sampler keeps what rows ask for from step to step: whatever came before, it draws what a new one would draw."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from engine import Decoder, kernels
from engine.decode.sample import FILTERED, FUSED, PREPARED, Sampler, columns_of, drawn_by, drawn_of, law
from engine.kernels import merge_draws
from engine.request import Drawn, Lookahead, Request

OPTIONS = (
    {"do_sample": False},
    {"temperature": 0.9},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.1, "top_p": 0.6, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"do_sample": False, "min_new_tokens": 4, "stop_token_ids": (3, 4, 5)},
    {"temperature": 1.0, "logit_bias": {7: 2.0, 9: -1.0}},
    {"do_sample": False, "prefix_token_ids": (11, 12)},
    {"temperature": 1.0, "allowed_token_ids": (1, 4, 8, 20)},
    {"temperature": 0.8, "logprobs": 3},
    {"temperature": 0.8, "logits_processor": lambda tokens, logits: logits.flip(0)},
)


@pytest.fixture(params=["cpu", "reference"])
def ops(request: pytest.FixtureRequest) -> kernels.Ops:
    if (reason := kernels.backends("cpu")[request.param]) is not None:
        pytest.skip(reason)
    return kernels.select("cpu", request.param)


def make(decoder: Decoder, options: dict, seed: int) -> Request:
    (request,) = decoder.prepare("test", [5, 6, 7], None, None, {**options, "seed": seed, "max_new_tokens": 50}).requests
    return request


@pytest.mark.parametrize("seed", range(4))
def test_it_draws_what_a_new_one_draws(decoder, ops: kernels.Ops, seed: int):
    """Rows that come, go, change places and stay, of every kind of option, at positions that move on."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kept = Sampler(ops)
    rows: list[Request] = []
    for step in range(30):
        if not rows or rng.random() < 0.4:
            rows = [row for row in rows if rng.random() < 0.7]
            rows += [make(decoder, rng.choice(OPTIONS), 100 * step + i) for i in range(rng.randint(1, 3))]
            rng.shuffle(rows)
        logits = 3 * torch.randn(len(rows), 101, generator=generator)
        logits[rng.randrange(len(rows)), rng.randrange(101)] = rng.choice([0.0, float("inf"), float("-inf"), float("nan")])
        drawn = kept.draw(logits.clone(), list(rows))
        alone = Sampler(ops).draw(logits.clone(), list(rows))
        assert repr(drawn) == repr(alone)  # NaN is not itself
        for row, one in zip(rows, drawn, strict=True):
            row.append(one._replace(token=one.token if one.error is None else 13))


def test_rows_that_the_head_draws_for(decoder, ops: kernels.Ops):
    """What can draw for rows is what their options ask for; fused, they get what they would get from logits."""
    kinds = [FUSED, FUSED, FILTERED, FILTERED, *[PREPARED] * 7]
    requests = [make(decoder, options, i) for i, options in enumerate(OPTIONS)]
    assert [drawn_by([request]) for request in requests] == kinds
    assert drawn_by([*requests[:2], requests[2]]) == FILTERED and drawn_by([*requests[:3], requests[4]]) == PREPARED
    greedy = make(decoder, {"do_sample": False, "top_k": 5, "top_p": 0.5}, 0)
    assert drawn_by([greedy]) == FUSED

    rows: list[Request | Lookahead] = [*requests[:2], greedy]
    logits = 3 * torch.randn(3, 101, generator=torch.Generator().manual_seed(0))
    logits[0, 5], logits[1, 7] = float("nan"), float("inf")
    temperature, *_, seed, position, stream = law(rows, array("i", [row.num_tokens for row in rows]))
    heads = [merge_draws([ops.sample_head(torch.ones(3, 1), row[:, None], temperature, seed, position, stream)]) for row in logits]
    fused = [drawn_of(columns_of(result), rows)[r] for r, result in enumerate(heads)]
    for one, other in zip(fused, Sampler(ops).draw(logits.clone(), rows), strict=True):
        assert (one.token, one.error) == (other.token, other.error)
        assert one.logprob == pytest.approx(other.logprob, abs=4e-6, nan_ok=True)
        assert one.processed_logprob == pytest.approx(other.processed_logprob, abs=4e-6, nan_ok=True)


def test_all_stays_well_after_an_interruption(decoder, monkeypatch):
    """Wherever it strikes, the next step's rows are not taken for those of a step that never was."""
    generator = torch.Generator().manual_seed(0)
    first, second = make(decoder, {"temperature": 1.0}, 1), make(decoder, {"temperature": 0.5, "top_k": 3}, 2)
    logits = torch.randn(1, 101, generator=generator)
    expected = Sampler(decoder.ops).draw(logits, [second])
    for where in ("law", "tensor_of", "lists"):
        sampler = Sampler(decoder.ops)
        sampler.draw(logits, [first])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"engine.decode.sample.{where}", _interrupt)
            sampler.draw(logits, [make(decoder, OPTIONS[4], 3)])
        assert sampler.draw(logits, [second]) == expected


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_results_are_the_callers_own(decoder):
    """What a step drew does not change when the next one draws."""
    request = make(decoder, {"temperature": 1.0}, 1)
    sampler = Sampler(decoder.ops)
    generator = torch.Generator().manual_seed(1)
    drawn: list[Drawn] = []
    for _ in range(5):
        drawn += sampler.draw(torch.randn(1, 101, generator=generator), [request])
        request.append(drawn[-1])
    assert len({one.logprob for one in drawn}) == 5


def test_generate_makes_no_event_but_the_last(decoder, monkeypatch):
    made, event = [], decoder.loop._event
    monkeypatch.setattr(decoder.loop, "_event", lambda *args: made.append(event(*args)) or made[-1])
    outputs = decoder.generate([[1, 2], [3]], max_new_tokens=6, ignore_eos=True)
    assert [one.output for one in made] == outputs
    made.clear()
    assert [t for one in decoder.stream([[1, 2]], max_new_tokens=6, ignore_eos=True) for t in one.token_ids] == outputs[0].token_ids
    assert len(made) == 6
