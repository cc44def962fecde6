"""What callers may pass as prompts, turned into lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tokenizer import Tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor

_ALLOWED = "a string, a list of strings, a list of token ids or of such lists, or an integer tensor [B, T]"


def to_token_lists(prompts: Prompts, attention_mask: Tensor | None, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """Token ids of every prompt, without padding.

    Args:
        prompts: see ``_ALLOWED``; a tensor may also be ``[T]``.
        attention_mask: for a tensor only, of its shape; positions where it is 0 are padding, on whichever side.
    """
    if attention_mask is not None and not isinstance(prompts, Tensor):
        raise TypeError(f"attention_mask goes with a tensor of prompts; prompts is a {type(prompts).__name__}")
    if isinstance(prompts, np.ndarray):
        prompts = torch.from_numpy(prompts)
    if isinstance(prompts, Tensor):
        token_lists = _from_tensor(prompts, attention_mask)
    elif isinstance(prompts, str):
        token_lists = [_encode(prompts, tokenizer)]
    elif isinstance(prompts, Sequence) and not isinstance(prompts, (bytes, bytearray, memoryview)):
        if not prompts:
            raise ValueError("prompts is an empty list; it must hold at least one prompt")
        if all(_is_token(item) for item in prompts):
            token_lists = [[int(token) for token in prompts]]  # type: ignore[arg-type]
        else:
            token_lists = [_from_item(index, item, tokenizer) for index, item in enumerate(prompts)]
    else:
        raise TypeError(f"prompts is a {type(prompts).__name__}; it must be {_ALLOWED}")
    for index, tokens in enumerate(token_lists):
        if not tokens:
            raise ValueError(f"prompt {index} is empty; a prompt must have at least one token")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"prompt {index} holds token id {bad}; the model's vocabulary has ids 0 to {vocab_size - 1}")
    return token_lists


def _is_token(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _from_item(index: int, item: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(item, str):
        return _encode(item, tokenizer)
    if isinstance(item, Tensor) and item.dim() == 1:
        return _from_tensor(item, None)[0]
    listed = isinstance(item, (Sequence, np.ndarray)) and not isinstance(item, (bytes, bytearray, memoryview))
    if listed and all(_is_token(token) for token in item):
        return [int(token) for token in item]
    raise TypeError(f"prompt {index} is {item!r:.60}; prompts must be {_ALLOWED}")


def _encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise ValueError("prompts holds text, but this decoder has no tokenizer: pass token ids, or Decoder(model, tokenizer=...)")
    return tokenizer.encode(text)


def _from_tensor(prompts: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if prompts.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"prompts is a tensor of {prompts.dtype}; token ids must be integers, as in torch.int64")
    if prompts.dim() not in (1, 2) or prompts.numel() == 0:
        raise ValueError(f"prompts is a tensor of shape {list(prompts.shape)}; it must be [B, T] or [T] with at least one token")
    if attention_mask is None:
        return torch.atleast_2d(prompts).tolist()
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; it must be a tensor of the shape of prompts")
    if attention_mask.shape != prompts.shape:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; it must have that of prompts, {list(prompts.shape)}")
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask holds values other than 0 and 1")
    rows = zip(torch.atleast_2d(prompts), torch.atleast_2d(attention_mask), strict=True)
    return [row[mask > 0].tolist() for row, mask in rows]
