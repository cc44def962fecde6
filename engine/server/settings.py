"""What a server allows and how it is called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Attributes:
    model: the name under which clients ask for the model; the first of several is the one that replies carry.
    api_keys: a call must bear one of these; empty: none is asked for.
    cors_origins: origins whose pages may call the server from a browser; empty: only its own.
    chat_template: a Jinja template instead of the model's own.
    max_body_bytes: longest request body.
    body_timeout: seconds within which a request's body must have arrived.
    head_timeout: likewise for its head, from the moment that the connection is there or the head begins.
    write_timeout: seconds after which a connection is cut whose client reads nothing of what waits for it.
    max_prompts: most prompts in one call.
    max_sequences: most sequences in one call: prompts times ``n``, ``best_of`` or beams.
    max_stop, max_stop_length: most stop strings of a call, and most characters of each.
    max_logit_bias: most tokens with a bias, and most stop token ids.
    max_logprobs: most alternatives for each token.
    max_priority: largest priority, and -1 times the smallest: a minute of waiting each.
    max_connections: most connections at once; further ones are cut.
    max_prompt_tokens: longest prompt; None: as long as the model and the cache allow.
    request_timeout: seconds after which a request is ended whose call gives no shorter ``timeout``; None: never.
    """

    model: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    max_body_bytes: int = 4 * 2**20
    body_timeout: float = 30.0
    head_timeout: float = 30.0
    write_timeout: float = 60.0
    max_prompts: int = 64
    max_sequences: int = 256
    max_stop: int = 16
    max_stop_length: int = 1000
    max_logit_bias: int = 1024
    max_logprobs: int = 20
    max_priority: int = 10
    max_connections: int = 1000
    max_prompt_tokens: int | None = None
    request_timeout: float | None = None
