"""Logits of the engine's Transformer against transformers', on small random models with the options of real checkpoints."""

from __future__ import annotations

import pytest
import torch
from model_helpers import BACKENDS, TOLERANCE, hf_logits, hf_model, ops_of, run_logits, some_tokens
from real_configs import VARIANTS

from engine.models import load

LENGTH = 70  # longer than any window above, over several blocks and no multiple of one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers(variant: str, backend: str) -> None:
    model = hf_model(VARIANTS[variant])
    tokens = some_tokens(LENGTH, model.config.vocab_size)
    expected = hf_logits(model, tokens)
    assert expected.std() > 0.1  # else the tolerance would say nothing
    loaded = load(model, ops=ops_of(backend))
    whole = run_logits(loaded.model, tokens)
    in_steps = run_logits(loaded.model, tokens, [40, 1, 1, 16, 12])
    assert whole.dtype == torch.float32
    assert (whole - expected).abs().max() < TOLERANCE and (in_steps - expected).abs().max() < TOLERANCE
    if backend == "cpu":  # its rows do not depend on the step they ran in
        assert torch.equal(whole, in_steps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_read_as_they_are(dtype: torch.dtype, backend: str) -> None:
    """Activations stay float32, so the yardstick is transformers in float32 over the same rounded weights."""
    model = hf_model(VARIANTS["qwen2-0.5b"])
    loaded = load(model.to(dtype), ops=ops_of(backend))
    assert loaded.config.dtype == loaded.model.dtype == dtype
    tokens = some_tokens(40, 211)
    got = run_logits(loaded.model, tokens)
    rounded = hf_model(VARIANTS["qwen2-0.5b"])  # anew: .to(dtype) rounds the RoPE frequencies of a transformers model as well
    rounded.load_state_dict(model.state_dict())
    assert (got - hf_logits(rounded, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["mistral window", "qwen2 window layers", "qwen3 biases and layer types"])
def test_windows_matter(variant: str) -> None:
    """The window tests above would pass without windows if the prompts did not reach beyond them."""
    raw = VARIANTS[variant]
    model, unlimited = hf_model(raw), hf_model({**raw, "sliding_window": 400})
    tokens = some_tokens(LENGTH, 211)
    difference = (hf_logits(model, tokens) - hf_logits(unlimited, tokens)).abs().amax(dim=1)
    assert difference[: raw["sliding_window"]].max() == 0 and difference[-1] > 100 * TOLERANCE


@pytest.mark.parametrize("variant", ["llama-3.1-8b", "llama-3.2-1b", "llama linear scaling", "llama yarn", "llama yarn mscale"])
def test_rope_scalings_matter(variant: str) -> None:
    raw = VARIANTS[variant]
    tokens = some_tokens(LENGTH, 211)
    difference = hf_logits(hf_model(raw), tokens) - hf_logits(hf_model({**raw, "rope_scaling": None}), tokens)
    assert difference.abs().max() > 10 * TOLERANCE
