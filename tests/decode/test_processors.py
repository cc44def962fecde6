"""Custom processors: what they get, what becomes of what they return, and that their failures are their request's alone."""

from __future__ import annotations

import math

import pytest
import torch
from decode.small_models import small_llama
from torch import Tensor

from engine import Decoder, SamplingParams

PROMPT = [5, 6, 7]
OPTIONS = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 30, "repetition_penalty": 1.2, "seed": 4, "ignore_eos": True}


def test_one_that_changes_nothing_changes_nothing(decoder):
    plain = decoder.generate(PROMPT, logprobs=3, **OPTIONS)[0]
    seen: list[tuple[list[int], Tensor]] = []

    def watch(token_ids, logits):
        seen.append((token_ids, logits))
        return logits

    output = decoder.generate(PROMPT, logprobs=3, logits_processor=watch, **OPTIONS)[0]
    for name in ("token_ids", "logprobs", "processed_logprobs", "top_logprobs", "processed_top_logprobs"):
        assert getattr(output, name) == getattr(plain, name), name
    assert [tokens for tokens, _ in seen] == [PROMPT + plain.token_ids[:i] for i in range(16)]
    assert all(logits.shape == (101,) and logits.dtype == torch.float32 for _, logits in seen)
    # It got the model's own rows: their log-softmax is the raw logprob.
    raw = [logits.double().log_softmax(0)[token].item() for (_, logits), token in zip(seen, plain.token_ids, strict=True)]
    assert raw == pytest.approx(plain.logprobs, abs=1e-5)


def test_its_arguments_are_copies(decoder):
    plain = decoder.generate(PROMPT, logprobs=2, **OPTIONS)[0]

    def spoil(token_ids, logits):
        kept = logits.clone()
        token_ids.append(99)
        logits.fill_(math.nan)
        return kept

    output = decoder.generate(PROMPT, logprobs=2, logits_processor=spoil, **OPTIONS)[0]
    assert (output.token_ids, output.logprobs, output.top_logprobs) == (plain.token_ids, plain.logprobs, plain.top_logprobs)

    def keep(token_ids, logits):
        kept.append(logits)
        return logits * 3

    kept: list[Tensor] = []
    token = decoder.generate(PROMPT, max_new_tokens=1, logits_processor=keep)[0].token_ids[0]
    assert kept[0].log_softmax(0)[token].item() == pytest.approx(plain.top_logprobs[0][token], abs=1e-5)  # as it was given


def test_what_it_returns_is_drawn_from_and_the_raw_logprobs_stay_the_models(decoder):
    def force(token):
        return lambda token_ids, logits: torch.full_like(logits, -math.inf).index_fill(0, torch.tensor([token]), 0.0)

    plain = decoder.generate(PROMPT, max_new_tokens=1, logprobs=101)[0]
    for token in (0, 50, 100):
        output = decoder.generate(PROMPT, max_new_tokens=1, logprobs=4, logits_processor=force(token))[0]
        assert output.token_ids == [token] and output.processed_logprobs == [0.0]
        assert output.processed_top_logprobs == [{token: 0.0}]
        assert output.logprobs == [plain.top_logprobs[0][token]]
        assert list(output.top_logprobs[0].items()) == list(plain.top_logprobs[0].items())[:4]


def test_several_are_called_in_order(decoder):
    def double(token_ids, logits):
        return logits * 2

    def shift(token_ids, logits):
        return logits + torch.arange(101) * 0.05

    both = decoder.generate(PROMPT, logits_processor=[double, shift], **OPTIONS)[0]
    assert both.token_ids == decoder.generate(PROMPT, logits_processor=lambda t, x: shift(t, double(t, x)), **OPTIONS)[0].token_ids
    assert both.token_ids != decoder.generate(PROMPT, logits_processor=[shift, double], **OPTIONS)[0].token_ids


def fail(token_ids, logits):
    raise RuntimeError("no\nway")


def fail_late(token_ids, logits):
    return fail(token_ids, logits) if len(token_ids) == 7 else logits


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def fail_speechlessly(token_ids, logits):
    raise Speechless


def leave(token_ids, logits):
    raise SystemExit(3)


FAILURES = [
    (leave, 0, "logits_processor raised SystemExit at position 3: 3"),
    (fail_speechlessly, 0, "logits_processor raised Speechless at position 3: (without a message)"),
    (lambda t, x: x.to_sparse(), 0, "logits_processor returned a torch.sparse_coo tensor at position 3; it must be a dense one"),
    (fail, 0, "logits_processor raised RuntimeError at position 3: no way"),
    (fail_late, 4, "logits_processor raised RuntimeError at position 7: no way"),
    (lambda t, x: None, 0, "logits_processor returned a NoneType at position 3; it must return a tensor"),
    (lambda t, x: x.tolist(), 0, "logits_processor returned a list at position 3"),
    (
        lambda t, x: x[:-1],
        0,
        "logits_processor returned torch.float32 [100] on cpu at position 3; it must return torch.float32 [101] on cpu",
    ),
    (lambda t, x: x[None], 0, "logits_processor returned torch.float32 [1, 101]"),
    (lambda t, x: x.double(), 0, "logits_processor returned torch.float64 [101]"),
    (lambda t, x: x * math.nan, 0, "logits_processor returned NaN at position 3"),
    (lambda t, x: x - math.inf, 0, "no token can be drawn at position 3: logits_processor leaves none with a logit above -inf"),
]


@pytest.mark.parametrize(("processor", "length", "error"), FAILURES, ids=[error[:60] for *_, error in FAILURES])
def test_a_failure_ends_its_request_alone(decoder, processor, length: int, error: str):
    alone = decoder.generate(PROMPT, **OPTIONS)[0]
    params = [
        SamplingParams(**OPTIONS),
        SamplingParams(**OPTIONS, logits_processor=processor, num_return_sequences=2),
        SamplingParams(**OPTIONS),
    ]
    first, bad, also_bad, second = decoder.generate([PROMPT] * 3, params=params)
    for output in (bad, also_bad):
        assert output.finish_reason == "error" and output.error.startswith(error) and "\n" not in output.error
        assert len(output.token_ids) == length and bad.token_ids == alone.token_ids[:length]
    for output in (first, second):
        assert (output.token_ids, output.logprobs) == (alone.token_ids, alone.logprobs)


def test_one_must_not_call_its_own_decoder(decoder):
    bad, good = decoder.generate(
        [PROMPT] * 2,
        params=[
            SamplingParams(**OPTIONS, logits_processor=lambda t, x: decoder.generate(PROMPT, max_new_tokens=1) and x),
            SamplingParams(**OPTIONS),
        ],
    )
    assert "a logits_processor must not call its own decoder" in bad.error
    assert good.token_ids == decoder.generate(PROMPT, **OPTIONS)[0].token_ids


def test_an_interrupt_in_one_is_no_failure_of_the_request(decoder):
    def interrupt(token_ids, logits):
        if len(token_ids) == 6 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return logits

    interrupted: list[bool] = []
    plain = decoder.generate(PROMPT, **OPTIONS)[0]
    stream = decoder.stream(PROMPT, logits_processor=interrupt, **OPTIONS)
    events = [next(stream) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        decoder.step()
    events += list(stream)
    assert [t for e in events for t in e.token_ids] == plain.token_ids


def test_nan_and_minus_infinity_of_the_model_itself():
    decoder = Decoder(small_llama(seed=3), cache_tokens=1024)
    logits = decoder.model.forward_logits
    decoder.model.forward_logits = lambda *step: logits(*step).index_fill(1, torch.tensor([7]), -math.inf)  # type: ignore[method-assign]

    def want_seven(token_ids, row):
        assert row[7] == -math.inf
        return torch.zeros_like(row).index_fill(0, torch.tensor([7]), 50.0)

    plain = decoder.generate([5], max_new_tokens=1, logprobs=3)[0]
    output = decoder.generate([5], max_new_tokens=1, logprobs=3, logits_processor=want_seven)[0]
    assert output.token_ids == [7] and output.logprobs == [-math.inf] and output.cumulative_logprob == -math.inf
    assert output.top_logprobs == plain.top_logprobs and output.error is None

    decoder.model.forward_logits = lambda *step: logits(*step).index_fill(1, torch.tensor([7]), math.nan)  # type: ignore[method-assign]
    output = decoder.generate([5], max_new_tokens=1, logits_processor=want_seven)[0]
    assert output.error == "the model's logits for position 1 hold NaN"
