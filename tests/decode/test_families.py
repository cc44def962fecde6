"""Greedy tokens of every family over 200 steps, beside transformers; the origin model's beside its own class."""

from __future__ import annotations

import random

import pytest
import torch
from models.model_helpers import hf_model, randomise
from models.origin_model import OriginConfig, Transformer
from models.real_configs import VARIANTS

from engine import Decoder

NEW, PROMPTS, LENGTH = 200, 5, 24


def random_prompts(vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, vocab) for _ in range(LENGTH)] for _ in range(PROMPTS)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(variant: str):
    raw = VARIANTS[variant]
    model = hf_model(raw)
    prompts = random_prompts(raw["vocab_size"])
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)
    decoder = Decoder(model, cache_tokens=2048)
    # Random models soon repeat themselves; under a penalty they go on to new contexts.
    for options in ({}, {"repetition_penalty": 1.5}):
        with torch.no_grad():
            theirs = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
            )
        ours = decoder.generate(prompts, max_new_tokens=NEW, ignore_eos=True, **options)
        for output, expected in zip(ours, theirs[:, LENGTH:].tolist(), strict=True):
            assert output.token_ids == expected
    assert len({token for o in ours for token in o.token_ids}) > 10


@pytest.mark.parametrize("shape", [{}, {"n_heads": 4, "n_kv_heads": None}, {"dim": 128, "n_heads": 2, "n_kv_heads": 1}])
def test_greedy_tokens_equal_the_origins(shape: dict):
    # The default head size, 48; multi-head attention; and the published 64.
    model = Transformer(OriginConfig(**{"dim": 192, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 211, **shape})).eval()
    randomise(model)
    prompts = random_prompts(211)
    ours = Decoder(model, cache_tokens=2048).generate(prompts, max_new_tokens=NEW)
    with torch.no_grad():
        for prompt, output in zip(prompts, ours, strict=True):
            assert output.token_ids == model.generate_super(torch.tensor([prompt]), max_new_tokens=NEW, temperature=0.05)[0].tolist()
