"""Beam search equals transformers' token for token, over its options, on three families of random models and the bundled one."""

from __future__ import annotations

import itertools
import random

import pytest
from decode.beam_peer import differences, frequent_tokens
from models.model_helpers import hf_model
from models.real_configs import VARIANTS
from transformers import AutoModelForCausalLM

from engine import Decoder
from engine import decoder as decoder_module

FAMILIES = ("llama-3.1-8b", "qwen2-0.5b", "qwen3-0.6b")
GRID = list(itertools.product((2, 3, 4, 8, 16), (False, True, "never"), (0.0, 0.5, 1.0, 2.0), (0, 1, 3)))


@pytest.fixture(scope="module", params=[*FAMILIES, "bundled"])
def pair(request: pytest.FixtureRequest):
    """A model of transformers in float32 and our decoder over it."""
    if request.param == "bundled":
        folder = decoder_module.Path(decoder_module.__file__).parent / "bundled" / "target"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    else:
        model = hf_model(VARIANTS[request.param])
    return model, Decoder(model, cache_tokens=16384)


def run_grid(pair, points, num_prompts: int, new_tokens: int) -> None:
    model, decoder = pair
    rng = random.Random(1)
    vocab = model.config.vocab_size
    found: list[str] = []
    searches = ended = 0
    for width, early_stopping, length_penalty, num_eos in points:
        length = rng.randint(1, 20)
        prompts = [[rng.randrange(4, vocab) for _ in range(length)] for _ in range(num_prompts)]
        eos = frequent_tokens(decoder, prompts[:8], num_eos)
        found += differences(
            decoder, model, prompts, eos, rng.choice([1, (width + 1) // 2, width]), num_beams=width, early_stopping=early_stopping,
            length_penalty=length_penalty, max_new_tokens=new_tokens,
        )  # fmt: skip
        searches += num_prompts
        if eos:
            some = decoder.generate(prompts[:4], num_beams=width, eos_token_id=eos, max_new_tokens=new_tokens)
            ended += sum(o.finish_reason == "stop" for o in some)
    near = [line for line in found if line.startswith("near")]
    print(f"\n{searches} searches, {len(found)} differ, {len(near)} of them by less than 1e-5", *found, sep="\n")
    assert found == near
    assert ended, "no beam ever ended: choose other end tokens"
    decoder.loop.pool.check([])
    assert decoder.loop.pool.num_free == decoder.loop.pool.num_blocks


def test_a_short_grid(pair):
    """Every value of every option, two prompts each."""
    run_grid(pair, random.Random(0).sample(GRID, 16), num_prompts=2, new_tokens=12)


@pytest.mark.slow_grid
def test_the_full_grid(pair):
    """All combinations, 50 prompts each."""
    run_grid(pair, GRID, num_prompts=50, new_tokens=16)
