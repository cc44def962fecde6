"""Sampling and beam parameters: every option of a request, validated in one place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .option_checks import (
    INT_LIMIT,
    as_bias,
    as_ids,
    as_schema,
    as_tuple,
    as_words,
    check_int,
    check_range,
    check_scale,
    check_text,
)

MAX_SEQUENCES = 65_536  # of one prompt: each is a request with its state
MAX_DRAFT = 63  # drafted tokens of one step: with the last certain token 64 rows (kernels.verify_drafts)

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
    "beam_width": "num_beams",
    "beam_size": "num_beams",
    "num_draft_tokens": "num_assistant_tokens",
    "num_speculative_tokens": "num_assistant_tokens",
    "prompt_lookup_num_tokens": "num_assistant_tokens",
}

GRAMMARS = ("json_schema", "regex", "grammar")

# None for these is the default, as elsewhere.
_NONE_MEANS: dict[str, Any] = {
    **dict.fromkeys(("stop", "stop_token_ids", "suppress_tokens", "bad_words", "logits_processor", "prefix_token_ids"), ()),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "diversity_penalty"), 0.0),
    **dict.fromkeys(("min_new_tokens", "logprobs"), 0),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    "early_stopping": False,
    "logit_bias": {},
    "verification": "replay",
}

_NOT_STOCHASTIC = (
    "min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids", "suppress_tokens",
    "bad_words", "no_repeat_ngram_size", "prefix_token_ids", *GRAMMARS, "length_penalty", "early_stopping", "num_beam_groups",
)  # fmt: skip


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
        no_repeat_ngram_size: no run of so many tokens of the prompt and the output may occur twice; None: off.
        prefix_token_ids: the first tokens of the output, whatever the model thinks of them; no end tokens among them.
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
        speculative: whether drafts are verified for it, which changes its speed and not its tokens; None: if the decoder has a drafter.
        num_assistant_tokens: tokens drafted at a time, 0 to 63; None: as many as pay, by what is measured.
        verification: "replay" accepts drafts that are what the token law draws. "block" (Sun et al. 2024) accepts somewhat more of what a
            draft model drafts for a sampled request: the tokens have the same distribution, but are others, and depend on when was drafted
            how much.
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
    no_repeat_ngram_size: int | None = None
    prefix_token_ids: tuple[int, ...] = ()
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
    speculative: bool | None = None
    num_assistant_tokens: int | None = None
    verification: str = "replay"

    def __post_init__(self) -> None:
        for name, default in _NONE_MEANS.items():
            if hasattr(self, name) and getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_numbers()
        for name in ("stop_token_ids", "suppress_tokens", "eos_token_id", "allowed_token_ids", "prefix_token_ids"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_ids(name, getattr(self, name)))
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty; it must name at least one token, or be None (all)")
        stop = (self.stop,) if isinstance(self.stop, str) else as_tuple("stop", self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a non-empty string or several of them")
        for text in stop:
            check_text("stop", text)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "bad_words", as_words("bad_words", self.bad_words))
        object.__setattr__(self, "logit_bias", as_bias("logit_bias", self.logit_bias))
        processors = (self.logits_processor,) if callable(self.logits_processor) else as_tuple("logits_processor", self.logits_processor)
        if not all(callable(p) for p in processors):
            raise TypeError(f"logits_processor is {self.logits_processor!r}; it must be a callable or several of them")
        object.__setattr__(self, "logits_processor", processors)
        self._check_grammar()

    def _check_numbers(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1, none_means="as many as fit, at most 256")
        check_int("min_new_tokens", self.min_new_tokens, 0)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens is {self.min_new_tokens}; it must be at most max_new_tokens, which is {self.max_new_tokens}")
        for name in ("do_sample", "ignore_eos", "speculative"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name != "ignore_eos" and value is None):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        for name in ("temperature", "repetition_penalty"):
            check_scale(name, getattr(self, name), zero=name == "temperature")
        check_range("top_p", self.top_p, 0, 1, above=True)
        check_range("min_p", self.min_p, 0, 1)
        check_range("presence_penalty", self.presence_penalty, -2, 2)
        check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.top_k is not None:
            check_int("top_k", self.top_k, -1)
        check_int("seed", self.seed, 0, 2**64 - 1, none_means="drawn from torch's global generator")
        check_int("stream", self.stream, 0, 2**31 - 1)
        check_int("num_return_sequences", self.num_return_sequences, 1, MAX_SEQUENCES)
        if self.stream + self.num_return_sequences > 2**31:
            raise ValueError(f"stream + num_return_sequences is {self.stream + self.num_return_sequences}; it must not pass 2**31")
        check_int("logprobs", self.logprobs, 0)
        check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 1, none_means="off")
        self._check_speculation()

    def _check_speculation(self) -> None:
        check_int("num_assistant_tokens", self.num_assistant_tokens, 0, MAX_DRAFT, none_means="as many as pay")
        if self.verification not in ("replay", "block"):
            raise ValueError(f"verification is {self.verification!r}; it must be 'replay' or 'block'")
        if self.speculative is False and self.num_assistant_tokens:
            raise ValueError(f"num_assistant_tokens is {self.num_assistant_tokens}; with speculative=False it must be 0 or None")
        if self.speculative and self.num_assistant_tokens == 0:
            raise ValueError("num_assistant_tokens is 0; with speculative=True it must be at least 1, or None")
        if self.verification == "block" and self.speculative is False:
            raise ValueError("verification is 'block'; with speculative=False there is nothing to verify, and it must be 'replay'")
        if self.verification == "block" and self.logits_processor not in ((), None):
            raise ValueError("verification is 'block'; it cannot be used with a logits_processor")

    def _check_grammar(self) -> None:
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; at most one of {', '.join(GRAMMARS)} is allowed")
        for name in given:
            value = getattr(self, name)
            if name == "json_schema":
                object.__setattr__(self, name, as_schema(name, value))
            elif not isinstance(value, str) or not value:
                raise (ValueError if value == "" else TypeError)(f"{name} is {value!r}; it must be a non-empty string")
            else:
                check_text(name, value)

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
        beam_options = {f.name for f in fields(BeamParams)} - {f.name for f in fields(cls)}
        known = [f.name for f in fields(BeamParams)]
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
        given = beam_options & named.keys()
        if given and "num_beams" not in given:
            raise TypeError(f"{caller} got {', '.join(sorted(given))} without num_beams; beam search needs num_beams above 1")
        return BeamParams(**named) if given else cls(**named)


@dataclass(frozen=True, kw_only=True)
class BeamParams(SamplingParams):
    """How one request is decoded by beam search; of width 1 it is plain decoding, and the other options of beams mean nothing.

    Without ``do_sample`` it is transformers' beam search: the ``num_beams`` continuations with the largest sums of log-probabilities go on,
    those that end compete by ``sum / length ** length_penalty``. With ``do_sample=True`` it is stochastic beam search (Kool, van Hoof and
    Welling 2019): ``num_beams`` distinct sequences, drawn without replacement from what the model, temperature and top-k make likely.

    All options of ``SamplingParams`` work as there, with these differences: ``temperature`` (above 0) and ``top_k`` act on the logits of
    each beam before its log-probabilities are taken; penalties, bias and bans act on log-probabilities, as in transformers. There is no
    ``top_p``, ``min_p``, ``stop`` or ``logprobs``, and with ``do_sample`` nothing that bans, biases or forces tokens.

    Attributes:
        num_beams: sequences that are followed at once; at least 1, at most the vocabulary's size and the decoder's ``max_batch_size``.
        length_penalty: the exponent of the length in the score; 0 compares plain sums, larger favours longer outputs.
        early_stopping: True ends the search when ``num_beams`` sequences have ended, "never" when no other can become better, False (the
            default) when the best running one is not better at its present length.
        num_beam_groups: as many searches of ``num_beams / num_beam_groups`` beams each (diverse beam search, Vijayakumar et al. 2016).
        diversity_penalty: subtracted from the log-probability of a token for each earlier group's beam that has just taken it.
        num_return_sequences: the best so many are returned; at most ``num_beams``.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_beams", self.num_beams, 1, INT_LIMIT)
        check_range("length_penalty", self.length_penalty, -7, 7)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'")
        check_int("num_beam_groups", self.num_beam_groups, 1)
        check_range("diversity_penalty", self.diversity_penalty, 0, 1e10)
        if self.num_beams % self.num_beam_groups:
            raise ValueError(f"num_beam_groups is {self.num_beam_groups}; it must divide num_beams, which is {self.num_beams}")
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
            raise ValueError(
                f"diversity_penalty is {self.diversity_penalty} with num_beam_groups {self.num_beam_groups}; it must be above 0 for "
                "several groups and 0 for one"
            )
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        """What cannot be together."""
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}; it must be at most num_beams, which is {self.num_beams}"
            )
        if self.temperature is not None and self.temperature < 1e-5:  # what the sampler takes for greedy
            raise ValueError(f"temperature is {self.temperature}; with num_beams above 1 it must be above 0, or None")
        for name, off in (
            ("top_p", (None, 1)), ("min_p", (None, 0)), ("stop", ((),)), ("logprobs", (0,)), ("speculative", (None, False)),
            ("num_assistant_tokens", (None, 0)), ("verification", ("replay",)),
        ):  # fmt: skip
            if getattr(self, name) not in off:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it cannot be used with num_beams above 1")
        if self.stochastic:
            # These would leave a beam's continuations with less than all of its probability: no longer a sample without replacement.
            for f in fields(self):
                if f.name in _NOT_STOCHASTIC and getattr(self, f.name) != (f.default if f.default is not MISSING else {}):
                    raise ValueError(
                        f"{f.name} is {getattr(self, f.name)!r:.60}; it cannot be used with do_sample=True and num_beams above 1"
                    )

    @property
    def stochastic(self) -> bool:
        return self.num_beams > 1 and bool(self.do_sample)

    @property
    def draw_temperature(self) -> float:
        if self.num_beams == 1:
            return super().draw_temperature
        return 1.0 if self.temperature is None else self.temperature


def child_seed(seed: int, index: int) -> int:
    """The seed of prompt ``index`` where prompts share one: the seed itself for the first, then SplitMix64 (Steele et al. 2014)."""
    if index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def draft_seed(seed: int, position: int) -> int:
    """The seed of drafts for block verification that begin at ``position``: noise that nothing else of the request is drawn with."""
    return child_seed(child_seed(seed, 2**32), position + 1)
