"""What the options of a request ask of the sampler, in the kernel's form, prepared once at admission."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..params import SamplingParams
from ..request import Request


class Controls:
    """The options of one prompt; its ``num_return_sequences`` requests share them.

    Args:
        params: the options.
        bad_words: the ids of each of ``params.bad_words``.
        end_token_ids: what may not be drawn before ``min_new_tokens``.
        num_prompt_tokens: where the output begins.
        vocab_size: V.
    """

    def __init__(
        self,
        params: SamplingParams,
        bad_words: Iterable[Sequence[int]],
        end_token_ids: Iterable[int],
        num_prompt_tokens: int,
        vocab_size: int,
    ) -> None:
        self.temperature = params.draw_temperature
        self.top_k = params.draw_top_k
        self.top_p = 1.0 if params.top_p is None else float(params.top_p)
        self.min_p = 0.0 if params.min_p is None else float(params.min_p)
        self.repetition = float(params.repetition_penalty)
        self.presence = float(params.presence_penalty)
        self.frequency = float(params.frequency_penalty)
        self.min_position = num_prompt_tokens + params.min_new_tokens
        self.end_tokens = array("i", sorted(end_token_ids))
        self.allowed = None if params.allowed_token_ids is None else token_mask(params.allowed_token_ids, vocab_size)

        self.processors = params.logits_processor
        assert isinstance(self.processors, tuple)  # SamplingParams has made one of what it was given

        self._bias = {**params.logit_bias, **dict.fromkeys(params.suppress_tokens, -math.inf)}
        # By the last but one of a word's ids: those before its last, and the last.
        self._words: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *before, last in bad_words:
            if before:
                self._words[before[-1]].append((before, last))
            else:
                self._bias[last] = -math.inf
        self._bias_columns = array("i", self._bias), array("f", self._bias.values())

    def bias(self, tokens: list[int]) -> tuple[array[int], array[float]]:
        """Distinct ids and what is added to their logits after ``tokens``."""
        banned = {
            last
            for before, last in self._words.get(tokens[-1], ())
            if self._bias.get(last) != -math.inf and tokens[-len(before) :] == before
        }
        if not banned:
            return self._bias_columns
        bias = {**self._bias, **dict.fromkeys(banned, -math.inf)}
        return array("i", bias), array("f", bias.values())


def token_mask(token_ids: Iterable[int], vocab_size: int) -> Tensor:
    """The bits of these tokens, int32 ``[ceil(V / 32)]``."""
    allowed = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.bool)
    allowed[torch.tensor(list(token_ids), dtype=torch.int64)] = True
    words = (allowed.view(-1, 32).long() << torch.arange(32)).sum(dim=1)
    return words.to(torch.int32)  # keeps the low 32 bits


def forbidding(request: Request) -> list[str]:
    """The options of a request that may rule tokens out at its next position."""
    params = request.params
    words: dict[str, bool] = {
        "logits_processor": bool(params.logits_processor),
        "logit_bias": -math.inf in params.logit_bias.values(),
        "suppress_tokens": bool(params.suppress_tokens),
        "bad_words": bool(params.bad_words),
        "min_new_tokens": request.num_new_tokens < params.min_new_tokens and bool(request.end_token_ids),
        "allowed_token_ids": params.allowed_token_ids is not None,
    }
    return [name for name, given in words.items() if given] + ([params.structure[0]] if params.structure else [])
