"""From a call's prompts and options to requests: everything that can be refused is refused here, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .decode import beam_request
from .decode.controls import Controls
from .decode.grammar import Grammars, Matcher
from .decode.stop import TextState
from .models.config import ModelConfig
from .option_checks import check_int, check_number, check_text
from .params import BeamParams, SamplingParams, child_seed
from .request import Request
from .scheduler import Scheduler
from .tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256
_MOST_PRIORITY = 1_000_000


def build_requests(
    caller: str,
    token_lists: list[list[int]],
    params: SamplingParams | Sequence[SamplingParams] | None,
    options: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    scheduler: Scheduler,
    grammars: Grammars,
    *,
    can_draft: bool = False,
    beams_as_origin: bool = False,
) -> list[Request]:
    """One request per prompt and returned sequence, or per prompt and beam search, in order.

    Raises ``ValueError`` or ``TypeError`` naming what cannot be.
    """
    if params is not None and options:
        raise TypeError(f"{caller} got both params and {', '.join(options)}; give one or the other")
    one_for_all = params is None or isinstance(params, SamplingParams)
    if params is None:
        params = SamplingParams.from_options(caller, options)
    if not isinstance(params, (SamplingParams, Sequence)):
        raise TypeError(f"params is a {type(params).__name__}; it must be a SamplingParams or a list with one for each prompt")
    each = [params] * len(token_lists) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(token_lists) or not all(isinstance(p, SamplingParams) for p in each):
        raise ValueError(
            f"params is a list of {len(each)}; with {len(token_lists)} prompts it must be as many SamplingParams, or a single one"
        )
    requests: list[Request] = []
    for i, (tokens, p) in enumerate(zip(token_lists, each, strict=True)):
        if not can_draft and (p.speculative or p.num_assistant_tokens or p.verification != "replay"):
            raise ValueError(f"{_speculation(p)}, but this decoder has no drafter; use Decoder(model, draft=...)")
        seed = int(torch.randint(2**63 - 1, ()).item()) if p.seed is None else p.seed
        if p.seed is not None and one_for_all:
            seed = child_seed(seed, i)  # a seed that prompts share must not give them the same noise
        requests += _requests_of_prompt(i, tokens, p, seed, config, tokenizer, scheduler, grammars)
        if isinstance(p, BeamParams) and p.num_beams > 1:
            beam_request.begin(requests[-1], p, as_origin=beams_as_origin)
    return requests


def _requests_of_prompt(
    prompt_index: int,
    tokens: list[int],
    params: SamplingParams,
    seed: int,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    scheduler: Scheduler,
    grammars: Grammars,
) -> list[Request]:
    room = config.max_position - len(tokens)
    if room < 1:
        raise ValueError(
            f"prompt {prompt_index} has {len(tokens)} tokens; the model's length of {config.max_position} leaves room for none after it"
        )
    max_new_tokens = params.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
    if max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}; after the {len(tokens)} tokens of prompt {prompt_index} the model's length of "
            f"{config.max_position} allows {room}"
        )
    if params.min_new_tokens > max_new_tokens:
        raise ValueError(f"min_new_tokens is {params.min_new_tokens}; it must be at most max_new_tokens, which is {max_new_tokens} here")
    num_beams = params.num_beams if isinstance(params, BeamParams) else 1
    if num_beams > config.vocab_size:
        raise ValueError(f"num_beams is {num_beams}; it must be at most the model's vocabulary of {config.vocab_size}")
    if reason := scheduler.admissible(len(tokens), max_new_tokens, num_beams):
        raise ValueError(f"prompt {prompt_index}: {reason}")
    stop, eos = params.stop, params.eos_token_id
    # SamplingParams has made tuples of these, whatever it was given.
    assert isinstance(stop, tuple) and (eos is None or isinstance(eos, tuple))
    if stop and tokenizer is None:
        raise ValueError(f"stop is {stop!r}, but this decoder has no tokenizer; use stop_token_ids, or Decoder(model, tokenizer=...)")
    bad_words = _bad_words(params, tokenizer)
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("eos_token_id", eos or ()),
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("suppress_tokens", params.suppress_tokens),
        ("prefix_token_ids", params.prefix_token_ids),
        ("bad_words", [token for word in bad_words for token in word]),
    ):
        for token in ids:
            if token >= config.vocab_size:
                raise ValueError(f"{name} holds {token}; the model's vocabulary has ids 0 to {config.vocab_size - 1}")
    forbidden = {*params.suppress_tokens, *(token for token, bias in params.logit_bias.items() if bias == -math.inf)}
    if params.allowed_token_ids is not None and forbidden.issuperset(params.allowed_token_ids):
        raise ValueError(f"allowed_token_ids is {params.allowed_token_ids!r:.60}, all of which suppress_tokens or logit_bias forbid")
    if params.logprobs > config.vocab_size:
        raise ValueError(f"logprobs is {params.logprobs}; the model's vocabulary has only {config.vocab_size} tokens")
    ends = set(params.stop_token_ids)
    if not params.ignore_eos:
        ends.update(config.eos_token_ids if eos is None else eos)
    if (length := len(params.prefix_token_ids)) > max_new_tokens:
        raise ValueError(f"prefix_token_ids has {length} tokens; it must have at most max_new_tokens, which is {max_new_tokens} here")
    if early := ends.intersection(params.prefix_token_ids):
        raise ValueError(f"prefix_token_ids holds {min(early)}, which ends the output")
    controls = Controls(params, bad_words, ends, len(tokens), config.vocab_size)
    matcher = _matcher(params, grammars, ends, controls)
    return [
        Request(
            prompt=tokens,
            params=params,
            seed=seed,
            stream=params.stream + index,
            max_new_tokens=max_new_tokens,
            end_token_ids=frozenset(ends),
            prompt_index=prompt_index,
            index=index,
            text_state=None if tokenizer is None else TextState(tokenizer.decode, stop, params.min_new_tokens),
            controls=controls,
            matcher=None if matcher is None else matcher.copy(),
        )
        for index in range(params.num_return_sequences if num_beams == 1 else 1)
    ]


def check_terms(priority: Any, timeout: Any, cache_salt: Any) -> None:
    """Raise ``ValueError`` or ``TypeError`` for terms on which no call can be served (see ``Decoder.generate``)."""
    check_int("priority", priority, -_MOST_PRIORITY, _MOST_PRIORITY)
    if timeout is not None:
        allowed = "a number of seconds above 0, or None"
        check_number("timeout", timeout, allowed)
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be {allowed}")
    if cache_salt is not None:
        if not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt is a {type(cache_salt).__name__}; it must be a string or None")
        check_text("cache_salt", cache_salt)


def _speculation(params: SamplingParams) -> str:
    """The first option of speculative decoding that is given, with its value."""
    names = [name for name in ("speculative", "num_assistant_tokens") if getattr(params, name)] or ["verification"]
    return f"{names[0]} is {getattr(params, names[0])!r}"


def _bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """The ids of each bad word; of a string those it has as written and those it has after a space."""
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(word)
            continue
        if tokenizer is None:
            raise ValueError(
                f"bad_words holds {word!r}, but this decoder has no tokenizer; use token ids, or Decoder(model, tokenizer=...)"
            )
        for text in (word, " " + word):
            ids = tokenizer.encode_piece(text)
            if not ids:
                raise ValueError(f"bad_words holds {word!r}, which this decoder's tokenizer turns into no tokens")
            words.append(tuple(ids))
    return words


def _matcher(params: SamplingParams, grammars: Grammars, ends: set[int], controls: Controls) -> Matcher | None:
    """The matcher of the request's grammar at its beginning, where at least one token must be possible."""
    if params.structure is None:
        return None
    name, text = params.structure
    matcher = grammars.matcher(name, text, ends)
    if not bool(matcher.mask.any()):
        if matcher.complete:
            raise ValueError(f"{name} is {text!r:.60}, which only the empty text satisfies, and the request has no end token to end by")
        raise ValueError(f"{name} is {text!r:.60}, which cannot be used: no text can satisfy it")
    if controls.allowed is not None and not bool((matcher.mask & controls.allowed).any()):
        raise ValueError(f"{name} is {text!r:.60}, and no text of the allowed_token_ids can satisfy it")
    return matcher
