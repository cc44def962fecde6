"""Chat templates: messages to the text that a model was trained to answer."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 16 * 2**20  # characters that a template may write

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatError(ValueError):
    """Messages that cannot be made into a prompt, as one sentence."""


class _Generation(Extension):
    """``{% generation %}`` marks for trainers what the model wrote; here it is its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template of the kind that Hugging Face folders hold, run in a sandbox.

    Args:
        source: Jinja.
        special_tokens: by their names, as in ``bos_token``; templates write them themselves.

    Raises ``ValueError`` for a template that is not Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be used: {error}") from None
        self._special_tokens = special_tokens or {}

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any] = MappingProxyType({})) -> str:
        """The prompt, special tokens included, up to where the assistant's answer begins; ``options`` are further variables of it."""
        given = {**self._special_tokens, "add_generation_prompt": True, "tools": None, "documents": None, **options, "messages": messages}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise ChatError(f"the chat template writes more than {MAX_TEXT} characters")
        except ChatError:
            raise
        except Exception as error:  # a template can fail in any way at messages that it is not made for
            raise ChatError(f"the chat template refuses these messages: {' '.join(str(error).split())[:300]}") from None
        return "".join(pieces)


def load_template(folder: Path | None, source: str | None = None) -> ChatTemplate | None:
    """The template in a model's folder, or of ``source`` with that folder's special tokens; None: there is none.

    A folder's ``chat_template.jinja`` goes before the entry of ``tokenizer_config.json``, where of several the one called "default" counts.
    """
    config: dict[str, Any] = {}
    if folder is not None and (path := folder / "tokenizer_config.json").is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    if source is None and folder is not None and (path := folder / "chat_template.jinja").is_file():
        source = path.read_text(encoding="utf-8")
    if source is None:
        source = config.get("chat_template")
        if isinstance(source, list):
            source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if source is None:
        return None
    special = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return ChatTemplate(source, special)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise ChatError(message)
