"""What the options of a request ask of the sampler, in the kernel's form, prepared once at admission."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels import GREEDY_BELOW
from ..params import SamplingParams
from ..request import TokenSequence


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
        self.greedy = self.temperature < GREEDY_BELOW
        self.top_k = params.draw_top_k
        self.top_p = 1.0 if params.top_p is None else float(params.top_p)
        self.min_p = 0.0 if params.min_p is None else float(params.min_p)
        self.repetition = float(params.repetition_penalty)
        self.presence = float(params.presence_penalty)
        self.frequency = float(params.frequency_penalty)
        self.min_position = num_prompt_tokens + params.min_new_tokens
        self.end_tokens = array("i", sorted(end_token_ids))
        self.allowed = None if params.allowed_token_ids is None else token_mask(params.allowed_token_ids, vocab_size)
        self._prefix = [token_mask([token], vocab_size) for token in params.prefix_token_ids]

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
        self._ngram_size = params.no_repeat_ngram_size
        self._unrestricted = not (self._bias or self._words) and self._ngram_size is None and self.allowed is None
        self._settled = max(self.min_position, num_prompt_tokens + len(self._prefix))  # from here on the position makes no difference

    def is_bare(self, sequence: TokenSequence) -> bool:
        """Whether there is no list, and no mask, for a sequence of these options, nor will there be one (``rows.lists``)."""
        settled = self._unrestricted and sequence.num_tokens >= self._settled
        return settled and sequence.history is None and sequence.matcher is None

    @property
    def unfiltered(self) -> bool:
        """Whether every token may be drawn, or filters make no difference (greedy)."""
        return self.greedy or (self.top_k <= 0 and self.top_p >= 1.0 and self.min_p == 0.0)

    def bias(self, sequence: TokenSequence, penalised: Mapping[int, float]) -> tuple[array[int], array[float]]:
        """Distinct ids and what is added to their next logits; ``penalised``: what is subtracted from some besides."""
        banned: set[int] = set()
        if self._words:
            tokens = sequence.tokens
            banned |= {last for before, last in self._words.get(tokens[-1], ()) if tokens[-len(before) :] == before}
        if self._ngram_size is not None:
            banned |= ngram_ends(sequence.tokens, self._ngram_size)
        if not banned and not penalised:
            return self._bias_columns
        bias = dict(self._bias)
        for token, penalty in penalised.items():
            bias[token] = bias.get(token, 0.0) - penalty
        bias |= dict.fromkeys(banned, -math.inf)
        return array("i", bias), array("f", bias.values())

    def allowed_next(self, num_new_tokens: int) -> Tensor | None:
        """The bits of the tokens that may come after so many new ones, int32 ``[ceil(V / 32)]``; None: all."""
        if num_new_tokens >= len(self._prefix):
            return self.allowed
        forced = self._prefix[num_new_tokens]
        return forced if self.allowed is None else forced & self.allowed

    @property
    def plain(self) -> bool:
        """Nothing changes the log-probabilities of the model, but to -inf."""
        neutral = (self.temperature, self.repetition, self.presence, self.frequency) == (1.0, 1.0, 0.0, 0.0)
        return neutral and self.top_k == 0 and not self.processors and all(bias == -math.inf for bias in self._bias.values())


def ngram_ends(tokens: list[int], size: int) -> set[int]:
    """The tokens that after ``tokens`` would complete a run of ``size`` that they hold already."""
    if size == 1:
        return set(tokens)
    before = tokens[len(tokens) - size + 1 :] if len(tokens) >= size else [-1]
    ends: set[int] = set()
    at = size - 2
    while True:
        try:
            at = tokens.index(before[-1], at, len(tokens) - 1)
        except ValueError:
            return ends
        if tokens[at - size + 2 : at + 1] == before:
            ends.add(tokens[at + 1])
        at += 1


def token_mask(token_ids: Iterable[int], vocab_size: int) -> Tensor:
    """The bits of these tokens, int32 ``[ceil(V / 32)]``."""
    allowed = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.bool)
    allowed[torch.tensor(list(token_ids), dtype=torch.int64)] = True
    words = (allowed.view(-1, 32).long() << torch.arange(32)).sum(dim=1)
    return words.to(torch.int32)  # keeps the low 32 bits


def forbidding(request: TokenSequence) -> list[str]:
    """The options of a request that may rule tokens out at its next position."""
    params = request.params
    words: dict[str, bool] = {
        "logits_processor": bool(params.logits_processor),
        "logit_bias": -math.inf in params.logit_bias.values(),
        "suppress_tokens": bool(params.suppress_tokens),
        "bad_words": bool(params.bad_words),
        "min_new_tokens": request.num_new_tokens < params.min_new_tokens and bool(request.end_token_ids),
        "allowed_token_ids": params.allowed_token_ids is not None,
        "no_repeat_ngram_size": params.no_repeat_ngram_size is not None,
        "prefix_token_ids": request.num_new_tokens < len(params.prefix_token_ids),
    }
    return [name for name, given in words.items() if given] + ([params.structure[0]] if params.structure else [])
