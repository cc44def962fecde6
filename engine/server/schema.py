"""What calls may hold, in OpenAI's names; types are checked here, ranges where the options are (``engine.params``)."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

# Fields of OpenAI's API that change nothing about the output here.
IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction",
    "parallel_tool_calls",
)  # fmt: skip
# Fields that would change it and that this server does not have, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_calls": ([],),
    "audio": (),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "moderation": (),
}


MAX_ITEMS = 8192  # of a field that is a list or an object


def about_field(name: str, problem: str) -> PydanticCustomError:
    name = name[:100].encode("utf-8", "backslashreplace").decode()  # JSON can name a field by what is no text
    return PydanticCustomError("field", "{field} {problem}", {"field": name, "problem": problem})


class Call(BaseModel):
    """A body whose fields are all known: one that is not is named, with its nearest neighbour. null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    unbounded: ClassVar[tuple[str, ...]] = ()  # fields whose lists are bounded by the body alone
    ignored: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("it must be an object")
        fields = [field.alias or name for name, field in cls.model_fields.items()]
        known = {}
        for name, value in values.items():
            if name not in fields and name not in cls.ignored and name not in cls.refused:
                near = difflib.get_close_matches(name[:100], fields, n=1)
                raise about_field(name, f"is not a known field{f'; did you mean {near[0]}?' if near else ''}")
            if value is None or name in cls.ignored:
                continue
            # Before its items are looked at, each of which would be an error of its own.
            if isinstance(value, (list, dict)) and len(value) > MAX_ITEMS and name not in cls.unbounded:
                raise about_field(name, f"holds {len(value)} items; it may hold at most {MAX_ITEMS}")
            if name not in cls.refused:
                known[name] = value
            elif value not in cls.refused[name]:
                raise about_field(name, "is given; this server does not support it")
        return known


def _check_prompt(value: Any) -> Any:
    """A string, token ids, or a list of either kind."""
    one = isinstance(value, str) or _are_ids(value)
    if not one and not (isinstance(value, list) and value and (_all(value, str) or all(_are_ids(item) for item in value))):
        raise ValueError("prompt must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty")
    return value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _all(value: list[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in value)


def _check_stop(value: Any) -> Any:
    if not isinstance(value, str) and not (isinstance(value, list) and _all(value, str)):
        raise ValueError("stop must be a string or a list of strings")
    return value


def _check_bias(value: Any) -> Any:
    """JSON has only strings for keys."""
    if not isinstance(value, dict):
        raise ValueError("logit_bias must be an object of token ids and numbers")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"logit_bias holds {key!r:.60}; its keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


def _check_content(value: Any) -> Any:
    """Text, or parts that are all text: their lines one after the other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not _all(value, dict):
        raise ValueError("content must be a string or a list of text parts")
    for part in value:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"content has a part of type {part.get('type')!r:.60}; this model takes only parts of type 'text', with their text"
            )
    return "\n".join(part["text"] for part in value)


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS, {"type": "array", "items": _IDS, "minItems": 1},
    ]
}  # fmt: skip
# Checked by hand: tried as one kind after the other, each of a million ids would be an error of its own.
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
Stop = Annotated[str | list[str], BeforeValidator(_check_stop)]
Bias = Annotated[dict[int, float], BeforeValidator(_check_bias)]
Content = Annotated[str | list[dict[str, Any]], BeforeValidator(_check_content)]


class StreamOptions(Call):
    ignored = ("include_obfuscation",)

    include_usage: bool = False


class JsonSchema(Call):
    ignored = ("description", "strict")

    name: str = ""
    schema_: dict[str, Any] | bool = Field(True, alias="schema")


class ResponseFormat(Call):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with the type 'json_schema', and only with it")
        return self


class Decoding(Call):
    """How to decode: what both kinds of calls have in common. The second half are this engine's own options."""

    ignored = IGNORED
    refused = REFUSED

    model: str | None = None
    frequency_penalty: float = 0.0
    logit_bias: Bias = Field(default_factory=dict)
    max_tokens: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: Stop = ()  # type: ignore[assignment]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field(default_factory=list)
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    regex: str | None = None
    grammar: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    timeout: float | None = None


class CompletionCall(Decoding):
    unbounded = ("prompt",)

    prompt: Prompt
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None


class Message(Call):
    # What clients send back of a reply, and what has no meaning without tools.
    ignored = ("refusal", "annotations", "reasoning_content")
    refused = {"tool_calls": ([],), "function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class ChatCall(Decoding):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class TokenizeCall(Call):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


class DetokenizeCall(Call):
    unbounded = ("tokens",)

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What every error looks like."""

    error: Problem
