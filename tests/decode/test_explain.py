"""``Decoder.explain``: parts that add up, work that is what the model's sizes say, and a decoder as it was before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode.small_models import small_llama

from engine import Decoder
from engine.explain import PARTS, PRODUCTS, Clock, Part, Setting, advise


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
    assert len(lines) == 2 + len(PARTS) + 2
    assert [line.split()[0] for line in lines[2:-1]] == [*PARTS, "all"]
    assert lines[0].startswith("a step of 1 sequence with 128 tokens and more: ")
    assert "GB/s" in lines[-2] and "GFLOP/s" in lines[-2]
    assert lines[-1] == f"next: {found.advice}"


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


FLOATS, PACKED, INT8, INT4 = (
    Setting(weights, kv_dtype, batch_size=1, max_batch_size=64, drafts=False)
    for weights, kv_dtype in (("shared", torch.float32), ("float32", torch.float32), ("int8", torch.int8), ("int4", torch.int8))
)


def many(setting: Setting, **changes) -> Setting:
    return replace(setting, **{"batch_size": 8, **changes})


@pytest.mark.parametrize(
    ("seconds", "setting", "words"),
    [
        (
            {"other": 6},
            PACKED,
            "60% of the step is spent around the kernels, which sequences share: decode more sequences at once (this was 1; ",
        ),
        ({"plan": 6}, many(PACKED, batch_size=64), "a larger max_batch_size (it is 64)"),
        ({"attention": 6}, PACKED, "60% of the step is attention over keys and values: kv_dtype=torch.int8"),
        ({"attention": 6}, INT8, "int8 already: only shorter contexts"),
        ({"down": 6}, FLOATS, "60% of the step is reading weights for a single row: draft=..."),
        ({"down": 6}, replace(FLOATS, drafts=True), "weights='int8' makes them fewer bytes"),
        ({"down": 6}, many(FLOATS), "weights='packed'"),
        ({"qkv": 3, "head": 3}, many(PACKED), "weights='int8' makes them fewer bytes"),
        ({"down": 6}, many(INT8), "weights='int4' makes them fewer bytes"),
        ({"down": 6}, many(INT4), "which are int4 already: decode more sequences at once (this was 8; max_batch_size allows 64)"),
        ({"gate_up": 6, "arithmetic": True}, many(PACKED), "is arithmetic of products: weights='int8'"),
        ({"gate_up": 6, "arithmetic": True}, many(INT4), "is arithmetic of products: nothing but more cores (engine.set_num_threads)"),
    ],
)
def test_advice_follows_what_takes_longest(seconds: dict, setting: Setting, words: str):
    operations = 1e3 if seconds.pop("arithmetic", False) else 1.0
    rest = (10 - sum(seconds.values())) / 2
    measured = {"norms": rest, "sampling": rest, **seconds}
    parts = [Part(name, measured.get(name, 0.0), 1, 100.0, operations, 0.0) for name in PARTS]
    advice = advise(parts, setting, read_bandwidth=1.0, flop_rate=1.0)
    assert words in advice and "\n" not in advice


@pytest.mark.parametrize(
    ("options", "batch_size", "expected"),
    [({}, 1, (128, 32)), ({"max_position": 20}, 1, (10, 9)), ({"cache_tokens": 64}, 2, (16, 15)), ({"max_position": 2}, 1, (1, 1))],
)
def test_defaults_fit_a_small_model_or_cache(llama, options: dict, batch_size: int, expected: tuple[int, int]):
    decoder = Decoder(llama, **{"cache_tokens": 4096, **options})
    if expected == (1, 1):
        with pytest.raises(ValueError, match="context is 1; here it must be from 1 to 0"):
            decoder.explain(batch_size)
        return
    found = decoder.explain(batch_size)
    assert (found.context, found.steps) == expected
