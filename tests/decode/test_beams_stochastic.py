"""Stochastic beams against enumeration: the sequences are distinct, and their order is that of draws without replacement."""

from __future__ import annotations

import itertools

import pytest
import torch
from decode.small_models import small_llama
from scipy.stats import chisquare

from engine import BeamParams, Decoder
from engine.decode import beam, beam_rows

PROMPT, VOCAB, LENGTH, END = [0, 1, 2, 2, 1], 4, 3, 3  # beams of so few tokens often want the same one
DRAWS, WIDTH, TEMPERATURE = 4000, 3, 3.0


@pytest.fixture(scope="module")
def model():
    return small_llama(seed=3, vocab_size=VOCAB, eos_token_id=END)


@pytest.fixture(scope="module")
def law(model) -> dict[tuple[int, ...], float]:
    """Every sequence that can be drawn and its probability: one of the tokens is an end."""
    probabilities: dict[tuple[int, ...], float] = {}

    def grow(sequence: tuple[int, ...], p: float) -> None:
        if len(sequence) == LENGTH or END in sequence:
            probabilities[sequence] = p
            return
        with torch.no_grad():
            softmax = model(torch.tensor([[*PROMPT, *sequence]])).logits[0, -1].double().div(TEMPERATURE).softmax(0)
        for token, q in enumerate(softmax.tolist()):
            grow((*sequence, token), p * q)

    grow((), 1.0)
    return probabilities


def draw(model, count: int = DRAWS) -> list[list[tuple[int, ...]]]:
    params = [
        BeamParams(num_beams=WIDTH, do_sample=True, temperature=TEMPERATURE, max_new_tokens=LENGTH, num_return_sequences=WIDTH, seed=seed)
        for seed in range(count)
    ]
    outputs = Decoder(model, cache_tokens=4096).generate([PROMPT] * count, params=params)
    return [[tuple(o.token_ids) for o in outputs[i : i + WIDTH]] for i in range(0, len(outputs), WIDTH)]


def p_values(law: dict[tuple[int, ...], float], samples: list[list[tuple[int, ...]]]) -> list[float]:
    """Of the law of the first draw, of the ordered first two, and of the third: chi-square, rare outcomes taken together."""
    expected: list[dict] = [dict(law), {}, dict.fromkeys(law, 0.0)]
    for a, b in itertools.permutations(law, 2):
        expected[1][a, b] = law[a] * law[b] / (1 - law[a])
        for c in law:
            if c not in (a, b):
                expected[2][c] += expected[1][a, b] * law[c] / (1 - law[a] - law[b])
    seen = [[s[0] for s in samples], [(s[0], s[1]) for s in samples], [s[2] for s in samples]]
    results = []
    for probabilities, outcomes in zip(expected, seen, strict=True):
        common = [key for key, p in probabilities.items() if p * len(samples) >= 8]
        counts = [outcomes.count(key) for key in common]
        wanted = [probabilities[key] * len(samples) for key in common]
        if len(common) < len(probabilities):
            counts.append(len(samples) - sum(counts))
            wanted.append(len(samples) - sum(wanted))
        assert len(common) > 5
        results.append(chisquare(counts, wanted).pvalue)
    return results


def test_samples_without_replacement(model, law):
    samples = draw(model)
    assert all(len(set(sample)) == WIDTH for sample in samples)
    assert set(itertools.chain(*samples)) <= set(law)
    assert min(p_values(law, samples)) > 1e-5, p_values(law, samples)


@pytest.mark.parametrize("mutant", ["shared noise", "no conditioning"])
def test_the_test_fails_on(monkeypatch, model, law, mutant):
    if mutant == "shared noise":
        monkeypatch.setattr(beam_rows, "noise_stream", lambda beam: 7)
    else:
        monkeypatch.setattr(beam_rows, "condition", lambda parent, noisy: [parent.score + x for x in noisy])
    assert min(p_values(law, draw(model))) < 1e-8


def test_conditioned_maxima(model):
    """The largest becomes the parent's; the order stays; nothing breaks on far or equal values."""
    decoder = Decoder(model, cache_tokens=256)
    request = decoder.prepare("test", PROMPT, None, None, {"num_beams": 2, "do_sample": True, "max_new_tokens": 5}).requests[0]
    parent = request.beams[0]
    parent.score, parent.perturbed = -5.0, -3.5
    for noisy in ([2.0, 1.0, 0.999999, -40.0], [0.0, -1e-30], [50.0, 49.0, -800.0], [1.0, 1.0]):
        conditioned = beam.condition(parent, noisy)
        assert conditioned[0] == -3.5 and conditioned == sorted(conditioned, reverse=True)
        for g, value in zip(noisy[1:], conditioned[1:], strict=True):
            if noisy[0] - 30 < g < noisy[0] - 1e-3:  # where the plain form of the equation can be computed
                terms = torch.tensor([3.5, -(noisy[0] - 5), -(g - 5)], dtype=torch.float64).exp()
                assert value == pytest.approx(-float((terms[0] - terms[1] + terms[2]).log()), rel=1e-9)


def test_scores_are_ranked_and_replayed(model):
    decoder = Decoder(model, cache_tokens=2048)
    options = {"num_beams": 4, "num_return_sequences": 4, "do_sample": True, "max_new_tokens": 20, "temperature": 0.8}
    first = decoder.generate([PROMPT, [1]], seed=4, **options)
    scores = [o.score for o in first[:4]]
    assert scores == sorted(scores, reverse=True) and all(o.beam_score != o.score for o in first[:4])
    replay = decoder.generate([1], seed=first[4].seed, stream=first[4].stream, **options)
    assert [(o.token_ids, o.score) for o in replay] == [(o.token_ids, o.score) for o in first[4:]]
    assert [o.token_ids for o in decoder.generate(PROMPT, seed=5, **options)] != [o.token_ids for o in first[:4]]
