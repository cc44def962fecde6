"""Sampling parameters: every option of a request, validated in one place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

FLOAT_LIMIT = 1e30  # the kernels' float32 holds such numbers and their reciprocals
INT_LIMIT = 2**31 - 1  # as their int32 does these

# Other engines' names for the same option.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "stop_strings": "stop",
    "stop_id": "eos_token_id",
    "sampling_seed": "seed",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    Attributes:
        max_new_tokens: most tokens to generate; None: 256, or fewer where the model's length ends sooner.
        do_sample: False is greedy whatever the temperature; True draws (temperature 1 unless given); None: draw if a temperature is given.
        temperature: logits are divided by it before drawing; 0 is greedy.
        top_k: draw only from the k most likely tokens, ties with the k-th included; None, 0 and -1 switch it off.
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely (CTRL, Keskar et al. 2019); 1 is off.
        seed: key of the token law, 0 <= seed < 2**64. None: taken from torch's global generator, so ``torch.manual_seed`` repeats it.
            Prompts of one call that share a seed have each their own derived from it (the first the seed itself), so that they do not
            share noise; the output reports the seed used.
        stream: which of the independent streams of ``seed`` to draw from; sample i of ``num_return_sequences`` has stream ``stream + i``.
        num_return_sequences: independent continuations of the prompt, which share its cache blocks.
        eos_token_id: ends the request; an int or several; None: the model's own.
        ignore_eos: generate on past end-of-sequence tokens.
        stop_token_ids: further tokens that end the request (also under ``ignore_eos``).
        stop: strings that end the request; the text is cut before the first of them.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stream: int = 0
    num_return_sequences: int = 1
    eos_token_id: int | tuple[int, ...] | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, default in (("stop", ()), ("stop_token_ids", ()), ("repetition_penalty", 1.0)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        _check_int("max_new_tokens", self.max_new_tokens, 1, none_means="as many as fit, at most 256")
        for name in ("do_sample", "ignore_eos"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "do_sample" and value is None):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        _check_float("temperature", self.temperature, 0.0, inclusive=True, optional=True)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, inclusive=False)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, -1)
        _check_int("seed", self.seed, 0, 2**64 - 1, none_means="drawn from torch's global generator")
        _check_int("stream", self.stream, 0, 2**31 - 1)
        _check_int("num_return_sequences", self.num_return_sequences, 1, INT_LIMIT)
        if self.stream + self.num_return_sequences > 2**31:
            raise ValueError(f"stream + num_return_sequences is {self.stream + self.num_return_sequences}; it must not pass 2**31")
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a non-empty string or several of them")
        object.__setattr__(self, "stop", stop)
        for name in ("eos_token_id", "stop_token_ids"):
            value = getattr(self, name)
            if value is None and name == "eos_token_id":
                continue
            ids = (value,) if isinstance(value, Integral) else _as_tuple(name, value)
            for token in ids:
                _check_int(name, token, 0)
            object.__setattr__(self, name, tuple(map(int, ids)))

    @property
    def draw_temperature(self) -> float:
        """The temperature the sampler gets; 0 means greedy."""
        if self.do_sample is False:
            return 0.0
        if self.temperature is None:
            return 1.0 if self.do_sample else 0.0
        return self.temperature

    @property
    def draw_top_k(self) -> int:
        """The k the sampler gets; 0 means off."""
        return min(max(self.top_k or 0, 0), INT_LIMIT)

    @classmethod
    def from_options(cls, caller: str, options: dict[str, Any]) -> SamplingParams:
        """Build from keyword options of ``caller``, aliases included; an unknown one raises ``TypeError`` naming the nearest known."""
        known = [f.name for f in fields(cls)]
        named: dict[str, Any] = {}
        for key, value in options.items():
            name = ALIASES.get(key, key)
            if name not in known:
                near = difflib.get_close_matches(key, [*known, *ALIASES], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known options are {', '.join(known)}"
                raise TypeError(f"{caller} got an unknown option {key!r}; {hint}")
            if name in named:
                raise TypeError(f"{caller} got {name!r} twice, once as {key!r} under another name")
            named[name] = value
        return cls(**named)


def child_seed(seed: int, index: int) -> int:
    """The seed of prompt ``index`` where prompts share one: the seed itself for the first, then SplitMix64 (Steele et al. 2014)."""
    if index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _check_int(name: str, value: Any, low: int, high: int | None = None, none_means: str | None = None) -> None:
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


def _check_float(name: str, value: Any, low: float, *, inclusive: bool, optional: bool = False) -> None:
    if value is None and optional:
        return
    allowed = f"a finite number {'of at least' if inclusive else 'above'} {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")
    if not math.isfinite(value) or value < low or (value == low and not inclusive):
        raise ValueError(f"{name} is {value}; it must be {allowed}")
    if value and not 1 / FLOAT_LIMIT <= float(value) <= FLOAT_LIMIT:
        raise ValueError(f"{name} is {value}; it must lie within {1 / FLOAT_LIMIT:g} and {FLOAT_LIMIT:g}, or be 0 where that is allowed")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; it must be one value or a list of them")
    return tuple(value)
