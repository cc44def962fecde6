"""Beam search: its controls beside transformers, exhaustive search, batches, preemption, streaming, blocks, and how it fails."""

from __future__ import annotations

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from decode.beam_peer import theirs
from decode.small_models import small_llama

from engine import BeamParams, Decoder, SamplingParams
from engine.outputs import RequestOutput


def key(outputs: list[RequestOutput]) -> list[tuple]:
    """All of the outputs that must not depend on anything but the request."""
    return [
        (o.index, o.token_ids, o.logprobs, o.processed_logprobs, o.score, o.beam_score, o.finish_reason, o.stop_reason, o.text, o.error)
        for o in outputs
    ]


CONTROLS = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 6},
    {"suppress_tokens": [7, 8, 9, 10]},
    {"bad_words": [[6], [7, 8], [60, 61, 62]]},
    {"logit_bias": {5: 3.0, 9: -2.0}},
    {"prefix_token_ids": [9, 8, 7]},
]


@pytest.mark.parametrize("controls", CONTROLS, ids=[",".join(c) for c in CONTROLS])
def test_controls_equal_transformers(decoder, llama, controls):
    rng = random.Random(0)
    names = {"bad_words": "bad_words_ids", "logit_bias": "sequence_bias", "prefix_token_ids": "prefix_allowed_tokens_fn"}
    for width in (2, 4):
        prompts = [[rng.randrange(4, 101) for _ in range(9)] for _ in range(6)]
        options = {"num_beams": width, "max_new_tokens": 14}
        for eos in ([], [5, 17]):
            peers = dict(controls)
            if "logit_bias" in controls:
                peers["logit_bias"] = {(token,): bias for token, bias in controls["logit_bias"].items()}
            if "prefix_token_ids" in controls:
                prefix = controls["prefix_token_ids"]
                peers["prefix_token_ids"] = lambda _, ids, prefix=prefix: (
                    [prefix[len(ids) - 9]] if len(ids) - 9 < len(prefix) else list(range(101))
                )
            expected = theirs(
                llama, prompts, eos=eos, num_return_sequences=width, **{names.get(k, k): v for k, v in peers.items()}, **options
            )
            ours = decoder.generate(prompts, eos_token_id=eos, num_return_sequences=width, **controls, **options)
            for output, (tokens, score) in zip(ours, itertools.chain(*expected), strict=True):
                assert output.token_ids == tokens
                assert output.score == pytest.approx(score, abs=2e-5)


def test_scores_are_sums_of_logprobs(decoder, llama):
    for options in ({}, {"temperature": 0.7, "top_k": 9}, {"repetition_penalty": 1.3, "logit_bias": {5: 1.0}}, {"do_sample": True}):
        penalty = {} if "do_sample" in options else {"length_penalty": 0.5}
        for o in decoder.generate(
            [3, 4, 5], num_beams=4, num_return_sequences=4, max_new_tokens=9, eos_token_id=5, seed=1, **options, **penalty
        ):
            total = np.float32(0)
            for logprob in o.processed_logprobs:
                total += np.float32(logprob)
            assert o.beam_score == total
            if penalty:
                assert o.score == total / np.float32(len(o.token_ids) ** 0.5)
            with torch.no_grad():
                logits = llama(torch.tensor([[3, 4, 5, *o.token_ids]])).logits[0, 2:-1].double()
            own = logits.log_softmax(-1)[range(len(o.token_ids)), o.token_ids]
            assert torch.allclose(torch.tensor(o.logprobs, dtype=torch.float64), own, atol=1e-4)
            assert (o.logprobs == o.processed_logprobs) == (options in ({}, {"do_sample": True}))


@pytest.mark.parametrize("eos", [[], [20]])
def test_width_of_all_is_exhaustive_search(eos):
    """Five tokens, length 4, width 5^3: the 125 best of all sequences, in order. (The vocabulary is larger: no width may pass its size.)"""
    model = small_llama(vocab_size=128, eos_token_id=None)
    tokens = [10, 20, 30, 40, 50]
    decoder = Decoder(model, cache_tokens=16384, max_batch_size=128)
    outputs = decoder.generate(
        [3, 4, 5], num_beams=125, num_return_sequences=125, max_new_tokens=4, allowed_token_ids=tokens, eos_token_id=eos,
        length_penalty=0.0, early_stopping="never",
    )  # fmt: skip
    every = list(itertools.product(tokens, repeat=4))
    with torch.no_grad():
        logprobs = model(torch.tensor([[3, 4, 5, *s] for s in every])).logits[:, 2:-1].double().log_softmax(-1)
    scores: dict[tuple[int, ...], float] = {}
    for row, sequence in zip(logprobs.tolist(), every, strict=True):
        end = next((i + 1 for i, token in enumerate(sequence) if token in eos), 4)
        scores[sequence[:end]] = sum(row[i][sequence[i]] for i in range(end))
    best = sorted(scores, key=lambda s: -scores[s])[:125]
    assert [tuple(o.token_ids) for o in outputs] == best
    assert [o.score for o in outputs] == pytest.approx([scores[s] for s in best], abs=2e-5)
    assert {o.finish_reason for o in outputs} == ({"stop", "length"} if eos else {"length"})


def diverse(model, prompt: list[int], width: int, groups: int, penalty: float, steps: int) -> list[tuple[list[int], float]]:
    """Diverse beam search (Vijayakumar et al. 2016) written down plainly, without end tokens; all sequences, best first."""
    size = width // groups
    beams = [[([], 0.0)] for _ in range(groups)]
    for _ in range(steps):
        taken: list[int] = []
        for g in range(groups):
            candidates = []
            for tokens, score in beams[g]:
                with torch.no_grad():
                    logprobs = model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
                for token in taken:
                    logprobs[token] -= penalty
                candidates += [([*tokens, t], score + x) for t, x in enumerate(logprobs.tolist())]
            beams[g] = sorted(candidates, key=lambda c: -c[1])[:size]
            taken += [tokens[-1] for tokens, _ in beams[g]]
    return sorted(((t, s / steps) for group in beams for t, s in group), key=lambda c: -c[1])


@pytest.mark.parametrize(("width", "groups"), [(2, 2), (4, 2), (6, 3), (4, 4)])
def test_diverse_groups(decoder, llama, width, groups):
    for prompt in ([5], [7, 8, 9], list(range(10, 40))):
        outputs = decoder.generate(
            prompt,
            num_beams=width,
            num_beam_groups=groups,
            diversity_penalty=1.5,
            num_return_sequences=width,
            max_new_tokens=8,
            ignore_eos=True,
        )
        expected = diverse(llama, prompt, width, groups, 1.5, 8)
        assert [o.token_ids for o in outputs] == [tokens for tokens, _ in expected]
        assert [o.score for o in outputs] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert len({tuple(o.token_ids) for o in outputs}) > 1


MIXED = [
    BeamParams(num_beams=4, num_return_sequences=3, max_new_tokens=20, eos_token_id=5),
    SamplingParams(max_new_tokens=25, temperature=0.9, seed=3, num_return_sequences=2),
    BeamParams(num_beams=8, num_return_sequences=2, max_new_tokens=12, early_stopping=True, eos_token_id=(5, 17), repetition_penalty=1.2),
    SamplingParams(max_new_tokens=15),
    BeamParams(num_beams=3, do_sample=True, seed=9, num_return_sequences=3, max_new_tokens=10, eos_token_id=5),
    BeamParams(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, num_return_sequences=4, max_new_tokens=11, eos_token_id=17),
    BeamParams(num_beams=2, max_new_tokens=40, length_penalty=0.0, early_stopping="never", temperature=1.5, top_k=10),
    BeamParams(num_beams=16, max_new_tokens=9, no_repeat_ngram_size=2, prefix_token_ids=(9,), ignore_eos=True),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk": 7},
        {"max_batch_tokens": 16, "max_batch_size": 16},
        {"cache_tokens": 640},
        {"cache_tokens": 400, "prefill_chunk": 5},
    ],
    ids=str,
)
def test_the_same_alone_and_together(llama, options):
    """In a batch with everything else, in chunks, and preempted, to the bit."""
    rng = random.Random(2)
    prompts = [[rng.randrange(4, 101) for _ in range(rng.choice([1, 16, 30, 50]))] for _ in MIXED]
    alone = [key(Decoder(llama, cache_tokens=4096).generate(p, params=[params])) for p, params in zip(prompts, MIXED, strict=True)]
    decoder = Decoder(llama, **{"cache_tokens": 4096, **options})
    outputs = decoder.generate(prompts, params=MIXED)
    together = [key([o for o in outputs if o.prompt_index == i]) for i in range(len(MIXED))]
    assert together == alone
    preempted = sum(o.metrics.num_preemptions for o in outputs)
    assert (preempted > 0) == ("cache_tokens" in options)
    decoder.loop.pool.check([])
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def test_a_step_run_again_repeats_nothing(llama, monkeypatch):
    """An interrupt at any step: everything starts over from what it has, and ends the same."""
    prompts = [[5, 6, 7]] * len(MIXED)
    expected = key(Decoder(llama, cache_tokens=4096).generate(prompts, params=MIXED))
    decoder = Decoder(llama, cache_tokens=4096)
    run, calls = decoder.loop.runner.run, itertools.count()

    def interrupted(plan):
        logits = run(plan)
        if next(calls) % 3 == 1:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(decoder.loop.runner, "run", interrupted)
    step = decoder.loop.step

    def again():
        try:
            step()
        except KeyboardInterrupt:
            decoder.loop.scheduler.check()

    monkeypatch.setattr(decoder.loop, "step", again)
    assert key(decoder.generate(prompts, params=MIXED)) == expected


def test_stream_shows_what_is_settled(bundled):
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 40}
    prompt = "def read_csv(path):\n"
    outputs = bundled.generate(prompt, **options)
    events = list(bundled.stream(prompt, **options))
    for output in outputs:
        mine = [e for e in events if e.index == output.index]
        assert [t for e in mine for t in e.token_ids] == output.token_ids
        assert [x for e in mine for x in e.logprobs] == output.logprobs
        assert "".join(e.text for e in mine) == output.text == bundled.tokenizer.decode(output.token_ids)
        assert key([mine[-1].output]) == key([output]) and all(e.output is None for e in mine[:-1])
    early = [e for e in events if e.index == 0][:-1]
    assert len(early) > 2 and sum(len(e.token_ids) for e in early) > 10, "nothing settled before the end"
    assert [e.output.index for e in events if e.output is not None] == [0, 1]


def test_leaving_a_stream_frees_everything(bundled):
    for steps in range(6):
        stream = bundled.stream(["import os\n", "class A"], num_beams=5, max_new_tokens=30)
        for _ in range(steps):
            next(stream)
        stream.close()
        assert not bundled.loop.scheduler.has_work and bundled.loop.pool.num_free == bundled.loop.pool.num_blocks


def test_beams_share_the_prompts_blocks(llama):
    prompt = list(range(4, 100)) * 2  # 192 tokens, 12 blocks
    output = Decoder(llama, cache_tokens=4096).generate(prompt, num_beams=16, max_new_tokens=30, ignore_eos=True)[0]
    # Past the prompt each beam may have two blocks of its own; what they have in common is shared there too.
    assert 12 + 2 <= output.metrics.peak_blocks <= 12 + 16 * 2
    single = Decoder(llama, cache_tokens=4096).generate(prompt, max_new_tokens=30, ignore_eos=True)[0]
    assert single.metrics.peak_blocks == 14


def test_grammar_in_beams(bundled):
    pytest.importorskip("llguidance")
    pattern = r" ?[a-z]{2,5}(_[a-z]{2,4})?\n"
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 20, "regex": pattern}
    outputs = bundled.generate("name = ", **options)
    assert all(re.fullmatch(pattern, o.text) and o.finish_reason == "stop" for o in outputs)
    assert len({o.text for o in outputs}) == 4
    assert [o.score for o in outputs] == sorted((o.score for o in outputs), reverse=True)
    together = bundled.generate(["name = ", "import "], params=[BeamParams(**options), BeamParams(num_beams=3, max_new_tokens=8)])
    assert key(together[:4]) == key(outputs)


def test_too_few_continuations(decoder):
    """top_k below the width: fewer live beams; places that no sequence is found for say so."""
    outputs = decoder.generate([5, 6], num_beams=4, top_k=1, num_return_sequences=4, max_new_tokens=5, ignore_eos=True)
    assert outputs[0].token_ids == decoder.generate([5, 6], max_new_tokens=5, ignore_eos=True)[0].token_ids
    assert outputs[0].finish_reason == "length" and outputs[0].beam_score == 0
    for o in outputs[1:]:
        assert (o.finish_reason, o.token_ids, o.score) == ("error", [], None)
        assert o.error == "the search found only 1 of 4 sequences: too few continuations are possible"
    two = decoder.generate([5, 6], num_beams=4, top_k=2, num_return_sequences=4, max_new_tokens=3, ignore_eos=True)
    assert len({tuple(o.token_ids) for o in two}) == 4 and all(o.error is None for o in two)


def test_failures_are_the_requests_alone(decoder):
    def nan_later(token_ids, logits):
        return logits * math.nan if len(token_ids) == 5 else logits

    params = [
        BeamParams(num_beams=3, max_new_tokens=8, logits_processor=nan_later, num_return_sequences=2),
        BeamParams(num_beams=3, max_new_tokens=8),
        BeamParams(num_beams=3, max_new_tokens=8, allowed_token_ids=(9,), bad_words=((9, 9),)),
    ]
    outputs = decoder.generate([[5, 6, 7]] * 3, params=params)
    assert [o.finish_reason for o in outputs[:2]] == ["error"] * 2
    assert outputs[0].error == "logits_processor returned NaN at position 5"
    assert key(outputs[2:3]) == key(decoder.generate([5, 6, 7], params=params[1]))
    assert outputs[3].error == "no token can be drawn at position 4: bad_words and allowed_token_ids leave none with a logit above -inf"


def test_a_processor_changes_the_search(decoder):
    def halve(token_ids, logits):
        return logits / 2

    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9, "ignore_eos": True}
    processed = decoder.generate([5, 6], logits_processor=halve, **options)
    cooled = decoder.generate([5, 6], temperature=2.0, **options)
    assert [o.token_ids for o in processed] == [o.token_ids for o in cooled]
    assert [o.logprobs for o in processed] == [pytest.approx(o.logprobs, abs=1e-5) for o in cooled]
    assert processed[0].logprobs != processed[0].processed_logprobs


def test_width_one_is_plain_decoding(decoder):
    plain = decoder.generate([5, 6], max_new_tokens=9)
    assert key(decoder.generate([5, 6], max_new_tokens=9, num_beams=1, length_penalty=0.5)) == key(plain)
    draws = decoder.generate([5, 6], max_new_tokens=9, num_beams=1, temperature=1.0, num_return_sequences=3, seed=1)
    assert key(draws) == key(decoder.generate([5, 6], max_new_tokens=9, temperature=1.0, num_return_sequences=3, seed=1))


def test_wide_beams(decoder):
    outputs = decoder.generate([5, 6, 7], beam_width=64, num_return_sequences=64, max_new_tokens=6, eos_token_id=5)
    assert len({tuple(o.token_ids) for o in outputs}) == 64
    assert [o.score for o in outputs] == sorted((o.score for o in outputs), reverse=True)


@pytest.mark.slow
def test_a_soak_of_mixed_requests(llama, count=2000):
    """Random requests of all kinds that come and go, in a cache too small for them: what finishes is what the same request alone gives."""
    rng = random.Random(count)
    decoder = Decoder(llama, cache_tokens=320, max_batch_size=32, max_batch_tokens=48, prefill_chunk=9)
    reference = Decoder(llama, cache_tokens=4096)
    running: list[tuple] = []
    submitted = finished = aborted = preempted = 0

    def some_params() -> SamplingParams:
        limits = {"max_new_tokens": rng.randint(1, 17), "eos_token_id": rng.choice([(), (5,), (5, 17, 43)])}
        width = rng.choice([2, 3, 4, 8])
        kind = rng.randrange(5)
        if kind == 0:
            return SamplingParams(**limits)
        if kind == 1:
            return SamplingParams(
                temperature=1.0, top_k=rng.choice([None, 5]), seed=rng.randrange(99), num_return_sequences=rng.randint(1, 3), **limits
            )
        if kind == 2:
            return BeamParams(num_beams=width, do_sample=True, seed=rng.randrange(99), num_return_sequences=width, **limits)
        if kind == 3 and width == 4:
            return BeamParams(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, num_return_sequences=2, **limits)
        return BeamParams(
            num_beams=width, num_return_sequences=rng.randint(1, width), early_stopping=rng.choice([True, False, "never"]),
            length_penalty=rng.choice([0.0, 1.0, 2.0]), repetition_penalty=rng.choice([1.0, 1.3]), **limits,
        )  # fmt: skip

    while submitted < count or running:
        if submitted < count and len(running) < 12 and rng.random() < 0.7:
            prompt, params = [rng.randrange(4, 101) for _ in range(rng.choice([1, 9, 14, 15, 16, 29, 31]))], some_params()
            running.append((decoder.stream(prompt, params=params), prompt, params, []))
            submitted += 1
        if not running:
            continue
        entry = rng.choice(running)
        stream, prompt, params, outputs = entry
        if rng.random() < 0.02:
            stream.close()
            aborted += 1
            running.remove(entry)
            continue
        event = next(stream, None)
        if event is None:
            alone = reference.generate(prompt, params=params)
            assert sorted(key(outputs)) == sorted(key(alone)), (prompt, params)
            finished += 1
            preempted += outputs[0].metrics.num_preemptions > 0
            running.remove(entry)
        elif event.output is not None:
            outputs.append(event.output)
        if rng.random() < 0.01:
            decoder.loop.scheduler.check()
            decoder.loop.scheduler.preempt_running()  # besides those that the small cache asks for
    print(f"\n{submitted} requests, {finished} finished, {aborted} aborted, {preempted} preempted on their way")
    assert finished > count / 2 and aborted > count / 100 and preempted > count / 100
    assert not decoder.loop.scheduler.has_work
    decoder.loop.pool.check([])
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


LOWEST = torch.finfo(torch.float32).min


def only_seven_at_first(token_ids, logits):
    """The usual idiom of a mask."""
    return torch.where(torch.arange(len(logits)) == 7, logits, LOWEST) if len(token_ids) < 5 else logits


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"logits_processor": only_seven_at_first}, None),
        ({"logit_bias": {5: 1e30}}, "a beam's score passes 1e+30 at position 3"),
        ({"logit_bias": {5: 3e29}, "max_new_tokens": 12}, "a beam's score passes 1e+30 at position 6"),
        ({"allowed_token_ids": [7, 8], "repetition_penalty": 1e30}, "no beam can go on at position"),
        ({"num_beam_groups": 4, "diversity_penalty": 1e10, "allowed_token_ids": [7]}, None),
    ],
)
def test_enormous_scores_are_the_requests_own_affair(decoder: Decoder, options: dict, error: str | None):
    alone = decoder.generate([5, 6, 9], max_new_tokens=6)[0]
    params = [BeamParams(**{"num_beams": 4, "max_new_tokens": 8, "ignore_eos": True, **options}), SamplingParams(max_new_tokens=6)]
    search, greedy = decoder.generate([[3, 4, 5], [5, 6, 9]], params=params)
    assert greedy.token_ids == alone.token_ids and greedy.logprobs == alone.logprobs
    if error is None:
        assert search.error is None and len(search.token_ids) == 8
    else:
        assert error in search.error and "\n" not in search.error
