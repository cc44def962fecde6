"""Readers of a checkpoint's config: each takes one key, checks its type, and names key and value when it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# The weight dtypes the kernels read in place.
WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def unsupported(key: str, value: object, allowed: str) -> ValueError:
    """The one error for a config key whose value this engine does not do."""
    return ValueError(f"config: {key} = {value!r} is not supported; allowed: {allowed}")


def read_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """``raw[key]`` as a positive int; ``default`` where it is absent or null. ``ValueError`` if there is neither, or another type."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"config: {key} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise unsupported(key, value, "an integer of at least 1")
    return value


def read_float(raw: Mapping[str, Any], key: str, default: float) -> float:
    """``raw[key]`` as a finite positive float; ``default`` where it is absent or null."""
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise unsupported(key, value, "a positive number")
    return float(value)


def read_bool(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """``raw[key]`` as a bool; ``default`` where it is absent or null."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise unsupported(key, value, "true or false")
    return value


def read_token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """``raw[key]``, null, one id or a list of ids, as a tuple without repeats. Ids below 0 mean "none" in some exports and are left out."""
    value = raw.get(key)
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise unsupported(key, value, "a token id or a list of token ids")
    return tuple(dict.fromkeys(i for i in ids if i >= 0))


def read_token_id(raw: Mapping[str, Any], key: str) -> int | None:
    """The first of ``read_token_ids``, or None."""
    return next(iter(read_token_ids(raw, key)), None)


def read_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    """The declared ``dtype`` (transformers 5) or ``torch_dtype`` (before), None where absent or "auto"."""
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    return None if raw.get(key) in (None, "auto") else weight_dtype(key, raw[key])


def weight_dtype(key: str, value: object) -> torch.dtype:
    """A weight dtype given as ``torch.bfloat16``, "bfloat16" or "torch.bfloat16"; ``ValueError`` naming ``key`` for others."""
    name = str(value).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise unsupported(key, name, ", ".join(WEIGHT_DTYPES))
    return WEIGHT_DTYPES[name]
