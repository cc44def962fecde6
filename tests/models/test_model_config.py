"""Configs of real checkpoints read key by key, RoPE tables against transformers', and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from real_configs import LLAMA_2_7B, LLAMA_31_8B, LLAMA_32_1B, MISTRAL_7B_V01, QWEN2_05B, QWEN3_06B, REAL, VARIANTS

from engine.models.config import ModelConfig
from engine.models.families import FAMILIES, find_family
from engine.models.rope import Llama3Scaling, RopeConfig, rope_tables


def read(raw: dict[str, Any]) -> ModelConfig:
    return find_family(raw["model_type"], tuple(raw.get("architectures", ()))).read_config(raw)


def sizes(config: ModelConfig) -> tuple[int, ...]:
    return (
        config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_size,
        config.max_position,
    )  # fmt: skip


def test_llama_2() -> None:
    config = read(LLAMA_2_7B)
    assert sizes(config) == (32000, 4096, 32, 32, 32, 128, 11008, 4096)
    assert config.rope == RopeConfig(theta=10000.0, rotary_dim=128)
    assert (config.norm_eps, config.dtype, config.tied_head, config.windows) == (1e-5, torch.float16, False, (0,) * 32)
    assert not (config.qkv_bias or config.out_bias or config.mlp_bias or config.qk_norm)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), None)


def test_llama_3() -> None:
    config = read(LLAMA_31_8B)
    assert sizes(config) == (128256, 4096, 32, 32, 8, 128, 14336, 131072)
    assert config.rope == RopeConfig(500000.0, 128, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert config.eos_token_ids == (128001, 128008, 128009) and config.dtype == torch.bfloat16
    small = read(LLAMA_32_1B)
    assert sizes(small) == (128256, 2048, 16, 32, 8, 64, 8192, 131072) and small.tied_head
    assert isinstance(small.rope.scaling, Llama3Scaling) and small.rope.scaling.factor == 32.0
    assert read({**LLAMA_31_8B, "attention_bias": True}).out_bias and read({**LLAMA_31_8B, "mlp_bias": True}).mlp_bias


def test_mistral() -> None:
    config = read(MISTRAL_7B_V01)
    assert sizes(config) == (32000, 4096, 32, 32, 8, 128, 14336, 32768) and config.windows == (4096,) * 32
    assert read({**MISTRAL_7B_V01, "sliding_window": None}).windows == (0,) * 32
    absent = {key: value for key, value in MISTRAL_7B_V01.items() if key not in ("sliding_window", "num_key_value_heads")}
    assert read(absent) == config  # the defaults of transformers


def test_qwen() -> None:
    config = read(QWEN2_05B)
    assert sizes(config) == (151936, 896, 24, 14, 2, 64, 4864, 131072) and config.rope.theta == 1e6
    assert config.qkv_bias and not config.out_bias and config.tied_head and config.windows == (0,) * 24
    windowed = {**QWEN2_05B, "use_sliding_window": True, "max_window_layers": 20, "sliding_window": 512}
    assert read(windowed).windows == (0,) * 20 + (512,) * 4
    assert read({**windowed, "max_window_layers": 0}).windows == (512,) * 24
    config = read(QWEN3_06B)
    assert sizes(config) == (151936, 1024, 28, 16, 8, 128, 3072, 40960) and config.qk_norm and not config.qkv_bias
    assert read({key: value for key, value in QWEN3_06B.items() if key != "head_dim"}) == config


@pytest.mark.parametrize("name", REAL)
def test_both_forms_of_a_config(name: str) -> None:
    """transformers 5 moves the rope settings to ``rope_parameters`` and ``torch_dtype`` to ``dtype``; a live model has that form."""
    raw = REAL[name]
    modern = transformers.AutoConfig.for_model(**raw).to_dict()
    assert modern.get("rope_parameters") and "rope_theta" not in modern
    assert replace(read(modern), dtype=None) == replace(read(raw), dtype=None)
    declared = {**modern, "dtype": raw["torch_dtype"], "torch_dtype": None}
    assert read(declared).dtype == read(raw).dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_tables_are_those_of_transformers(variant: str) -> None:
    raw = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(**{**raw, "num_hidden_layers": 1, "layer_types": None})
    inner = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        cos, sin = inner.rotary_emb(torch.zeros(1), torch.arange(512)[None])
    ours = rope_tables(read(raw).rope, 512)
    half = cos.shape[-1] // 2
    for table, theirs in zip(ours, (cos, sin), strict=True):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, theirs[0, :, :half], rtol=0, atol=2e-6)


def test_tables_may_be_partial() -> None:
    cos, sin = rope_tables(RopeConfig(100.0, 6), 5)
    assert cos.shape == sin.shape == (5, 3)
    assert cos[0].tolist() == [1.0, 1.0, 1.0] and sin[1, 1].item() == pytest.approx(torch.sin(torch.tensor(100.0 ** (-1 / 3))).item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; allowed: silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic' .*default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor = 'two'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            "low_freq_factor = 4.0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of settings for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method = 'gptq'.*float32, bfloat16 or float16"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype = 'float8_e4m3fn'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "32000"}, "vocab_size = '32000'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"head_dim": 20}, "head_dim 20 is not supported.*multiples of 8 up to 256"),
        ({"head_dim": 264}, "head_dim 264"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({**LLAMA_2_7B, **changes})


@pytest.mark.parametrize("types", [["full_attention"], ["chunked_attention"] * 24, ["sliding_attention"] * 24, "full"])
def test_refused_layer_types(types: object) -> None:
    with pytest.raises(ValueError, match="layer_types"):
        read({**QWEN2_05B, "layer_types": types})  # use_sliding_window is false: no layer may slide


def test_refused_window_layers() -> None:
    with pytest.raises(ValueError, match="max_window_layers = None"):
        read({**QWEN2_05B, "max_window_layers": None})


def test_unknown_families() -> None:
    known = "known families: llama .LlamaForCausalLM.*mistral.*qwen2.*qwen3.*Tiny-K"
    with pytest.raises(ValueError, match=f"model_type 'mixtral' is not supported; {known}"):
        find_family("mixtral")
    with pytest.raises(ValueError, match=f"model_type None is not supported; {known}"):
        find_family(None)
    with pytest.raises(ValueError, match=f"class 'LlamaForSequenceClassification' of model_type 'llama' is not supported; {known}"):
        find_family("llama", ("LlamaForSequenceClassification",))
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "Tiny-K"}


def test_windows_fit_the_layers() -> None:
    with pytest.raises(ValueError, match="windows"):
        replace(read(LLAMA_2_7B), windows=(0,))
    with pytest.raises(ValueError, match="rotary_dim"):
        replace(read(LLAMA_2_7B), rope=RopeConfig(1e4, 256))
    with pytest.raises(ValueError, match="even"):
        RopeConfig(1e4, 7)
