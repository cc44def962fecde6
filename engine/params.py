"""Sampling parameters: every option of a request, validated in one place."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

FLOAT_LIMIT = 1e30  # the kernels' float32 holds such numbers and their reciprocals
INT_LIMIT = 2**31 - 1  # as their int32 does these

# Other engines' names for the same option.
ALIASES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "n": "num_return_sequences",
    "stop_strings": "stop",
    "stop_id": "eos_token_id",
    "sampling_seed": "seed",
    "bad_words_ids": "bad_words",
    "top_logprobs": "logprobs",
    "logits_processors": "logits_processor",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
}

GRAMMARS = ("json_schema", "regex", "grammar")

# None for these is the default, as elsewhere.
_NONE_MEANS: dict[str, Any] = {
    **dict.fromkeys(("stop", "stop_token_ids", "suppress_tokens", "bad_words", "logits_processor"), ()),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), 0.0),
    **dict.fromkeys(("min_new_tokens", "logprobs"), 0),
    "repetition_penalty": 1.0,
    "logit_bias": {},
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    A token is drawn from the model's logits in this order: penalties, logit bias, tokens that may not be drawn, temperature, top-k, top-p,
    min-p. A greedy request takes the largest after the first three. Lists of ids and strings become tuples. Where every token is ruled out,
    the request ends with ``finish_reason`` "error" and names the position and the options that rule tokens out.

    Attributes:
        max_new_tokens: most tokens to generate; None: 256, or fewer where the model's length ends sooner.
        min_new_tokens: so many tokens are generated before an end-of-sequence or stop token may be drawn; stop strings are looked for only
            in the text of the tokens after them. At most ``max_new_tokens``. A grammar that must end sooner leaves no token to draw.
        do_sample: False is greedy whatever the temperature; True draws (temperature 1 unless given); None: draw if a temperature is given.
        temperature: logits are divided by it before drawing; 0 is greedy.
        top_k: draw only from the k most likely tokens, ties with the k-th included; None, 0 and -1 switch it off.
        top_p: of those, draw only from the most likely that together reach this share of the probability, the one that reaches it and its
            ties included (nucleus sampling, Holtzman et al. 2020); 0 < top_p <= 1, None and 1 switch it off.
        min_p: of those, draw only from tokens at least this many times as likely as the likeliest (Nguyen et al. 2024); 0 to 1, None and 0
            switch it off.
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely (CTRL, Keskar et al. 2019); 1 is off.
        presence_penalty: -2 to 2, subtracted from the logit of every token that the output holds (OpenAI).
        frequency_penalty: -2 to 2, subtracted from a token's logit for each time the output holds it (OpenAI).
        logit_bias: a mapping of token ids to numbers added to their logits; -inf: never drawn.
        allowed_token_ids: only these may be drawn, end-of-sequence among them only if it is listed; None: all.
        suppress_tokens: ids that are never drawn.
        bad_words: strings or lists of token ids that are never completed: the last id may not be drawn where the others stand right before
            it, in the prompt or the output. A string stands for the ids that the tokenizer gives it as written and after a space; other
            splittings of the same text are not found.
        seed: key of the token law, 0 <= seed < 2**64. None: taken from torch's global generator, so ``torch.manual_seed`` repeats it.
            Prompts of one call that share a seed have each their own derived from it (the first the seed itself), so that they do not
            share noise; the output reports the seed used.
        stream: which of the independent streams of ``seed`` to draw from; sample i of ``num_return_sequences`` has stream ``stream + i``.
        num_return_sequences: independent continuations of the prompt, which share its cache blocks.
        eos_token_id: ends the request; an int or several; None: the model's own.
        ignore_eos: generate on past end-of-sequence tokens.
        stop_token_ids: further tokens that end the request (also under ``ignore_eos``).
        stop: strings that end the request; the text is cut before the first of them.
        logprobs: how many of the most likely tokens to report at each position, under the model's own distribution and under the one drawn
            from; 0: none. The log-probabilities of the generated tokens themselves are always reported.
        logits_processor: ``f(token_ids: list[int], logits: Tensor) -> Tensor``, or several, each given what the one before returned: called
            at each position with all tokens so far and a copy of the request's logits (float32 ``[V]``, as the model gave them); what it
            returns (float32 ``[V]``) is what all other options are applied to. What it raises, or a result of another form, ends this
            request alone. It must be a function of its arguments for the request's tokens to depend on nothing else.
        json_schema: the text must be JSON of this schema (a dict or JSON text; True or {}: any JSON). Between the parts of the JSON the
            model may put one space, or one line break with its indentation, unless "x-guidance" in the schema says otherwise.
        regex: the whole text must match this regular expression (Rust's syntax).
        grammar: the text must be of this Lark grammar. At most one of ``json_schema``, ``regex`` and ``grammar``; each needs a tokenizer
            and the package llguidance. The request ends with "stop" where the text is complete and nothing may follow.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] = ()
    bad_words: str | tuple[str | tuple[int, ...], ...] = ()
    seed: int | None = None
    stream: int = 0
    num_return_sequences: int = 1
    eos_token_id: int | tuple[int, ...] | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: str | tuple[str, ...] = ()
    logprobs: int = 0
    logits_processor: Callable[..., Any] | tuple[Callable[..., Any], ...] = field(default=(), hash=False)
    json_schema: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, default in _NONE_MEANS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_numbers()
        for name in ("stop_token_ids", "suppress_tokens", "eos_token_id", "allowed_token_ids"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _as_ids(name, getattr(self, name)))
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty; it must name at least one token, or be None (all)")
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a non-empty string or several of them")
        for text in stop:
            _check_text("stop", text)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "bad_words", _as_words("bad_words", self.bad_words))
        object.__setattr__(self, "logit_bias", _as_bias("logit_bias", self.logit_bias))
        processors = (self.logits_processor,) if callable(self.logits_processor) else _as_tuple("logits_processor", self.logits_processor)
        if not all(callable(p) for p in processors):
            raise TypeError(f"logits_processor is {self.logits_processor!r}; it must be a callable or several of them")
        object.__setattr__(self, "logits_processor", processors)
        self._check_grammar()

    def _check_numbers(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, none_means="as many as fit, at most 256")
        _check_int("min_new_tokens", self.min_new_tokens, 0)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens is {self.min_new_tokens}; it must be at most max_new_tokens, which is {self.max_new_tokens}")
        for name in ("do_sample", "ignore_eos"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "do_sample" and value is None):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        for name in ("temperature", "repetition_penalty"):
            _check_scale(name, getattr(self, name), zero=name == "temperature")
        _check_range("top_p", self.top_p, 0, 1, above=True)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, -1)
        _check_int("seed", self.seed, 0, 2**64 - 1, none_means="drawn from torch's global generator")
        _check_int("stream", self.stream, 0, 2**31 - 1)
        _check_int("num_return_sequences", self.num_return_sequences, 1, INT_LIMIT)
        if self.stream + self.num_return_sequences > 2**31:
            raise ValueError(f"stream + num_return_sequences is {self.stream + self.num_return_sequences}; it must not pass 2**31")
        _check_int("logprobs", self.logprobs, 0)

    def _check_grammar(self) -> None:
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; at most one of {', '.join(GRAMMARS)} is allowed")
        for name in given:
            value = getattr(self, name)
            if name == "json_schema":
                object.__setattr__(self, name, _as_schema(name, value))
            elif not isinstance(value, str) or not value:
                raise (ValueError if value == "" else TypeError)(f"{name} is {value!r}; it must be a non-empty string")
            else:
                _check_text(name, value)

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

    @property
    def structure(self) -> tuple[str, str] | None:
        """The one of ``json_schema``, ``regex`` and ``grammar`` that is given, by name and text; None: none is."""
        return next(((name, getattr(self, name)) for name in GRAMMARS if getattr(self, name) is not None), None)

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


def _check_number(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")


def _check_scale(name: str, value: Any, *, zero: bool) -> None:
    """A number that divides and multiplies logits: positive, or 0 where that is allowed; None passes."""
    if value is None:
        return
    allowed = f"a finite number {'of at least' if zero else 'above'} 0"
    _check_number(name, value, allowed)
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; it must be {allowed}")
    if value and not 1 / FLOAT_LIMIT <= float(value) <= FLOAT_LIMIT:
        raise ValueError(f"{name} is {value}; it must lie within {1 / FLOAT_LIMIT:g} and {FLOAT_LIMIT:g}, or be 0 where that is allowed")


def _check_range(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """A number from ``low``, itself excluded if ``above``, to ``high``; None passes."""
    if value is None:
        return
    allowed = f"a number {'above' if above else 'from'} {low}{', at most' if above else ' to'} {high}"
    _check_number(name, value, allowed)
    if not low <= value <= high or (above and value == low):
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def _check_text(name: str, text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{name} holds {text!r:.60}, with a lone surrogate, which is not Unicode text")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; it must be one value or a list of them")
    return tuple(value)


def _as_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several as a tuple."""
    ids = (value,) if isinstance(value, Integral) else _as_tuple(name, value)
    for token in ids:
        _check_int(name, token, 0)
    return tuple(map(int, ids))


def _as_words(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in (value,) if isinstance(value, str) else _as_tuple(name, value):
        if isinstance(word, Integral):
            raise TypeError(
                f"{name} holds the number {word}; it must hold strings or lists of token ids (suppress_tokens takes single ids)"
            )
        if isinstance(word, str):
            _check_text(name, word)
        words.append(word if isinstance(word, str) else _as_ids(name, word))
        if not words[-1]:
            raise ValueError(f"{name} holds {word!r}; a word must have at least one character or token id")
    return tuple(words)


def _as_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}; it must be a mapping of token ids to numbers")
    allowed = f"a number from {-FLOAT_LIMIT:g} to {FLOAT_LIMIT:g}, or -inf (never drawn)"
    for token, bias in value.items():
        _check_int(f"{name}, a token id,", token, 0)
        _check_number(f"{name}[{token}]", bias, allowed)
        if not (-FLOAT_LIMIT <= bias <= FLOAT_LIMIT or bias == -math.inf):
            raise ValueError(f"{name}[{token}] is {bias}; it must be {allowed}")
    return {int(token): float(bias) for token, bias in value.items()}


def _as_schema(name: str, value: Any) -> str:
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
