"""Structured output: which tokens may follow so that the text stays within a JSON schema, regular expression or grammar (llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokenizer import Tokenizer
from .controls import token_mask

if TYPE_CHECKING:
    import llguidance

# Between the parts of JSON: one space, or a line break and its indentation. Left free, a model may go on with whitespace for ever.
JSON_WHITESPACE = r" |\n[ \t]{0,40}"
_CACHED = 32  # compiled grammars kept


class GrammarError(ValueError):
    """A grammar that cannot be used, as one sentence without its subject."""


class Matcher:
    """Where one request's output stands in its grammar. Masks are int32 ``[ceil(V / 32)]``: one bit for each token.

    Args:
        matcher: the library's, at the beginning.
        ends: the tokens that may follow a complete output.
        no_text: what the library allows besides text: the tokens that it takes for the end, and ids past the vocabulary.
        width: of the library's own masks, in words.

    Attributes:
        mask: the tokens that may come next.
        complete: the output is complete and no text may follow.
    """

    def __init__(self, matcher: llguidance.LLMatcher, ends: Tensor, no_text: Tensor, width: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self._no_text = no_text
        self._buffer = torch.empty(width, dtype=torch.int32)
        self._num_consumed = 0
        self._update()

    def copy(self) -> Matcher:
        """Another request's matcher at the same place."""
        twin = object.__new__(Matcher)
        twin.__dict__.update(self.__dict__)
        twin._matcher, twin._buffer = self._matcher.deep_copy(), self._buffer.clone()
        return twin

    def advance(self, tokens: list[int], num_prompt_tokens: int) -> None:
        """Take in what has not been taken in yet of a request's whole ``tokens``; ``GrammarError`` where that cannot be."""
        for token in tokens[num_prompt_tokens + self._num_consumed :]:
            if not self._matcher.consume_token(token):
                raise GrammarError(_one_line(self._matcher.get_error()))
            self._num_consumed += 1
        self._update()

    def _update(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._buffer.data_ptr(), self._buffer.numel() * 4)
        if self._matcher.is_error():
            raise GrammarError(_one_line(self._matcher.get_error()))
        text = self._buffer[: len(self._ends)] & ~self._no_text
        accepting = self._matcher.is_accepting()
        self.complete = accepting and not bool(text.any())
        self.mask = text | self._ends if accepting else text


class Grammars:
    """Compiles grammars for one decoder's tokenizer and vocabulary; the tokenizer is prepared when the first is asked for.

    Args:
        tokenizer: the decoder's, or None if it has none.
        vocab_size: V of the model.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compile = functools.lru_cache(maxsize=_CACHED)(self._compile_anew)

    def matcher(self, name: str, text: str, end_token_ids: Iterable[int]) -> Matcher:
        """A matcher at the beginning of ``text``, the value of the option ``name`` (one of ``params.GRAMMARS``).

        A complete output may be followed by any of ``end_token_ids``. Raises ``ValueError`` for what cannot be, ``ImportError`` without
        llguidance.
        """
        if self._tokenizer is None:
            raise ValueError(
                f"{name} is given, but this decoder has no tokenizer to hold text against it; use Decoder(model, tokenizer=...)"
            )
        try:
            import llguidance  # noqa: F401  an optional dependency
        except ImportError as error:
            raise ImportError(f"{name} needs the package llguidance, which cannot be imported ({error}); pip install llguidance") from None
        try:
            tokens = self._tokens
            padded = -(-self._vocab_size // 32) * 32
            no_text = token_mask({*range(self._vocab_size, padded), *(t for t in tokens.eos_tokens if t < padded)}, self._vocab_size)
            ends = token_mask(end_token_ids, self._vocab_size)
            return Matcher(self._compile(name, text).deep_copy(), ends, no_text, -(-tokens.vocab_size // 32))
        except GrammarError as error:
            raise ValueError(f"{name} is {text!r:.60}, which cannot be used: {error}") from None

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        import llguidance

        assert self._tokenizer is not None
        try:
            return llguidance.LLTokenizer(
                self._tokenizer.to_json(),
                n_vocab=max(self._vocab_size, self._tokenizer.vocab_size),
                eos_token=list(self._eos_token_ids) or None,
            )
        except Exception as error:  # the library raises what it likes
            raise GrammarError(f"llguidance cannot use this decoder's tokenizer: {_one_line(str(error))}") from None

    def _compile_anew(self, name: str, text: str) -> llguidance.LLMatcher:
        import llguidance
        from llguidance import LLMatcher

        if name == "json_schema":
            whitespace = {} if "x-guidance" in json.loads(text) else {"whitespace_pattern": JSON_WHITESPACE}
            try:
                text = LLMatcher.grammar_from_json_schema(text, defaults=whitespace)  # type: ignore[arg-type]
            except ValueError as error:
                raise GrammarError(_one_line(str(error))) from None
        else:
            text = LLMatcher.grammar_from_regex(text) if name == "regex" else LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(self._tokens, text, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise GrammarError(_one_line(matcher.get_error()))
        return matcher


def _one_line(reason: str) -> str:
    """The library's reason without its marks, on one line."""
    reason = " ".join(reason.replace("<non-verbose/>", "").split())[:300]
    return "no text can satisfy it" if reason == "NoExtensionBias" else reason
