"""Checks of option values: each raises one sentence naming the option, its value and what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

FLOAT_LIMIT = 1e30  # the kernels' float32 holds such numbers and their reciprocals
INT_LIMIT = 2**31 - 1  # as their int32 does these


def check_int(name: str, value: Any, low: int, high: int | None = None, none_means: str | None = None) -> None:
    if value is None and none_means is not None:
        return
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if name == "top_k":
        allowed = "a positive integer, or None, 0 or -1 for off"
    if none_means is not None:
        allowed += f", or None ({none_means})"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")
    if int(value) < low or (high is not None and int(value) > high):
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def check_number(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} is beyond the range of floats; it must be {allowed}") from None


def check_scale(name: str, value: Any, *, zero: bool) -> None:
    """A number that divides and multiplies logits: positive, or 0 where that is allowed; None passes."""
    if value is None:
        return
    allowed = f"a finite number {'of at least' if zero else 'above'} 0"
    check_number(name, value, allowed)
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; it must be {allowed}")
    if value and not 1 / FLOAT_LIMIT <= float(value) <= FLOAT_LIMIT:
        raise ValueError(f"{name} is {value}; it must lie within {1 / FLOAT_LIMIT:g} and {FLOAT_LIMIT:g}, or be 0 where that is allowed")


def check_range(name: str, value: Any, low: float, high: float, *, above: bool = False, required: bool = False) -> None:
    """A number from ``low``, itself excluded if ``above``, to ``high``; None passes unless ``required``."""
    if value is None and not required:
        return
    allowed = f"a number {'above' if above else 'from'} {low}{', at most' if above else ' to'} {high}"
    check_number(name, value, allowed)
    if not low <= value <= high or (above and value == low):
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def check_text(name: str, text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{name} holds {text!r:.60}, with a lone surrogate, which is not Unicode text")


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; it must be one value or a list of them")
    return tuple(value)


def as_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several as a tuple."""
    ids = (value,) if isinstance(value, Integral) else as_tuple(name, value)
    for token in ids:
        check_int(name, token, 0)
    return tuple(map(int, ids))


def as_words(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in (value,) if isinstance(value, str) else as_tuple(name, value):
        if isinstance(word, Integral):
            raise TypeError(
                f"{name} holds the number {word}; it must hold strings or lists of token ids (suppress_tokens takes single ids)"
            )
        if isinstance(word, str):
            check_text(name, word)
        words.append(word if isinstance(word, str) else as_ids(name, word))
        if not words[-1]:
            raise ValueError(f"{name} holds {word!r}; a word must have at least one character or token id")
    return tuple(words)


def as_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}; it must be a mapping of token ids to numbers")
    allowed = f"a number from {-FLOAT_LIMIT:g} to {FLOAT_LIMIT:g}, or -inf (never drawn)"
    for token, bias in value.items():
        check_int(f"{name}, a token id,", token, 0)
        check_number(f"{name}[{token}]", bias, allowed)
        if not (-FLOAT_LIMIT <= bias <= FLOAT_LIMIT or bias == -math.inf):
            raise ValueError(f"{name}[{token}] is {bias}; it must be {allowed}")
    return {int(token): float(bias) for token, bias in value.items()}


def as_schema(name: str, value: Any) -> str:
    """A JSON schema as JSON text; that of any JSON is ``{}``."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name} is {value!r:.60}, which is not JSON: {error}") from None
    if schema is not True and not isinstance(schema, dict):
        raise (ValueError if isinstance(value, (str, bool)) else TypeError)(
            f"{name} is {value!r:.60}; it must be a dict, JSON text of an object, or True (any JSON)"
        )
    try:
        return json.dumps({} if schema is True else schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None
