"""Calls that the tests of tensor parallelism make twice: of a decoder in one process, and of one in parts. No transformers in here: the
processes of the parts start without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models.origin_model import OriginConfig, Transformer
from torch import Tensor

from engine import Decoder, PromptLookup
from engine.drafters.draft import Draft
from engine.request import Request

PROMPTS = [[5, 9, 14, 200], [7], [3, 8, 1, 9] * 9, [40, 41, 42, 43, 44, 45, 40, 41, 42, 43]]
VOCABULARY = 211
# Folders, and a live model that each process makes.
MODELS: dict[str, dict[str, Any]] = {
    "llama biases": {"weights": "shared"}, "qwen3": {"weights": "packed"}, "live origin": {},
}  # fmt: skip
INTEGERS = ("int8", "int4")


class TwoGuesses:
    """Drafts a wrong token beside each right one, as far as it knows the end: so what holds of a tree is moved in the cache."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(text) for text in texts]

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        return [self._draft(request.tokens, limit) for request, limit in zip(requests, limits, strict=True)]

    def _draft(self, tokens: list[int], limit: int) -> Draft:
        known = [text for text in self.texts if text[: len(tokens)] == tokens and len(text) > len(tokens) + 1]
        if not known or limit < 3:
            return Draft()
        right, after = known[0][len(tokens) : len(tokens) + 2]
        return Draft(((right + 1) % VOCABULARY, right, after), (0, 0, 2), (0.9, 0.9, 0.9))

    def release(self, request: Request) -> None:
        pass


def upside_down(token_ids: list[int], logits: Tensor) -> Tensor:
    return -logits if len(token_ids) % 2 else logits


Case = Callable[[Decoder], Any]


def _told(outputs: Sequence[Any]) -> list[Any]:
    return [[output.token_ids, output.finish_reason] for output in outputs]


def _generates(**options: Any) -> Case:
    return lambda decoder: _told(decoder.generate(PROMPTS, **{"max_new_tokens": 12, "seed": 3, "ignore_eos": True, **options}))


def _top(decoder: Decoder) -> Any:
    outputs = decoder.generate(PROMPTS[:2], max_new_tokens=4, seed=1, temperature=0.8, top_k=30, logprobs=3)
    return [[_told([o]), [list(top) for top in o.top_logprobs]] for o in outputs]


def _aborted(decoder: Decoder) -> Any:
    """Ends one in the midst of others; what it had is in the prefix cache of whoever comes next."""
    gone = decoder.submit(PROMPTS[2], max_new_tokens=40, seed=1)
    stays = decoder.submit([*PROMPTS[2], 11], max_new_tokens=10, seed=2)
    for _ in range(4):
        decoder.step()
    decoder.abort(gone)
    while decoder.has_work:
        decoder.step()
    again = decoder.generate([*PROMPTS[2], 11, 12], max_new_tokens=5, seed=2)
    assert decoder.stats().num_free_blocks == decoder.stats().num_blocks
    return _told(stays.outputs) + _told(again)


def _preempted(decoder: Decoder) -> Any:
    before = decoder.stats().num_preemptions
    outputs = decoder.generate([prompt * 2 for prompt in PROMPTS] * 2, max_new_tokens=45, temperature=1.0, seed=5, ignore_eos=True)
    assert decoder.stats().num_preemptions > before
    return _told(outputs)


def _not_a_number(decoder: Decoder) -> Any:
    """Requests whose processors spoil their logits, and others after them."""
    spoilt = decoder.generate(PROMPTS[:2], max_new_tokens=3, seed=1, logits_processor=lambda ids, row: row.fill_(float("nan")))
    assert [output.finish_reason for output in spoilt] == ["error", "error"]
    return _told(decoder.generate(PROMPTS[:2], max_new_tokens=3, seed=1))


CASES: dict[str, Case] = {
    "greedy": _generates(do_sample=False),
    "sampled": _generates(temperature=1.1),
    "very hot": _generates(temperature=50.0),
    "filters": _generates(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": _generates(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 2.0}, min_new_tokens=4),
    "several of one prompt": _generates(temperature=1.0, num_return_sequences=3),
    "beams": _generates(num_beams=3, num_return_sequences=2, do_sample=False),
    "stochastic beams": _generates(num_beams=3, do_sample=True),
    "processors": _generates(temperature=0.8, logits_processor=upside_down),
    "other tokens": _top,
    "aborts and cached prefixes": _aborted,
    "preemption": _preempted,
    "errors": _not_a_number,
}  # fmt: skip


def _live_origin() -> torch.nn.Module:
    """A random model of the origin's class, the same in every process."""
    torch.manual_seed(0)
    model = Transformer(OriginConfig(dim=96, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCABULARY, max_seq_len=256)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def decoder(folder: Path, name: str, **options: Any) -> Decoder:
    """Of a model of ``MODELS``, with room for so little that requests are preempted."""
    model = _live_origin() if name == "live origin" else folder / name
    return Decoder(model, max_batch_size=8, max_batch_tokens=24, cache_tokens=512, kernels="cpu", **{**MODELS[name], **options})


def quantised(folder: Path, weights: str, **options: Any) -> list[dict[str, float]]:
    """The largest log-probabilities after each prompt, with integer weights."""
    whole = decoder(folder, "qwen3", weights=weights, **options)
    outputs = whole.generate(PROMPTS, max_new_tokens=1, do_sample=False, logprobs=8)
    whole.close()
    return [{str(token): logprob for token, logprob in output.top_logprobs[0].items()} for output in outputs]


def run_cases(folder: Path, parallel: Callable[[], Any]) -> dict[str, Any]:
    """All results of a process that decodes: by model and case, and of drafts. ``parallel`` makes the decoder's argument of that name."""
    found: dict[str, Any] = {}
    for name in MODELS:
        whole = decoder(folder, name, parallel=parallel())
        for case, call in CASES.items():
            found[f"{name}, {case}"] = call(whole)
        plain = [PROMPTS[i] + tokens for i, (tokens, _) in enumerate(found[f"{name}, sampled"])]
        whole.close()
        drafting = decoder(folder, name, parallel=parallel(), draft=[TwoGuesses(plain), PromptLookup()])
        for verification in ("replay", "block"):
            settings = {"num_assistant_tokens": 4, "verification": verification}
            found[f"{name}, drafts, {verification}"] = _generates(temperature=1.1, **settings)(drafting)
        stats = drafting.stats()
        assert stats.num_accepted > 10, stats
        found[f"{name}, drafts"] = [stats.num_drafted, stats.num_accepted]
        drafting.close()
    found |= {weights: quantised(folder, weights, parallel=parallel()) for weights in INTEGERS}
    return json.loads(json.dumps(found))


def follow_cases(folder: Path, parallel: Callable[[], Any]) -> None:
    """The other ranks' part in ``run_cases``."""
    for name in MODELS:
        for _ in range(2):
            decoder(folder, name, parallel=parallel()).follow()
    for weights in INTEGERS:
        decoder(folder, "qwen3", weights=weights, parallel=parallel()).follow()
