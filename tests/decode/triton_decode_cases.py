"""As a program, under TRITON_INTERPRET=1: a small model decoded end to end by the Triton kernels in Triton's interpreter, its steps run as
on a GPU; prints one JSON object, group of requests -> what became of them by Triton's kernels and by the oracle. In a process of its own:
see ``ops/triton_cases.py``."""

from __future__ import annotations

import json
from typing import Any

import torch
import triton_cases
import triton_interpreter
from decode.fake_device import on_fake_device
from decode.small_models import small_llama

from engine import BeamParams, Decoder, DraftModel, SamplingParams

PROMPTS = [[(7 * i * i + i) % 60 + 3 for i in range(n)] for n in (17, 3, 15)]  # three of a step that is padded to four
TEMPERATURES = (0.0, 1.0, 0.7)
CACHES = {"bfloat16": torch.bfloat16, "int8 cache": torch.int8}  # of the groups with activations of 16 bits
SIZES = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def params(new: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, **{"seed": 5, "ignore_eos": True, **options})


GROUPS: dict[str, list[SamplingParams | BeamParams]] = {
    # The LM head draws.
    "fused": [params(4, temperature=t) for t in TEMPERATURES],
    # Rows of logits, drawn from in the graph.
    "filtered": [params(3, temperature=1.0, top_k=20), params(3, temperature=2.0, top_p=0.8), params(3, temperature=1.5, min_p=0.05)],
    # Rows of logits for the host's sampler with its lists, and for beams, which share and copy blocks.
    "prepared": [
        params(3, temperature=1.0, repetition_penalty=1.3, logprobs=2),
        BeamParams(max_new_tokens=3, num_beams=2, num_return_sequences=2),
        params(3, logit_bias={5: 4.0}, min_new_tokens=2),
    ],
    # Activations of 16 bits, which only a GPU has otherwise.
    "bfloat16": [params(3, temperature=t) for t in TEMPERATURES],
    "int8 cache": [params(2, temperature=t) for t in TEMPERATURES],
    # Trees of drafted tokens; those that are accepted are moved.
    "drafts": [params(5, temperature=t, num_assistant_tokens=4) for t in TEMPERATURES],
}


def decode(group: str, kernels: str) -> dict[str, Any]:
    model, draft = small_llama(seed=3, **SIZES), None
    if group == "drafts":
        near = small_llama(seed=3, **SIZES)
        with torch.no_grad():
            near.lm_head.weight += 0.15 * torch.randn(near.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
        draft = DraftModel(near, width=3)
    if group in CACHES:
        model.bfloat16()
    decoder = Decoder(model, kernels=kernels, cache_tokens=256, draft=draft, kv_dtype=CACHES.get(group))
    if group in CACHES:
        decoder.model._activations = torch.bfloat16
    device = on_fake_device(decoder)
    outputs = decoder.generate(PROMPTS, params=GROUPS[group])
    stats = decoder.stats()
    return {
        "outputs": [(o.prompt_index, o.token_ids, o.finish_reason, o.error) for o in outputs],
        "logprobs": [logprob for o in outputs for logprob in o.logprobs],
        "replays": device.num_replays,
        "accepted": stats.num_accepted,
        "drafted": stats.num_drafted,
        "chosen": decoder.ops.chosen,
    }


if __name__ == "__main__":
    triton_cases.patch_once()
    triton_interpreter.exact_conversions()
    triton_interpreter.exact_products()
    triton_interpreter.bounds_of_loops()
    torch.set_num_threads(1)
    print(json.dumps({group: {kernels: decode(group, kernels) for kernels in ("triton", "reference")} for group in GROUPS}))
