"""Block verification in the Decoder: other tokens than without drafts, by the same law; and mistakes that the test of it must find."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from engine import Decoder, DraftModel, PromptLookup, SamplingParams
from engine.drafters import model as draft_model

END = 5
SAMPLES, TOKENS = 6000, 4
P_VALUE = 1e-4


def _model(seed: int, layers: int) -> LlamaForCausalLM:
    """Random, with six tokens, of which one is the end, and a distribution far from even."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 12
    return model


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A target, and a draft that agrees with it somewhat."""
    target, draft = _model(0, 2), _model(1, 1)
    with torch.no_grad():
        draft.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        draft.lm_head.weight.copy_(0.4 * draft.lm_head.weight + 0.6 * target.lm_head.weight)
    return target, draft


def _sequences(decoder: Decoder, seed: int, **options: Any) -> tuple[collections.Counter[tuple[int, ...]], list[Any]]:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=1.0, seed=seed, num_return_sequences=SAMPLES, **options)
    outputs = decoder.generate([1, 2, 3], params=params)
    return collections.Counter(tuple(output.token_ids) for output in outputs), outputs


def _p_value(one: collections.Counter[tuple[int, ...]], other: collections.Counter[tuple[int, ...]]) -> float:
    """That both come from one law: chi-square over the sequences, the rare ones together."""
    common = [key for key in set(one) | set(other) if one[key] + other[key] >= 10]
    rows = [[counts[key] for key in common] + [sum(counts.values()) - sum(counts[key] for key in common)] for counts in (one, other)]
    return float(stats.chi2_contingency([row for row in zip(*rows, strict=True) if sum(row)]).pvalue)


@pytest.fixture(scope="module")
def law(models: tuple[Any, Any]) -> dict[tuple[int, ...], float]:
    """The probability of every output of the target."""
    found: dict[tuple[int, ...], float] = {}
    open_ones = {(): 1.0}
    for length in range(1, TOKENS + 1):
        with torch.no_grad():
            logits = models[0](torch.tensor([[1, 2, 3, *tokens] for tokens in open_ones])).logits[:, -1]
        following = {}
        for (tokens, p), row in zip(open_ones.items(), logits.double().softmax(dim=1).tolist(), strict=True):
            for token, q in enumerate(row):
                (found if token == END or length == TOKENS else following)[(*tokens, token)] = p * q
        open_ones = following
    return found


def _p_of_law(counts: collections.Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square of counts against their law, the rare ones together."""
    total = sum(counts.values())
    common = [key for key, p in law.items() if p * total >= 5]
    observed = [counts[key] for key in common]
    expected = [law[key] * total for key in common]
    rest = total - sum(expected)
    return float(stats.chisquare([*observed, total - sum(observed)], [*expected, rest]).pvalue)


def test_the_law_is_the_models(models: tuple[Any, Any], law: dict[tuple[int, ...], float]) -> None:
    target, draft = models
    decoder = Decoder(target, draft=DraftModel(draft), cache_tokens=4096)
    counts, outputs = _sequences(decoder, 2, verification="block", num_assistant_tokens=3)
    assert sum(output.metrics.num_accepted for output in outputs) > SAMPLES
    assert _p_of_law(counts, law) > P_VALUE
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


@pytest.mark.parametrize("options", [{"top_k": 4, "min_p": 0.05}, {"frequency_penalty": 1.0, "top_p": 0.9}], ids=str)
def test_the_law_is_that_of_plain_decoding(models: tuple[Any, Any], options: dict[str, Any]) -> None:
    target, draft = models
    plain, _ = _sequences(Decoder(target, cache_tokens=4096), 1, **options)
    decoder = Decoder(target, draft=DraftModel(draft), cache_tokens=4096)
    again, outputs = _sequences(decoder, 2, verification="block", num_assistant_tokens=3, **options)
    assert sum(output.metrics.num_accepted for output in outputs) > SAMPLES / 2
    assert _p_value(plain, again) > P_VALUE


def test_more_is_accepted_than_by_replay(models: tuple[Any, Any]) -> None:
    target, draft = models
    decoder = Decoder(target, draft=DraftModel(draft), cache_tokens=4096)
    replay, block = (
        sum(output.metrics.num_accepted for output in _sequences(decoder, 3, num_assistant_tokens=3, verification=verification)[1])
        for verification in ("replay", "block")
    )
    assert block > 1.05 * replay


def test_certain_drafts(models: tuple[Any, Any]) -> None:
    plain, _ = _sequences(Decoder(models[0], cache_tokens=4096), 4)
    decoder = Decoder(models[0], draft=PromptLookup(), cache_tokens=4096)
    again, outputs = _sequences(decoder, 5, verification="block", num_assistant_tokens=2)
    assert any(output.metrics.num_accepted for output in outputs)
    assert _p_value(plain, again) > P_VALUE


def test_greedy_requests_are_replayed(models: tuple[Any, Any]) -> None:
    target, draft = models
    options = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": 2}
    plain = Decoder(target, cache_tokens=4096).generate([1, 2, 3], **options)[0]
    decoder = Decoder(target, draft=DraftModel(draft), cache_tokens=4096)
    again = decoder.generate([1, 2, 3], verification="block", num_assistant_tokens=4, **options)[0]
    assert (again.token_ids, again.logprobs, again.top_logprobs) == (plain.token_ids, plain.logprobs, plain.top_logprobs)
    assert again.metrics.num_accepted


def test_log_probabilities_are_those_of_the_tokens(models: tuple[Any, Any]) -> None:
    """Plain decoding that is made to write the same tokens has the same raw ones."""
    target, draft = models
    decoder = Decoder(target, draft=DraftModel(draft), cache_tokens=4096)
    output = decoder.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=4, verification="block", top_k=4)[0]
    forced = Decoder(target, cache_tokens=4096).generate(
        [1, 2, 3], max_new_tokens=20, ignore_eos=True, prefix_token_ids=output.token_ids, logprobs=6
    )[0]
    assert forced.token_ids == output.token_ids
    assert output.logprobs == pytest.approx(forced.logprobs, abs=1e-5)
    assert forced.top_logprobs is not None
    for token, processed, top in zip(output.token_ids, output.processed_logprobs, forced.top_logprobs, strict=True):
        kept = dict(list(top.items())[:4])  # top-k
        total = sum(2.718281828459045**value for value in kept.values())
        assert 2.718281828459045**processed == pytest.approx(2.718281828459045 ** kept[token] / total, abs=1e-5)


def _without_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts end before an end token, not after it."""
    original = DraftModel.draft

    def draft(self: DraftModel, *arguments: Any) -> list[Any]:
        drafts = original(self, *arguments)
        return [d.keep([n for n in range(1, len(d) + 1) if d.tokens[n - 1] != END]) for d in drafts]

    monkeypatch.setattr(DraftModel, "draft", draft)


def _by_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts lose their unlikely tokens."""
    original = DraftModel.draft

    def draft(self: DraftModel, *arguments: Any) -> list[Any]:
        drafts = original(self, *arguments)
        lengths = [next((i for i, c in enumerate(d.confidence) if c < 0.3), len(d)) for d in drafts]
        return [d.keep(range(1, n + 1)) for d, n in zip(drafts, lengths, strict=True)]

    monkeypatch.setattr(DraftModel, "draft", draft)


def _other_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token was drawn from is said to be even."""
    original = draft_model.masses
    monkeypatch.setattr(draft_model, "masses", lambda *arguments: (torch.ones_like(original(*arguments)[0]), None))


@pytest.mark.parametrize("mistake", [_without_ends, _by_confidence, _other_proposal])
def test_a_planted_mistake_is_found(
    models: tuple[Any, Any],
    law: dict[tuple[int, ...], float],
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None],
) -> None:
    target, draft = models
    mistake(monkeypatch)
    counts, _ = _sequences(Decoder(target, draft=DraftModel(draft), cache_tokens=4096), 2, verification="block", num_assistant_tokens=3)
    assert _p_of_law(counts, law) < P_VALUE
