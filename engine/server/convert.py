"""From a call to the engine's options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..params import BeamParams, SamplingParams
from .errors import ApiError
from .schema import ChatCall, CompletionCall, Decoding
from .settings import Settings

COMPLETION_TOKENS = 16  # where a completion does not say how many, as in OpenAI's API

# The engine's names for fields of calls that are called otherwise.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "json_schema": "response_format",
}
_ENGINE_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\b")
_PROMPT = re.compile(r"prompts?\b")


def bad_request(error: Exception, call: Decoding) -> ApiError:
    """What the engine says about an option, in the names of the call."""
    names = dict(_NAMES)
    if isinstance(call, ChatCall) and call.max_completion_tokens is not None:
        names["max_new_tokens"] = "max_completion_tokens"
    if isinstance(call, CompletionCall) and call.best_of is not None:
        names["num_return_sequences"] = "best_of"
    message = _ENGINE_NAME.sub(lambda match: names[match[1]], str(error))
    first = re.split(r"[^\w]", message, maxsplit=1)[0]
    param = first if first in type(call).model_fields else None
    if param is None and _PROMPT.match(message):
        param = "messages" if isinstance(call, ChatCall) else "prompt"
    code = "context_length_exceeded" if "the model's length" in message or "the whole cache has" in message else None
    return ApiError(400, message, param=param, code=code)


def split_prompt(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a completion, which may be a single one."""
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if single else prompt  # type: ignore[list-item, return-value]


def check_limits(call: Decoding, settings: Settings) -> None:
    """Refuse what is more than this server takes in one call."""

    def at_most(param: str, value: int, limit: int, what: str = "") -> None:
        if value > limit:
            raise ApiError(400, f"{param} {what or 'is'} {value}; this server takes at most {limit}", param=param)

    num_prompts = len(split_prompt(call.prompt)) if isinstance(call, CompletionCall) else 1
    at_most("prompt", num_prompts, settings.max_prompts, "holds so many prompts:")
    many = max(call.n, call.num_beams, getattr(call, "best_of", None) or 0)
    if num_prompts * many > settings.max_sequences:
        name = "num_beams" if many == call.num_beams else "n" if many == call.n else "best_of"
        times = f" for each of {num_prompts} prompts" if num_prompts > 1 else ""
        message = f"{name} is {many}{times}; this server takes at most {settings.max_sequences} sequences in one call"
        raise ApiError(400, message, param=name)
    stops = [call.stop] if isinstance(call.stop, str) else list(call.stop)
    at_most("stop", len(stops), settings.max_stop, "holds so many strings:")
    at_most("stop", max(map(len, stops), default=0), settings.max_stop_length, "holds a string of so many characters:")
    at_most("logit_bias", len(call.logit_bias), settings.max_logit_bias, "holds so many tokens:")
    at_most("stop_token_ids", len(call.stop_token_ids), settings.max_logit_bias, "holds so many tokens:")
    at_most("priority", abs(call.priority), settings.max_priority, "is of so large a size:")
    for name in ("logprobs", "top_logprobs"):
        at_most(name, int(getattr(call, name, None) or 0), settings.max_logprobs)


def to_params(call: CompletionCall | ChatCall) -> SamplingParams:
    """The options of a call; raises ``ApiError`` for what cannot be."""
    best_of: int | None = None
    max_tokens: int | None
    if isinstance(call, CompletionCall):
        max_tokens = COMPLETION_TOKENS if call.max_tokens is None else call.max_tokens
        # The engine reports the drawn token's own log-probability always, alternatives from one on.
        logprobs = call.logprobs or 0
        best_of = call.best_of
        if call.echo and call.logprobs is not None:
            raise ApiError(400, "logprobs is given; it cannot be used with echo", param="logprobs")
        if best_of is not None and best_of < call.n:
            raise ApiError(400, f"best_of is {best_of}; it must be at least n, which is {call.n}", param="best_of")
        if best_of is not None and best_of > call.n and call.stream:
            raise ApiError(400, f"best_of is {best_of}; with stream it must be n, which is {call.n}", param="best_of")
        if best_of is not None and call.num_beams > 1:
            raise ApiError(400, f"best_of is {best_of}; it cannot be used with num_beams above 1", param="best_of")
    else:
        max_tokens = call.max_completion_tokens if call.max_completion_tokens is not None else call.max_tokens
        logprobs = call.top_logprobs or 0
        if call.top_logprobs is not None and not call.logprobs:
            raise ApiError(400, f"top_logprobs is {call.top_logprobs}; it needs logprobs to be true", param="top_logprobs")
    for name, value in (("logprobs", getattr(call, "logprobs", 0)), ("top_logprobs", getattr(call, "top_logprobs", 0))):
        if value is not None and value < 0:
            raise ApiError(400, f"{name} is {value}; it must be at least 0", param=name)
    if call.stream_options is not None and not call.stream:
        raise ApiError(400, "stream_options is given; it needs stream to be true", param="stream_options")
    if call.seed is not None and not -(2**63) <= call.seed < 2**64:
        raise ApiError(400, f"seed is {str(call.seed):.40}; it must be an integer of 64 bits", param="seed")
    options: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "min_new_tokens": call.min_tokens,
        "temperature": 1.0 if call.temperature is None and call.num_beams == 1 else call.temperature,
        "top_k": call.top_k,
        "top_p": call.top_p,
        "min_p": call.min_p,
        "repetition_penalty": call.repetition_penalty,
        "presence_penalty": call.presence_penalty,
        "frequency_penalty": call.frequency_penalty,
        "logit_bias": call.logit_bias,
        "seed": None if call.seed is None else call.seed % 2**64,
        "num_return_sequences": call.n if best_of is None else best_of,
        "ignore_eos": call.ignore_eos,
        "stop_token_ids": call.stop_token_ids,
        "stop": call.stop,
        "logprobs": logprobs,
        **_structure(call),
    }
    try:
        if call.num_beams == 1:
            return SamplingParams(**options)
        beams = {name: getattr(call, name) for name in ("num_beams", "length_penalty", "early_stopping")}
        return BeamParams(**options, **beams)
    except (ValueError, TypeError) as error:
        raise bad_request(error, call) from None


def _structure(call: Decoding) -> dict[str, Any]:
    """What the text must be of, if it is free in part only."""
    given: dict[str, Any] = {name: getattr(call, name) for name in ("regex", "grammar") if getattr(call, name) is not None}
    form = call.response_format
    if form is not None and form.type == "json_object":
        given["json_schema"] = {"type": "object"}
    elif form is not None and form.json_schema is not None:
        given["json_schema"] = form.json_schema.schema_
    return given
