"""How matrices are kept: shared, packed, int8 or int4, from every kind of source, and what the model computes from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import TOLERANCE, hf_model, run_logits, some_tokens
from real_configs import VARIANTS
from test_model_load import saved
from torch import Tensor

from engine import Decoder
from engine.kernels import PackedWeight, cpu, quantize, quantized, select
from engine.models import Transformer, load

UNTIED, TIED = VARIANTS["llama-3.1-8b"], VARIANTS["qwen2-0.5b"]
needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))


def matrices(model: Any) -> list[Any]:
    w = model.weights
    return [m for layer in w.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down) for m in part] + [w.head]


@needs_cpp
@pytest.mark.parametrize("raw", [UNTIED, TIED], ids=["untied", "tied"])
def test_defaults(raw: dict[str, Any], tmp_path: Path) -> None:
    """A live model is shared, a path is packed; the oracle packs nothing."""
    model = hf_model(raw)
    folder = saved(model, tmp_path / "model", raw=raw)
    assert all(isinstance(m, torch.nn.Parameter) for m in matrices(load(model).model))
    assert all(isinstance(m, PackedWeight) for m in matrices(load(folder).model))
    assert all(isinstance(m, torch.Tensor) for m in matrices(load(folder, ops=select("cpu", "reference")).model))
    assert all(isinstance(m, torch.Tensor) for m in matrices(load(folder, weights="shared").model))


@needs_cpp
@pytest.mark.parametrize("weights", ["packed", "int8", "int4"])
@pytest.mark.parametrize("raw", [UNTIED, TIED], ids=["untied", "tied"])
def test_packed_once(raw: dict[str, Any], weights: str) -> None:
    """A tied head is one packed matrix, its embedding too; an embedding of its own stays as it is."""
    model = hf_model(raw)
    loaded = load(model, weights=weights)
    kept = loaded.model.weights
    assert {m.format for m in matrices(loaded.model)} == {weights if weights != "packed" else "float32"}
    assert loaded.config.tied_head == raw["tie_word_embeddings"] == (kept.embedding is kept.head)
    if not loaded.config.tied_head:
        assert kept.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert loaded.model.dtype == torch.float32
    sizes = {"packed": 4, "int8": 1, "int4": 0.5625}
    numel = sum(m.shape[0] * m.shape[1] for m in matrices(loaded.model))
    assert loaded.model.bytes_per_step >= numel * sizes[weights]


@needs_cpp
@pytest.mark.parametrize("raw", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_computes_the_same_function(raw: dict[str, Any], dtype: torch.dtype) -> None:
    model = hf_model(raw).to(dtype)
    tokens = some_tokens(40, load(model).config.vocab_size)
    shared = run_logits(load(model).model, tokens)
    packed = load(model, weights="packed").model
    if dtype == torch.bfloat16:  # beside packed bfloat16 weights, activations are rounded to bfloat16 before each product
        assert 0 < (run_logits(packed, tokens) - shared).norm() < 0.01 * shared.norm()
    else:
        assert (run_logits(packed, tokens) - shared).abs().max() < TOLERANCE
    assert torch.equal(run_logits(packed, tokens, chunks=[1, 2, 7, 13, 17]), run_logits(packed, tokens))


@needs_cpp
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("raw", [UNTIED, TIED], ids=["untied", "tied"])
def test_quantised_computes_what_the_oracle_does(raw: dict[str, Any], weights: str) -> None:
    model = hf_model(raw)
    tokens = some_tokens(40, load(model).config.vocab_size)
    ours = load(model, weights=weights).model
    logits = run_logits(ours, tokens)
    oracle = run_logits(load(model, ops=select("cpu", "reference"), weights=weights).model, tokens)
    exact = run_logits(load(model).model, tokens)
    # The products agree to the bit, what lies between them to float rounding, which may turn the rounding of an activation.
    assert (logits - oracle).norm() < 0.01 * exact.norm()
    assert (logits - exact).norm() < {"int8": 0.05, "int4": 0.4}[weights] * exact.norm()
    assert torch.equal(run_logits(ours, tokens, chunks=[1, 2, 7, 13, 17]), logits)


@needs_cpp
@pytest.mark.parametrize("weights", ["packed", "int8", "int4"])
def test_decoder_keeps_the_token_law(weights: str) -> None:
    """Tokens do not depend on the batch, nor on a later change of the live model."""
    model = hf_model(TIED)
    decoder = Decoder(model, weights=weights, cache_tokens=2048)
    prompts = [some_tokens(n, decoder.config.vocab_size, seed=n) for n in (3, 17, 40, 9)]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8, "ignore_eos": True}
    together = decoder.generate(prompts, **options, seed=5)
    for output, prompt in zip(together, prompts, strict=True):
        alone = decoder.generate(prompt, **options, seed=output.seed)[0]
        assert alone.token_ids == output.token_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [o.token_ids for o in decoder.generate(prompts, **options, seed=5)] == [o.token_ids for o in together]


@pytest.mark.parametrize("format", quantized.FORMATS)
@pytest.mark.parametrize("raw", [UNTIED, TIED], ids=["untied", "tied"])
def test_quantised_for_a_gpu_in_the_oracle(raw: dict[str, Any], format: str) -> None:
    """What a GPU computes with, matrix by matrix, is what their dense forms give; a tied head is the embedding."""
    loaded = load(hf_model(raw), ops=select("cpu", "reference"))
    kept = loaded.model.weights
    tokens = some_tokens(20, loaded.config.vocab_size)

    def with_matrices(change: Callable[[Any], Any]) -> Tensor:
        parts = ("qkv", "out", "gate_up", "down")
        layers = tuple(replace(layer, **{p: tuple(map(change, getattr(layer, p))) for p in parts}) for layer in kept.layers)
        head = change(kept.head)
        weights = replace(kept, layers=layers, head=head, embedding=head if kept.embedding is kept.head else kept.embedding)
        return run_logits(Transformer(loaded.config, weights, loaded.model.ops), tokens)

    logits = with_matrices(lambda m: quantize(m, format))
    assert (logits - with_matrices(lambda m: quantize(m, format).dense())).abs().max() < TOLERANCE
    exact = run_logits(loaded.model, tokens)
    assert 0 < (logits - exact).norm() < {"int8": 0.05, "int4": 0.4, "fp8": 0.15}[format] * exact.norm()


def test_bad_input(tmp_path: Path) -> None:
    model = hf_model(TIED)
    with pytest.raises(ValueError, match="weights is 'fp8'; on cpu it must be None or one of shared, packed, int8, int4"):
        load(model, weights="fp8")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj: weight holds values that are not finite, which int8 cannot"):
        load(model, weights="int8")
    load(model, weights="packed")
