"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers


class Tokenizer:
    """A tokenizer from a ``tokenizer.json`` (or its folder), a ``tokenizers.Tokenizer`` or a fast tokenizer of transformers.

    Attributes:
        folder: where its file is; None: it has none.
    """

    def __init__(self, source: Any) -> None:
        self.folder: Path | None = None
        if isinstance(source, tokenizers.Tokenizer):
            self._tokenizer = source
        elif isinstance(getattr(source, "backend_tokenizer", None), tokenizers.Tokenizer):
            self._tokenizer = source.backend_tokenizer
        elif isinstance(source, (str, Path)):
            path = Path(source)
            path = path / "tokenizer.json" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(f"tokenizer {str(source)!r} not found: there is no file {path}")
            self.folder = path.parent
            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"tokenizer file {path} cannot be read: {error}") from None
        else:
            raise TypeError(
                f"tokenizer is a {type(source).__name__}; it must be a path, a tokenizers.Tokenizer or a fast transformers tokenizer"
            )
        if self._tokenizer.padding is not None or self._tokenizer.truncation is not None:
            # Prompts are never padded or cut here, whatever the file asks for; the caller's own object keeps its settings.
            self._tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        self._texts: dict[int, str] = {}  # of single tokens that were asked for

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's text, in the tokenizer's own form, with its id."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens the tokenizer's own file adds."""
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError("prompts holds text with a lone surrogate, which is not Unicode text; decode bytes as UTF-8 first")
        return self._tokenizer.encode(text).ids

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def to_json(self) -> str:
        """All of it, as in a ``tokenizer.json``."""
        text: str = self._tokenizer.to_str()
        return text

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        if len(ids) != 1:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        # Every token that is drawn is decoded after the one before it, which is asked for alone (decode.stop).
        text = self._texts.get(ids[0])
        if text is None:
            text = self._texts[ids[0]] = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
