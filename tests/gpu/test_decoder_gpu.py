"""A decoder on a GPU, end to end: the path it takes, the token law to the bit in deterministic mode, the CPU's tokens, steps that nobody
waits for, graphs, and what is left of its memory."""

from __future__ import annotations

import asyncio
import functools
import gc
from typing import Any

import pytest
import torch
from decode.small_models import small_llama
from transformers import LlamaForCausalLM

from engine import AsyncDecoder, BeamParams, Decoder, DraftModel, PromptLookup, RequestOutput, SamplingParams
from engine.graph_runner import GraphRunner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SIZES = {
    "vocab_size": 1003, "hidden_size": 256, "intermediate_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "initializer_range": 0.08,
}  # fmt: skip
# Past the ends of blocks and of a split of 512 tokens.
PROMPTS = [[(13 * i * i + 5 * i + n) % 1000 + 3 for i in range(n)] for n in (1, 16, 33, 150, 509, 600)]
NEW = 20


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": NEW, "temperature": 1.0, "ignore_eos": True, "seed": 3, **options})


UNFILTERED = [params(temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.7, 1.3, 1.0, 0.0))]
FILTERED = [params(top_k=40), params(top_p=0.8), params(min_p=0.02), params(top_k=9, top_p=0.5), params(), params(temperature=0.0)]
LISTS = [
    params(repetition_penalty=1.3), params(presence_penalty=0.7, frequency_penalty=0.3), params(logit_bias={7: 5.0, 9: -5.0}),
    params(allowed_token_ids=tuple(range(3, 200))), params(min_new_tokens=NEW, stop_token_ids=tuple(range(500))), params(logprobs=3),
]  # fmt: skip
KINDS = {"unfiltered": UNFILTERED, "filtered": FILTERED, "lists": LISTS}


def model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> LlamaForCausalLM:
    return small_llama(seed=seed, **SIZES).to(dtype).cuda()


def make(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Decoder:
    return Decoder(model(dtype), **{"cache_tokens": 8192, "deterministic": True, **options})


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert [o.error for o in outputs] == [None] * len(outputs)
    return [o.token_ids for o in outputs]


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    return [logprob for o in outputs for logprob in o.logprobs]


@functools.cache
def alone(kind: str) -> list[RequestOutput]:
    """Each request by itself, its prompt in one piece, no drafts."""
    decoder = make(max_batch_size=1)
    return [decoder.generate([prompt], params=[p])[0] for prompt, p in zip(PROMPTS, KINDS[kind], strict=True)]


def at_baseline(decoder: Decoder) -> None:
    assert not decoder.has_work
    decoder.loop.pool.check([])
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


# ---- the path ----


def test_a_model_on_a_gpu_takes_the_gpu_path_without_an_option() -> None:
    decoder = Decoder(model(), cache_tokens=1024)
    assert type(decoder.loop.runner) is GraphRunner and decoder.model.device.type == "cuda"
    assert {"fast", "triton"} <= set(decoder.ops.chosen.values()) <= {"cuda", "fast", "triton"}
    assert len(tokens(decoder.generate(PROMPTS[:3], max_new_tokens=NEW, ignore_eos=True))[2]) == NEW
    assert "fast" not in make().ops.chosen.values()


def test_fast_and_deterministic_are_near_each_other() -> None:
    fast, exact = (Decoder(model(), cache_tokens=8192, deterministic=d).generate(PROMPTS, max_new_tokens=1) for d in (False, True))
    assert logprobs(fast) == pytest.approx(logprobs(exact), abs=0.1)


# ---- the law ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk": 7}, {"prefill_chunk": 64, "max_batch_size": 3}, {"cache_tokens": 768}, {"block_size": 32}], ids=str
)
def test_tokens_do_not_depend_on_the_batch_the_chunks_or_preemption(kind: str, options: dict[str, Any]) -> None:
    decoder = make(**options)
    outputs = decoder.generate(PROMPTS, params=KINDS[kind])
    assert tokens(outputs) == tokens(alone(kind))
    assert logprobs(outputs) == pytest.approx(logprobs(alone(kind)), abs=1e-4)
    if options.get("cache_tokens"):
        assert decoder.stats().num_preemptions > 0
    at_baseline(decoder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", ["chain", "tree", "lookup"])
def test_drafts_change_no_token(kind: str, drafter: str) -> None:
    near = model()
    with torch.no_grad():
        near.lm_head.weight += 0.02 * torch.randn_like(near.lm_head.weight)
    draft = PromptLookup() if drafter == "lookup" else DraftModel(near, width=1 if drafter == "chain" else 3)
    decoder = make(draft=draft)
    given = [SamplingParams(**{**vars(p), "num_assistant_tokens": 5}) for p in KINDS[kind]]
    assert tokens(decoder.generate(PROMPTS, params=given)) == tokens(alone(kind))
    if drafter != "lookup":
        assert decoder.stats().num_accepted > 0
    at_baseline(decoder)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_law_holds_over_every_cache(kv_dtype: torch.dtype) -> None:
    if kv_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    one, many = make(kv_dtype=kv_dtype, max_batch_size=1), make(kv_dtype=kv_dtype, prefill_chunk=50)
    expected = [one.generate([prompt], params=[p])[0] for prompt, p in zip(PROMPTS, UNFILTERED, strict=True)]
    assert tokens(many.generate(PROMPTS, params=UNFILTERED)) == tokens(expected)
    near = alone("unfiltered")
    first = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(expected, near, strict=True) if a.token_ids[0] == b.token_ids[0]]
    assert first and all(a == pytest.approx(b, abs=0.3) for a, b in first)


@pytest.mark.parametrize(("weights", "error"), [("int8", 0.3), ("fp8", 0.6), ("int4", 2.0)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_quantised_weights(weights: str, error: float, deterministic: bool) -> None:
    """By Triton's products either way."""
    decoder = make(weights=weights, deterministic=deterministic)
    outputs = decoder.generate(PROMPTS, params=UNFILTERED)
    near = alone("unfiltered")
    assert all(len(o.token_ids) == NEW for o in outputs)
    first = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(outputs, near, strict=True) if a.token_ids[0] == b.token_ids[0]]
    assert first and all(a == pytest.approx(b, abs=error) for a, b in first)
    if deterministic:
        chunked = make(weights=weights, prefill_chunk=33)
        assert tokens(chunked.generate(PROMPTS, params=UNFILTERED)) == tokens(outputs)


# ---- the CPU's tokens ----


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_cpu(kind: str) -> None:
    """In float32, where sums in another order make no difference that a draw could see."""
    on_cpu = Decoder(small_llama(seed=0, **SIZES), cache_tokens=8192).generate(PROMPTS, params=KINDS[kind])
    outputs = make(torch.float32).generate(PROMPTS, params=KINDS[kind])
    assert tokens(outputs) == tokens(on_cpu)
    assert logprobs(outputs) == pytest.approx(logprobs(on_cpu), abs=1e-3)


@pytest.mark.parametrize(
    "search",
    [
        BeamParams(max_new_tokens=12, num_beams=4, num_return_sequences=4),
        BeamParams(max_new_tokens=12, num_beams=4, num_beam_groups=2, diversity_penalty=0.5, num_return_sequences=2),
        BeamParams(max_new_tokens=12, num_beams=3, length_penalty=0.5, early_stopping=True),
    ],
    ids=["plain", "groups", "early"],
)
def test_beams_are_those_of_the_cpu(search: BeamParams) -> None:
    on_cpu = Decoder(small_llama(seed=0, **SIZES), cache_tokens=8192).generate(PROMPTS[:4], params=search)
    decoder = make(torch.float32)
    beside = [*[search] * 3, params()]  # in steps with a request that samples
    assert tokens(decoder.generate(PROMPTS[:4], params=search)) == tokens(on_cpu)
    found = tokens(decoder.generate(PROMPTS[:4], params=beside))
    assert found[: 3 * search.num_return_sequences] == tokens(on_cpu)[: 3 * search.num_return_sequences]
    at_baseline(decoder)


# ---- graphs, steps ahead ----


def test_graphs_replay_other_seeds_and_other_requests() -> None:
    decoder = make()
    runner: Any = decoder.loop.runner
    given = [params(seed=s) for s in range(len(PROMPTS))]
    first = tokens(decoder.generate(PROMPTS, params=given))
    graphs = {sizes: shape.graph for sizes, shape in runner._shapes.items() if shape.graph is not None}
    assert graphs
    others = tokens(decoder.generate(PROMPTS, params=[params(seed=s + 100) for s in range(len(PROMPTS))]))
    assert others != first
    assert tokens(decoder.generate(PROMPTS, params=given)) == first
    assert all(runner._shapes[sizes].graph is graph for sizes, graph in graphs.items())


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_step_waits_for_the_device(deterministic: bool) -> None:
    """But for the tokens of the step before, which come by an event."""
    decoder = make(deterministic=deterministic)
    for kind in (UNFILTERED, FILTERED):
        submission = decoder.submit(PROMPTS[:4], params=[SamplingParams(**{**vars(p), "max_new_tokens": 60}) for p in kind[:4]])
        while any(request.num_new_tokens < 10 for request in submission.requests):
            decoder.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                decoder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(request.num_new_tokens >= 29 for request in submission.requests)
        while decoder.has_work:
            decoder.step()
    at_baseline(decoder)


def test_requests_that_end_early_or_are_aborted_disturb_nobody() -> None:
    decoder = make()
    lengths = [SamplingParams(**{**vars(p), "max_new_tokens": n}) for p, n in zip(UNFILTERED, (1, 2, 20, 20, 7, 20), strict=True)]
    submissions = [decoder.submit([prompt], params=[p]) for prompt, p in zip(PROMPTS, lengths, strict=True)]
    for _ in range(6):
        decoder.step()
    decoder.abort(submissions[3])
    while decoder.has_work:
        decoder.step()
        decoder.loop.scheduler.check()
    for submission, p, expected in zip(submissions, lengths, alone("unfiltered"), strict=True):
        (output,) = submission.outputs
        assert output.token_ids == expected.token_ids[: len(output.token_ids)]
        assert output.finish_reason == ("abort" if submission is submissions[3] else "length")
        assert submission is submissions[3] or len(output.token_ids) == p.max_new_tokens
    at_baseline(decoder)


def test_a_row_of_nan_fails_its_request_alone() -> None:
    """Token 7 has no number in the embedding."""
    broken = model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = torch.nan
    decoder = Decoder(broken, cache_tokens=2048, deterministic=True)
    prompts = [PROMPTS[1], [5, 7, 9], PROMPTS[2]]
    given = [params(suppress_tokens=(7,), temperature=0.0)] * 3
    outputs = decoder.generate(prompts, params=given)
    assert outputs[1].finish_reason == "error" and "NaN" in (outputs[1].error or "")
    assert [len(outputs[i].token_ids) for i in (0, 2)] == [NEW, NEW]
    at_baseline(decoder)


def test_an_async_decoder_in_its_thread() -> None:
    async def go() -> list[RequestOutput]:
        async with AsyncDecoder(make()) as decoder:
            calls = [decoder.generate([prompt], params=[p]) for prompt, p in zip(PROMPTS, UNFILTERED, strict=True)]
            return [outputs[0] for outputs in await asyncio.gather(*calls)]

    assert tokens(asyncio.run(go())) == tokens(alone("unfiltered"))


# ---- a live model, memory ----


@pytest.mark.parametrize("in_place", [True, False])
def test_changes_of_a_live_models_weights_are_seen_by_captured_graphs(in_place: bool) -> None:
    live, other = model(), model(seed=9)
    decoder = Decoder(live, cache_tokens=4096, deterministic=True)
    before = tokens(decoder.generate(PROMPTS[:4], params=UNFILTERED[:4]))
    with torch.no_grad():
        for mine, its in zip(live.parameters(), other.parameters(), strict=True):
            if in_place:
                mine.copy_(its)
            else:
                mine.data = its.data.clone()
    after = tokens(decoder.generate(PROMPTS[:4], params=UNFILTERED[:4]))
    fresh = tokens(Decoder(other, cache_tokens=4096, deterministic=True).generate(PROMPTS[:4], params=UNFILTERED[:4]))
    assert after == fresh != before


def test_a_decoder_leaves_no_memory_behind() -> None:
    live = model()

    def use() -> None:
        decoder = Decoder(live, cache_tokens=4096)
        for kind in KINDS.values():
            decoder.generate(PROMPTS[:4], params=kind[:4])

    def held() -> tuple[int, int]:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    use()  # what libraries keep for good
    before = held()
    use()
    assert held() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_models_on_two_gpus_whichever_is_the_current_one() -> None:
    """Also from a thread of its own, whose current GPU is the first."""
    decoders = [Decoder(small_llama(seed=0, **SIZES).bfloat16().to(f"cuda:{i}"), cache_tokens=8192, deterministic=True) for i in (0, 1)]
    for decoder in decoders:
        for _ in range(2):
            assert tokens(decoder.generate(PROMPTS, params=UNFILTERED)) == tokens(alone("unfiltered"))

    async def go() -> list[RequestOutput]:
        async with AsyncDecoder(decoders[1]) as decoder:
            return await decoder.generate(PROMPTS, params=UNFILTERED)

    assert tokens(asyncio.run(go())) == tokens(alone("unfiltered"))
