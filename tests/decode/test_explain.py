"""``Decoder.explain``: parts that add up, work that is what the model's sizes say, and a decoder as it was before."""

from __future__ import annotations

import pytest
import torch
from decode.small_models import small_llama

from engine import Decoder
from engine.explain import PARTS, PRODUCTS, Clock, Part


def test_the_parts_are_the_step(decoder):
    found = decoder.explain(batch_size=3, context=20, steps=6)
    assert tuple(part.name for part in found.parts) == PARTS
    assert all(part.seconds > 0 for part in found.parts)
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts))
    assert (found.batch_size, found.context, found.steps) == (3, 20, 6)
    assert found.read_bandwidth > 0 and found.flop_rate > 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_work_follows_from_the_sizes(decoder, llama, batch_size: int):
    """Every product reads its weights once and multiplies each row; attention reads the context; each kernel is called once a layer."""
    context, steps = 17, 1
    found = {part.name: part for part in decoder.explain(batch_size=batch_size, context=context, steps=steps).parts}
    config, layers = decoder.config, decoder.config.num_layers
    hidden, vocab = config.hidden_size, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {
        "qkv": (hidden, queries + 2 * keys), "out": (queries, hidden), "gate_up": (hidden, 2 * config.ffn_size),
        "down": (config.ffn_size, hidden), "head": (hidden, vocab),
    }  # fmt: skip
    for name in PRODUCTS:
        k, n = sizes[name]
        times = 1 if name == "head" else layers
        residual = n if name in ("out", "down") else 0
        assert found[name].calls == times, name
        assert found[name].operations == 2 * times * batch_size * k * n, name
        assert found[name].num_bytes == 4 * times * (k * n + batch_size * (k + n + residual)), name
    # The first token was drawn behind the prompt; the step computes it.
    seen = context + 1
    assert found["attention"].calls == layers
    assert found["attention"].operations == 4 * layers * batch_size * seen * queries
    assert found["attention"].num_bytes == 4 * layers * batch_size * (2 * seen * keys + 2 * queries)
    assert found["norms"].calls == 2 * layers + 1 and found["rope"].calls == found["activation"].calls == layers
    assert found["embed"].calls == found["sampling"].calls == 1
    assert found["sampling"].num_bytes == 4 * batch_size * vocab
    for name in ("plan", "batch", "layers", "rows", "commit", "other"):
        assert found[name].calls == 0 and found[name].share is None


def test_a_share_is_the_least_time_over_the_time():
    assert Part("qkv", 4.0, 1, 8.0, 8.0, 1.0).share == 0.25
    assert Part("plan", 4.0, 0, 0.0, 0.0, 0.0).share is None


def test_every_moment_has_one_part(monkeypatch):
    """Nested calls on a clock that is told the time, one of them nobody's and one that raises."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock()

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def inner() -> None:
        spend(8)
        clock.timed(None, spend)(100)
        raise KeyError

    def outer() -> None:
        spend(1)
        clock.timed("plan", spend)(2)
        with pytest.raises(KeyError):
            clock.timed("commit", inner)()
        spend(4)

    spend(50)  # between steps
    clock.step(outer)()
    clock.step(lambda: spend(3))()
    assert [step.seconds for step in clock.steps] == [{"other": 5, "plan": 2, "commit": 8}, {"other": 3}]


def test_a_table_of_all_parts(decoder):
    found = decoder.explain(steps=2)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(PARTS) + 1
    assert [line.split()[0] for line in lines[2:]] == [*PARTS, "all"]
    assert lines[0].startswith("a step of 1 sequence with 128 tokens and more: ")
    assert "GB/s" in lines[-1] and "GFLOP/s" in lines[-1]


def test_the_decoder_is_left_as_it_was(llama):
    decoder = Decoder(llama, cache_tokens=4096)
    options = {"max_new_tokens": 12, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    before = decoder.generate([[5, 6, 7], [8]], **options)
    state = [dict(vars(owner)) for owner in (decoder, decoder.loop, decoder.loop.scheduler, decoder.loop.runner, decoder.loop.sampler)]
    random = torch.get_rng_state()
    decoder.explain(batch_size=2, context=9, steps=3)
    names = [set(vars(owner)) for owner in (decoder, decoder.loop, decoder.loop.scheduler, decoder.loop.runner, decoder.loop.sampler)]
    assert names == [set(of) for of in state]
    assert decoder.model is state[0]["model"] is decoder.loop.runner.model and decoder.loop.sampler.ops is decoder.ops
    assert "step" not in vars(decoder.loop) and "plan" not in vars(decoder.loop.scheduler)
    after = decoder.generate([[5, 6, 7], [8]], **options)
    assert [(o.token_ids, o.logprobs) for o in after] == [(o.token_ids, o.logprobs) for o in before]
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks and torch.equal(torch.get_rng_state(), random)


def test_prompts_that_take_several_steps_are_not_counted(llama):
    decoder = Decoder(llama, cache_tokens=4096, max_batch_size=4, max_batch_tokens=32)
    found = decoder.explain(batch_size=4, context=50, steps=12)
    head = next(part for part in found.parts if part.name == "head")
    assert head.operations == 2 * 4 * decoder.config.hidden_size * decoder.config.vocab_size  # four rows in each
    assert 1 <= found.steps <= 12


def test_quantised_and_shared_weights_have_the_bytes_they_have(llama):
    half = Decoder(small_llama().to(torch.bfloat16), cache_tokens=4096).explain(context=9, steps=1)
    whole = Decoder(llama, cache_tokens=4096).explain(context=9, steps=1)
    weights = whole.parts[PARTS.index("gate_up")].num_bytes - half.parts[PARTS.index("gate_up")].num_bytes
    assert weights == 2 * llama.config.num_hidden_layers * llama.config.hidden_size * 2 * llama.config.intermediate_size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0; here it must be from 1 to 64"),
        ({"batch_size": 65}, ValueError, "batch_size is 65; here it must be from 1 to 64"),
        ({"context": 255}, ValueError, "context is 255; here it must be from 1 to 254"),
        ({"context": 250, "steps": 6}, ValueError, "steps is 6; here it must be from 1 to 5"),
        ({"steps": 0}, ValueError, "steps is 0; here it must be from 1 to 127"),
        ({"batch_size": True}, TypeError, "batch_size is True; it must be an integer"),
        ({"context": 8.0}, TypeError, r"context is 8\.0; it must be an integer"),
    ],
)
def test_arguments_that_cannot_be(decoder, arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        decoder.explain(**arguments)


def test_not_beside_other_requests(llama):
    decoder = Decoder(llama, cache_tokens=4096)
    stream = decoder.stream([1, 2, 3], max_new_tokens=5, ignore_eos=True)
    next(stream)
    with pytest.raises(RuntimeError, match=r"explain\(\) times steps of its own, and this decoder has unfinished requests"):
        decoder.explain(steps=1)
    assert len(list(stream)) == 4


def test_a_model_that_fails_is_said_so_and_put_back():
    model = small_llama()
    decoder = Decoder(model, cache_tokens=4096)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"a step that explain\(\) has run failed: the model's logits for position 5 hold NaN"):
        decoder.explain(context=5, steps=3)
    assert "step" not in vars(decoder.loop) and decoder.loop.runner.model is decoder.model and not decoder.loop.scheduler.has_work
