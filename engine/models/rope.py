"""Rotary position embeddings: their settings in a config, and the cosine and sine tables the kernels read.

RoPE: Su et al. 2021 (arXiv 2104.09864). Linear scaling: position interpolation, Chen et al. 2023 (2306.15595). YaRN: Peng et al. 2023
(2309.00071). llama3: the rule of the Llama 3.1 release, which stretches long wavelengths and blends the band between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .readers import read_bool, read_float, read_int, unsupported


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by ``factor``."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Wavelengths above ``original / low_freq_factor`` are stretched by ``factor``, those below ``original / high_freq_factor`` kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnScaling:
    """Dimensions turning more than ``beta_fast`` times over the original context are kept, less than ``beta_slow`` times interpolated."""

    factor: float
    original_max_position: int
    attention_factor: float  # multiplies cos and sin
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the band's ends to whole dimensions


@dataclass(frozen=True)
class RopeConfig:
    """How queries and keys are rotated. ``interleaved`` pairs components (0,1),(2,3)...; otherwise (i, i + rotary_dim / 2)."""

    theta: float
    rotary_dim: int  # leading components of a head that turn; even
    interleaved: bool = False
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; it must be even and at least 2")


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians per position of each pair: float32 ``[rotary_dim / 2]``.

    Computed in float32 in the order of the published formulas, because models were trained with those very roundings.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    periods = rope.theta**exponents
    frequencies = 1.0 / periods
    match rope.scaling:
        case LinearScaling(factor):
            frequencies = frequencies / factor
        case Llama3Scaling(factor, low, high, original):
            # share of "keep", 0 at the low-frequency end of the band and 1 at the high end
            keep = ((original / (2 * math.pi / frequencies) - low) / (high - low)).clamp(0.0, 1.0)
            frequencies = (1 - keep) * frequencies / factor + keep * frequencies
        case YarnScaling() as yarn:
            start, end = _yarn_band(rope, yarn)
            pairs = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
            keep = 1 - ((pairs - start) / (end - start)).clamp(0.0, 1.0)
            frequencies = 1.0 / (yarn.factor * periods) * (1 - keep) + frequencies * keep
    return frequencies


def _yarn_band(rope: RopeConfig, yarn: YarnScaling) -> tuple[float, float]:
    """The pair indices between which YaRN goes from keeping to interpolating: where a pair turns beta_fast and beta_slow times."""

    def index(turns: float) -> float:
        return rope.rotary_dim * math.log(yarn.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    start, end = index(yarn.beta_fast), index(yarn.beta_slow)
    if yarn.truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, rope.rotary_dim - 1)
    return start, end if end != start else end + 0.001  # a step, where the band is empty


def rope_tables(rope: RopeConfig, max_position: int) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin``, float32 ``[max_position, rotary_dim / 2]``."""
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequencies(rope))
    sin = angles.sin()
    cos = angles.cos_()  # in place: the tables of a long-context model are tens of megabytes
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.attention_factor != 1.0:
        cos, sin = cos.mul_(rope.scaling.attention_factor), sin.mul_(rope.scaling.attention_factor)
    return cos, sin


def read_rope(raw: Mapping[str, Any], head_dim: int, max_position: int) -> RopeConfig:
    """The rope settings of a transformers config: ``rope_parameters`` (5.x), or ``rope_theta`` with ``rope_scaling`` (4.x).

    Raises ``ValueError`` naming the key and value for a kind or a setting that is not supported.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    settings = raw.get(key) or {}
    if not isinstance(settings, Mapping):
        raise unsupported(key, settings, "an object or null")
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise unsupported(key, settings, "one set of settings for all layers")
    theta = read_float(settings, "rope_theta", read_float(raw, "rope_theta", 10000.0))
    rotary_share = read_float(settings, "partial_rotary_factor", read_float(raw, "partial_rotary_factor", 1.0))
    if rotary_share != 1.0:
        raise unsupported("partial_rotary_factor", rotary_share, "1.0")

    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta, head_dim)
    if kind not in ("linear", "llama3", "yarn"):
        raise unsupported(f"{key}.rope_type", kind, "default, linear, llama3, yarn")
    if "factor" not in settings:
        raise ValueError(f"config: {key}.factor is missing; rope_type {kind!r} needs it")
    factor = read_float(settings, "factor", 1.0)
    if kind == "linear":
        return RopeConfig(theta, head_dim, scaling=LinearScaling(factor))

    original = read_int(raw, "original_max_position_embeddings", read_int(settings, "original_max_position_embeddings", max_position))
    if kind == "llama3":
        low, high = read_float(settings, "low_freq_factor", 1.0), read_float(settings, "high_freq_factor", 4.0)
        if low >= high:
            raise unsupported(f"{key}.low_freq_factor", low, f"less than high_freq_factor, which is {high}")
        return RopeConfig(theta, head_dim, scaling=Llama3Scaling(factor, low, high, original))

    attention_factor = read_float(settings, "attention_factor", _yarn_attention_factor(settings, factor))
    fast, slow = read_float(settings, "beta_fast", 32.0), read_float(settings, "beta_slow", 1.0)
    truncate = read_bool(settings, "truncate", True)
    return RopeConfig(theta, head_dim, scaling=YarnScaling(factor, original, attention_factor, fast, slow, truncate))


def _yarn_attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    """The paper's attention temperature, or the ratio of two of them where the config gives ``mscale`` and ``mscale_all_dim``."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return temperature(settings["mscale"]) / temperature(settings["mscale_all_dim"])
    return temperature(1.0)
