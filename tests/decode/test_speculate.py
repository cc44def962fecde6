"""Speculative decoding changes no token, no log-probability, no text and no end: whatever drafts, and whatever a request asks for."""

from __future__ import annotations

import random

import pytest
from decode.speculation_cases import (
    COUNT,
    MODELS,
    Target,
    check_cell,
    check_idle,
    compare,
    outcome,
    run_streams,
    target,
    total,
    watch,
)

from engine import BeamParams, DraftModel, SamplingParams, StreamEvent

# model, drafter, num_assistant_tokens (several: by turns), batch size
CELLS = [
    ("llama", "same", 10, 16),
    ("llama", "near", 1, 16),
    ("llama", "near", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10), 1),
    ("llama", "near", (None, 0, 3, 10), 16),
    ("llama", "other", 3, 16),
    ("llama", "wide tree", 10, 16),
    ("llama", "tree", (2, 7, 30), 6),
    ("llama", "tree of the same", 20, 5),
    ("llama", "lookup", 10, 16),
    ("llama", "suffix", 6, 16),
    ("llama", "list", (4, 9), 16),
    ("llama bfloat16", "near", 5, 16),
    ("llama bfloat16", "tree", 9, 16),
    ("llama bfloat16", "suffix", (None, 4), 16),
    ("mistral window", "near", 7, 16),
    ("mistral window", "wide tree", 12, 16),
    ("mistral window", "list", None, 16),
    ("qwen3 biases and layer types", "near", 4, 16),
    ("qwen3 biases and layer types", "tree of the same", 16, 16),
]


@pytest.fixture(scope="module")
def llama() -> Target:
    return target("llama")


@pytest.mark.parametrize(("model", "kind", "num_assistant_tokens", "batch"), CELLS)
def test_a_cell(model: str, kind: str, num_assistant_tokens, batch: int):
    one = target(model)
    decoder = one.speculative(one.drafter(kind), max_batch_size=batch)
    outputs = check_cell(one, decoder, num_assistant_tokens)
    if num_assistant_tokens is None:
        return  # how much is drafted then is a matter of time
    accepted = total(outputs, "num_accepted")
    assert accepted > {"other": 200, "lookup": 100, "suffix": 40}.get(kind, 900)
    if kind == "same":
        assert accepted == total(outputs, "num_drafted")
    if batch == 1 and isinstance(num_assistant_tokens, tuple) and 0 in num_assistant_tokens:
        assert total(outputs[::11], "num_drafted") == 0  # those that ask for none


@pytest.mark.parametrize("kind", ["near", "tree", "suffix"])
def test_the_bundled_pair(kind: str):
    one = target("bundled")
    outputs = check_cell(one, one.speculative(one.drafter(kind)), (4, 8, 15), range(0, COUNT, 9))
    assert total(outputs, "num_accepted") > (10 if kind == "suffix" else 80)


@pytest.mark.parametrize("kind", ["near", "tree", "list"])
def test_across_preemptions(llama: Target, kind: str):
    decoder = watch(llama.speculative(llama.drafter(kind), cache_tokens=160, max_batch_size=16))
    outputs = check_cell(llama, decoder, (4, 10, 40), range(0, COUNT, 2))
    assert total(outputs, "num_preemptions") > 20
    decoder = watch(llama.speculative(llama.drafter(kind), max_batch_size=16), preempt_every=3)
    outputs = check_cell(llama, decoder, (4, 10, None), range(1, COUNT, 2))
    assert total(outputs, "num_preemptions") > 200


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk": 3, "max_batch_size": 16},
        {"max_batch_size": 3, "max_batch_tokens": 5},  # hardly room for a draft
        {"block_size": 32, "max_batch_size": 16, "max_batch_tokens": 40},
    ],
)
@pytest.mark.parametrize("kind", ["near", "wide tree"])
def test_with_other_budgets(llama: Target, kind: str, options: dict):
    outputs = check_cell(llama, watch(llama.speculative(llama.drafter(kind), **options)), (4, 12), range(0, COUNT, 4))
    assert total(outputs, "num_accepted") > 100


@pytest.mark.parametrize("kind", ["near", "tree"])
def test_a_draft_model_without_room(llama: Target, kind: str, monkeypatch):
    """Whom its own cache has no room for gets no draft, or a shorter one."""
    monkeypatch.setattr("engine.drafters.model.size_cache", lambda *_: 6)
    outputs = check_cell(llama, watch(llama.speculative(llama.drafter(kind), max_batch_size=16)), 20, range(0, COUNT, 2))
    assert 50 < total(outputs, "num_accepted") < 1000


class Known:
    """Costs that are what they are, so that what is drafted is no matter of time."""

    def __init__(self, step: float, row: float) -> None:
        self.step, self.row = step, row

    def note(self, rows: int, seconds: float) -> None: ...

    def __call__(self, rows: int) -> float:
        return self.step + rows * self.row


@pytest.mark.parametrize("kind", ["same", "near", "tree", "wide tree", "tree of the same", "list"])
def test_as_much_as_pays(llama: Target, kind: str):
    """Drafts of all lengths when rows and drafting cost little, and none when every further row costs two steps."""
    for step, row, accepted in ((1.0, 1e-4, 600), (1.0, 0.03, 100), (-0.5, 1.0, 0)):
        decoder = llama.speculative(llama.drafter(kind), max_batch_size=16)
        assert decoder.loop.speculator is not None
        decoder.loop.speculator.step_costs = Known(step, row)
        for drafter in decoder.loop.speculator.drafters:
            if isinstance(drafter, DraftModel):
                drafter.costs = Known(0.0, 1e-4)
        outputs = check_cell(llama, watch(decoder), None, range(0, COUNT, 2))
        assert total(outputs, "num_accepted") > accepted if accepted else total(outputs, "num_drafted") == 0


@pytest.mark.parametrize("num_assistant_tokens", [1, 4, 10])
def test_an_end_at_every_place_of_a_block(llama: Target, num_assistant_tokens: int):
    """By length, stop token, end-of-sequence token, stop string, end of the grammar, and where ``min_new_tokens`` first allows one."""
    prompt = [40, 41, 42, 43, 44]
    whole = llama.decoder.generate(prompt, max_new_tokens=40, temperature=0.8, seed=1, ignore_eos=True)[0].token_ids
    text = llama.decoder.tokenizer.decode
    calls: list[dict] = []
    for n in range(1, 25):
        calls += [
            {"max_new_tokens": n, "ignore_eos": True},
            {"stop_token_ids": [whole[n]], "max_new_tokens": 40, "ignore_eos": True},
            {"eos_token_id": [whole[n], whole[n + 1]], "max_new_tokens": 40},
            {"stop": text(whole[n : n + 2]), "max_new_tokens": 40, "ignore_eos": True},
            {"regex": f"[a-z]{{{n}}}", "max_new_tokens": 40},
            {"min_new_tokens": n, "max_new_tokens": 40, "logit_bias": {2: 50.0}},
        ]
    calls = [{**call, "temperature": 0.8, "seed": 1} for call in calls]
    expected = [llama.decoder.generate(prompt, **call)[0] for call in calls]
    lengths = [len(o.token_ids) for o in expected]
    for i in (0, 4, 5):
        assert lengths[i::6] == [n + (i == 5) for n in range(1, 25)]
    for i in (1, 2, 3):
        assert len(set(lengths[i::6])) > 12
    decoder = llama.speculative(llama.drafter("same"), max_batch_size=16)
    params = [SamplingParams(**call, num_assistant_tokens=num_assistant_tokens) for call in calls]
    outputs = watch(decoder).generate([prompt] * len(calls), params=params)
    compare([outcome(o) for o in outputs], [outcome(o) for o in expected], calls)
    assert {o.metrics.num_new_tokens % (num_assistant_tokens + 1) for o in outputs} == set(range(num_assistant_tokens + 1))
    check_idle(decoder)


@pytest.mark.parametrize("kind", ["near", "wide tree", "list"])
def test_with_plain_requests_samples_and_beams_in_one_batch(llama: Target, kind: str):
    prompts, params = [], []
    for i, (prompt, options) in enumerate(llama.requests[::3]):
        prompts.append(prompt)
        own = {"seed": i, "max_new_tokens": options["max_new_tokens"]}
        params.append(
            [
                SamplingParams(**options, num_assistant_tokens=8),
                SamplingParams(**options, speculative=False),
                SamplingParams(**{**options, "num_return_sequences": 3}, speculative=True, num_assistant_tokens=5),
                BeamParams(**own, num_beams=3, num_return_sequences=2),
                BeamParams(**own, num_beams=2, do_sample=True),
                SamplingParams(**options),
            ][i % 6]
        )
    off = [type(p)(**{**vars(p), "speculative": None, "num_assistant_tokens": None}) for p in params]
    expected = llama.decoder.generate(prompts, params=off)
    assert sum(len(p.prefix_token_ids) for p in params) and len(expected) > len(prompts)
    for size in (16, 3):
        decoder = watch(llama.speculative(llama.drafter(kind), max_batch_size=size))
        outputs = decoder.generate(prompts, params=params)
        scored = [(*outcome(o), o.beam_score, o.score) for o in outputs]
        compare(scored, [(*outcome(o), o.beam_score, o.score) for o in expected], range(len(outputs)))
        speculative = [o for o in outputs if params[o.prompt_index].num_assistant_tokens]
        others = [o for o in outputs if params[o.prompt_index].speculative is False or o.beam_score is not None]
        assert total(speculative, "num_accepted") > 200 and total(others, "num_drafted") == 0
        check_idle(decoder)


def test_samples_of_one_prompt(llama: Target):
    options = {"max_new_tokens": 20, "temperature": 0.8, "seed": 5, "num_return_sequences": 40}
    expected = [outcome(o) for o in llama.decoder.generate([9] * 30, **options)]
    for kind, more in (("near", {}), ("tree", {"max_batch_size": 7}), ("suffix", {"cache_tokens": 320})):
        decoder = watch(llama.speculative(llama.drafter(kind), **more))
        assert [outcome(o) for o in decoder.generate([9] * 30, num_assistant_tokens=6, **options)] == expected
        check_idle(decoder)


@pytest.mark.parametrize("kind", ["near", "tree", "suffix"])
def test_interleaved_streams_some_left_early(llama: Target, kind: str):
    rng = random.Random(3)
    decoder = watch(llama.speculative(llama.drafter(kind), max_batch_size=16))
    indices = rng.sample(range(COUNT), 120)
    streams: dict[int, tuple] = {}
    ended: list[int] = []
    aborted = 0
    while indices or streams:
        if indices and len(streams) < 12:
            i = indices.pop()
            params = llama.params(i, num_assistant_tokens=rng.choice([2, 7, 25, None]))
            streams[i] = (decoder.stream(llama.requests[i][0], params=params), [])
        i = rng.choice(list(streams))
        stream, events = streams[i]
        if rng.random() < 0.02:
            stream.close()
            aborted += 1
            del streams[i]
        elif rng.random() < 0.02:
            decoder.loop.scheduler.preempt_running()
        elif (event := next(stream, None)) is not None:
            events.append(event)
        else:
            check_events(events, llama.plain([i])[0])
            ended.append(i)
            del streams[i]
    assert len(ended) > 60 and aborted > 20
    check_idle(decoder)


def check_events(events: list[StreamEvent], expected: tuple) -> None:
    output = events[-1].output
    assert output is not None and outcome(output) == expected
    assert [t for event in events for t in event.token_ids] == output.token_ids
    assert [x for event in events for x in event.logprobs] == output.logprobs
    assert "".join(event.text for event in events) == output.text
    assert all(event.output is None for event in events[:-1])


@pytest.mark.parametrize("kind", ["near", "tree", "suffix"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_fails_harms_nobody_else(llama: Target, kind: str, error: type[BaseException], monkeypatch):
    """Interrupted, it is repeated: everybody starts over from the tokens that they have, the drafters too. One that fails ends those that
    were in it, and nobody who comes later."""
    decoder = watch(llama.speculative(llama.drafter(kind), max_batch_size=16))
    run, rng = decoder.loop.runner.run, random.Random(0)

    def failing(plan):
        logits = run(plan)
        if rng.random() < (0.3 if error is KeyboardInterrupt else 0.02):
            raise error("the machine has hiccups")
        return logits

    monkeypatch.setattr(decoder.loop.runner, "run", failing)
    ended = failed = 0
    for start in range(0, COUNT, 40):
        some = run_streams(llama, decoder, range(start, min(start + 40, COUNT), 4), (KeyboardInterrupt,))
        ended, failed = ended + some[0], failed + some[1]
    assert ended > 5 and failed > 5


def test_the_models_are_those_that_are_meant():
    window, layers = (target(name).decoder.config for name in MODELS[2:])
    assert window.num_heads > window.num_kv_heads and layers.num_heads > layers.num_kv_heads
    assert set(window.windows) == {24} and set(layers.windows) == {17, 0}
    assert target("llama bfloat16").decoder.loop.cache.dtype.itemsize == 2
