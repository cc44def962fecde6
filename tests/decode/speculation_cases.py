"""Requests of every kind, models and drafters for the tests of speculative decoding, and what each request gives without drafts."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from decode.small_models import small_llama
from models.model_helpers import hf_model
from models.real_configs import VARIANTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from engine import Decoder, DraftModel, PromptLookup, RequestOutput, SamplingParams, SuffixLookup
from engine.request import Request

TEMPERATURES = (0.0, 0.3, 0.8, 1.2)
COUNT = 208  # requests of a cell
MODELS = ("llama", "llama bfloat16", "mistral window", "qwen3 biases and layer types")
# Small models draw letters at random, the bundled one writes code.
STOPS = {"small": ("q", "7", "Z", "ab"), "bundled": ("return", "(self", "\n\n", " in")}


def small_tokenizer(vocab_size: int) -> Tokenizer:
    """Printable ASCII, space and line break, and with what is left of the vocabulary pairs of letters."""
    special = ["<pad>", "<s>", "</s>", "<x>"]
    vocab = {token: i for i, token in enumerate((*special, *map(chr, range(33, 127)), "Ġ", "Ċ"))}
    merges = [(a, b) for a in "aeinorstuld" for b in "aeinorstuld"][: vocab_size - len(vocab)]
    vocab |= {a + b: i for i, (a, b) in enumerate(merges, len(vocab))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def towards_the_past(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor that depends on all tokens so far."""
    logits[token_ids[-3:]] += len(token_ids) % 3
    return logits


def never_twice_in_a_row(token_ids: list[int], logits: Tensor) -> Tensor:
    """A processor that fails at a history which it keeps from coming true."""
    if len(token_ids) > 1 and token_ids[-1] == token_ids[-2]:
        raise AssertionError("this cannot be")
    logits[token_ids[-1]] = -math.inf
    return logits


def kinds(vocab_size: int, stops: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of each kind of request."""
    words = [[t, (7 * t + s) % vocab_size] for t in range(vocab_size) for s in range(3, 9)]
    sampling: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "min_p": 0.02}
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.8, "frequency_penalty": -0.7}
    return {
        "plain": {},
        "top_k": {"top_k": 5},
        "top_p": {"top_p": 0.7},
        "min_p": {"min_p": 0.1},
        "filters": sampling,
        "repetition_penalty": {"repetition_penalty": 1.4},
        "presence_penalty": {"presence_penalty": 1.5},
        "frequency_penalty": {"frequency_penalty": 0.9},
        "penalties": penalties,
        "logit_bias": {"logit_bias": {5: 3.0, 6: -math.inf, 40: 2.0}},
        "suppress_tokens": {"suppress_tokens": range(0, vocab_size, 3)},
        "allowed_token_ids": {"allowed_token_ids": range(5, vocab_size, 9)},
        "bad_words": {"bad_words": words},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "allowed_token_ids": range(4, 20)},
        "min_new_tokens": {"min_new_tokens": 8, "stop_token_ids": range(4, vocab_size, 2)},
        "prefix_token_ids": {"prefix_token_ids": [9, 8, 7, 9, 8, 7]},
        "json_schema": {"json_schema": {"type": "array", "items": {"enum": ["aa", "ab", 17, None]}, "maxItems": 5}},
        "regex": {"regex": "[a-z]{2,6}(, [a-z0-9]{2,6}){0,3}!", "min_new_tokens": 3},
        "grammar": {"grammar": 'start: ("a" | "bc" | start) " " /[0-9]{1,3}/'},
        "logits_processor": {"logits_processor": towards_the_past},
        "processor and penalties": {"logits_processor": never_twice_in_a_row, **penalties},
        "stop": {"stop": tuple(stops)},
        "stop and min_new_tokens": {"stop": tuple(stops), "min_new_tokens": 5},
        "stop_token_ids": {"stop_token_ids": range(10, vocab_size, 12)},
        "logprobs": {"logprobs": 3},
        "everything": {
            **sampling, **penalties, "logit_bias": {7: 1.5, 8: -math.inf}, "bad_words": words, "stop": stops[0], "logprobs": 2,
            "suppress_tokens": range(1, vocab_size, 13), "min_new_tokens": 2, "stop_token_ids": (44, 55),
        },
    }  # fmt: skip


def make_requests(vocab_size: int, stops: Sequence[str], temperatures: Sequence[float]) -> list[tuple[list[int], dict[str, Any]]]:
    """``COUNT`` requests, prompt and options, eight of each kind, each with a seed of its own."""
    rng = random.Random(0)
    requests = []
    for options in kinds(vocab_size, stops).values():
        for temperature in itertools.islice(itertools.cycle(temperatures), 8):
            text = rng.sample(range(4, vocab_size), rng.choice([1, 2, 5, 15, 16, 17]))
            prompt = text * (rng.choice([1, 1, 2, 3]) if len(text) > 1 else 1)  # repetitions for those who look up
            own = {"max_new_tokens": rng.randint(9, 28), "temperature": temperature, "ignore_eos": rng.random() < 0.7}
            requests.append((prompt, {**own, **options, "seed": len(requests)}))
    assert len(requests) == COUNT
    return requests


class Target:
    """A model to be drafted for, its requests, and their outputs without drafts."""

    def __init__(self, name: str, temperatures: Sequence[float] = TEMPERATURES) -> None:
        self.name = name
        self.options: dict[str, Any] = {"cache_tokens": 16384}
        if name == "bundled":
            self.decoder = Decoder.bundled(**self.options)
        else:
            self.model = small_llama() if name.startswith("llama") else hf_model(VARIANTS[name])
            if name.endswith("bfloat16"):
                self.model = self.model.to(torch.bfloat16)
            self.options["tokenizer"] = small_tokenizer(self.model.config.vocab_size)
            self.decoder = Decoder(self.model, **self.options)
        self.vocab_size = self.decoder.config.vocab_size
        self.requests = make_requests(self.vocab_size, STOPS["bundled" if name == "bundled" else "small"], temperatures)
        self._plain: dict[int, tuple[Any, ...]] = {}

    def plain(self, indices: Iterable[int]) -> list[tuple[Any, ...]]:
        """What requests give without drafts."""
        missing = [i for i in indices if i not in self._plain]
        random.Random(1).shuffle(missing)  # not in the order in which they will be run
        outputs = self.decoder.generate([self.requests[i][0] for i in missing], params=[self.params(i) for i in missing]) if missing else []
        assert not [o.error for o in outputs if o.error]
        self._plain |= {i: outcome(output) for i, output in zip(missing, outputs, strict=True)}
        return [self._plain[i] for i in indices]

    def params(self, i: int, **more: Any) -> SamplingParams:
        return SamplingParams(**{**self.requests[i][1], **more})

    def speculative(self, draft: Any, **options: Any) -> Decoder:
        """A decoder with a drafter, of the same model."""
        options = {**self.options, **options}
        return Decoder.bundled(draft=draft, **options) if self.name == "bundled" else Decoder(self.model, draft=draft, **options)

    def tokens(self, request: Request) -> list[int]:
        """All tokens that one of the requests will have in the end, by its seed."""
        return [*request.prompt, *self.plain([request.seed])[0][0]]

    def drafter(self, kind: str) -> Any:
        """A new drafter (or a list) of a kind."""
        if kind in ("same", "tree of the same"):
            return DraftModel(self._folder("target") or self.model, width=1 if kind == "same" else 3)
        if kind in ("near", "tree", "wide tree"):
            return DraftModel(self._folder("draft") or near(self.name), width={"near": 1, "tree": 2, "wide tree": 5}[kind])
        if kind == "other":
            return DraftModel(other(self.name))
        if kind == "lookup":
            return PromptLookup(min_ngram=1)
        if kind == "suffix":
            return SuffixLookup(min_match=1)
        assert kind == "list", kind
        return [PromptLookup(max_ngram=2), self.drafter("near")]

    def _folder(self, name: str) -> Any:
        from engine.drafters.speculator import BUNDLED

        return BUNDLED.parent / name if self.name == "bundled" else None


@functools.cache
def target(name: str) -> Target:
    return Target(name)


@functools.cache
def near(name: str) -> torch.nn.Module:
    """The model with its weights disturbed: what it draws often is what the model draws."""
    model = copy.deepcopy(target(name).model).float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.06 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model.to(target(name).model.dtype)


@functools.cache
def other(name: str) -> torch.nn.Module:
    """A model that has nothing to do with it, of another shape."""
    config = target(name).decoder.config
    return small_llama(seed=9, vocab_size=config.vocab_size, num_hidden_layers=1, max_position_embeddings=config.max_position)


def outcome(output: RequestOutput) -> tuple[Any, ...]:
    """All that drafts must not change."""
    return (
        output.token_ids, output.logprobs, output.processed_logprobs, output.top_logprobs, output.processed_top_logprobs, output.text,
        output.finish_reason, output.stop_reason, output.error, output.cumulative_logprob, output.seed, output.stream,
    )  # fmt: skip


def compare(found: Sequence[tuple[Any, ...]], expected: Sequence[tuple[Any, ...]], names: Sequence[Any]) -> None:
    """Equal to the bit; else the first that differs is named."""
    wrong = [name for name, a, b in zip(names, found, expected, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(found)} requests differ: {wrong[:5]}"


def check_cell(
    target: Target, decoder: Decoder, num_assistant_tokens: int | None | Sequence[int | None], indices: Sequence[int] | None = None
) -> list[RequestOutput]:
    """Run the target's requests (or some) on a decoder with drafts: each gives what it gives without. The outputs."""
    indices = range(COUNT) if indices is None else indices
    counts = num_assistant_tokens if isinstance(num_assistant_tokens, Sequence) else [num_assistant_tokens]
    params = [target.params(i, num_assistant_tokens=counts[n % len(counts)]) for n, i in enumerate(indices)]
    outputs = decoder.generate([target.requests[i][0] for i in indices], params=params)
    names = list(kinds(target.vocab_size, STOPS["small"]))
    compare([outcome(o) for o in outputs], target.plain(indices), [(i, names[i // 8]) for i in indices])
    for output in outputs:
        check_metrics(output)
    check_idle(decoder)
    return outputs


def check_metrics(output: RequestOutput) -> None:
    metrics = output.metrics
    assert 0 <= metrics.num_accepted <= metrics.num_drafted
    given = metrics.num_forwards + metrics.num_accepted  # an end may cut off some of the last step's
    assert metrics.num_new_tokens <= given if output.finish_reason == "stop" else metrics.num_new_tokens == given
    assert 0 < metrics.num_forwards <= metrics.num_new_tokens
    assert metrics.forwards_saved == metrics.num_new_tokens - metrics.num_forwards


def check_idle(decoder: Decoder) -> None:
    """Nothing is left of any request: no block, and no state in the drafters."""
    assert not decoder.loop.scheduler.has_work
    decoder.loop.pool.check([])
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks
    speculator = decoder.loop.speculator
    assert speculator is not None and not speculator._records and not speculator._asked
    for drafter in speculator.drafters:
        if isinstance(drafter, DraftModel):
            assert not drafter._copies
            drafter.pool.check([])
            assert drafter.pool.num_free == drafter.pool.num_blocks
        elif isinstance(drafter, (PromptLookup, SuffixLookup)):
            assert not drafter._seen


def run_streams(
    target: Target, decoder: Decoder, indices: Iterable[int], interrupts: tuple[type[BaseException], ...] = ()
) -> tuple[int, int]:
    """Run requests as streams side by side, some of which fail or are interrupted; how many ended as they should, and how many failed."""
    streams = {i: decoder.stream(target.requests[i][0], params=target.params(i, num_assistant_tokens=3)) for i in indices}
    ended = failed = 0
    while streams:
        for i, stream in list(streams.items()):
            try:
                event = next(stream)
            except interrupts:
                failed += 1
                del streams[i]
                decoder.loop.scheduler.check()
                continue
            if event.output is not None:
                (plain,) = target.plain([i])
                if event.output.finish_reason == "error":
                    assert event.output.token_ids == plain[0][: len(event.output.token_ids)]
                    failed += 1
                else:
                    assert outcome(event.output) == plain
                    ended += 1
                del streams[i]
    check_idle(decoder)
    return ended, failed


def watch(decoder: Decoder, preempt_every: int = 0) -> Decoder:
    """Have the invariants of queues and pools checked after each step, and now and then everybody preempted before one."""
    step = decoder.loop.step

    def watched() -> None:
        if preempt_every and decoder.loop.num_steps % preempt_every == preempt_every - 1:
            decoder.loop.scheduler.preempt_running()
        step()
        decoder.loop.scheduler.check()
        assert decoder.loop.speculator is not None
        for drafter in decoder.loop.speculator.drafters:
            if isinstance(drafter, DraftModel):
                drafter.pool.check(copy.block_table for copy in drafter._copies.values())

    decoder.loop.step = watched  # type: ignore[method-assign]
    return decoder


def total(outputs: Sequence[RequestOutput], name: str) -> int:
    """Of one of their metrics."""
    return sum(getattr(output.metrics, name) for output in outputs)
