"""``python -m engine serve``. Imports what the server needs only when it runs: the extra ``server`` may be absent."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .settings import Settings

if TYPE_CHECKING:
    from ..decoder import Decoder

KV_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; default: %(default)s, for this machine alone")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0: a free one, which is printed")
    parser.add_argument("--served-model-name", action="append", metavar="NAME", help="what clients call the model; repeatable")
    parser.add_argument("--api-key", action="append", metavar="KEY", help="ask for it; repeatable; default: ENGINE_API_KEY, or none")
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="let its pages call from browsers; repeatable")
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the model's own")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="of keys and values; default: bfloat16 for bfloat16 weights, else float32")
    parser.add_argument("--max-batch-size", type=int, metavar="N", help="most sequences decoded at once")
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="tokens that the KV cache holds; default: by the free memory")
    parser.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, help="share what prompts begin with; default: on")
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N", help="refuse calls while so many requests wait")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="refuse longer prompts")
    parser.add_argument("--max-body-bytes", type=int, default=Settings.max_body_bytes, metavar="N", help="default: %(default)s")
    parser.add_argument("--request-timeout", type=float, metavar="SECONDS", help="end requests after so long")
    parser.add_argument("--drain-timeout", type=float, default=30.0, metavar="SECONDS", help="let requests end so long before leaving")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="one line for each request")


def run(arguments: argparse.Namespace, make_decoder: Callable[..., Decoder]) -> int:
    """Serve until a signal comes; ``make_decoder(arguments, **options)`` loads the model."""
    try:
        from .main import serve
    except ImportError as error:
        raise ImportError(f"the server needs packages that cannot be imported ({error}); pip install 'decoding-engine[server]'") from None
    return serve(arguments, settings(arguments), lambda: make_decoder(arguments, **decoder_options(arguments)))


def decoder_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``Decoder`` gets of the options above; what is not given is left to it."""
    names = ("max_batch_size", "cache_tokens", "prefix_cache")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.kv_dtype:
        options["kv_dtype"] = getattr(torch, arguments.kv_dtype)
    return options


def settings(arguments: argparse.Namespace) -> Settings:
    for name, least in (("max_waiting", 1), ("max_body_bytes", 1), ("max_prompt_tokens", 1), ("request_timeout", 0), ("drain_timeout", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port is {arguments.port}; it must be from 0 to {2**16 - 1}")
    keys = arguments.api_key or [key for key in [os.environ.get("ENGINE_API_KEY", "")] if key]
    if not all(keys):
        raise ValueError("--api-key is empty; it must have at least one character")
    template = None
    if arguments.chat_template:
        template = Path(arguments.chat_template).read_text(encoding="utf-8")
    name = Path(arguments.model).name or arguments.model if arguments.model else "bundled"
    return Settings(
        model=tuple(arguments.served_model_name or [name]),
        api_keys=tuple(keys),
        cors_origins=tuple(arguments.cors_origin),
        chat_template=template,
        max_body_bytes=arguments.max_body_bytes,
        max_prompt_tokens=arguments.max_prompt_tokens,
        request_timeout=arguments.request_timeout or None,
    )
