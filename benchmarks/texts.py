"""Prompts from held-out source files of the bundled model, as its tokens."""

from __future__ import annotations

import keyword

from bundled_corpus import read_sources

from engine import Decoder

LENGTHS = (128, 256, 384, 512)  # of prompts that are continued


class Texts:
    """Held-out source files of the bundled model, as tokens."""

    def __init__(self) -> None:
        tokenizer = Decoder.bundled(cache_tokens=64).tokenizer
        assert tokenizer is not None
        self.files = [tokenizer.encode(source.text) for source in read_sources() if source.held_out]
        words = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
        self.names = [token for token, word in words.items() if len(word) >= 4 and word.isidentifier() and not keyword.iskeyword(word)]

    def pieces(self, length: int, count: int) -> list[list[int]]:
        """``count`` pieces of so many tokens, no two of which overlap, spread over the files."""
        by_file = [[file[at : at + length] for at in range(0, len(file) - length, length)] for file in self.files]
        turns = [file[i] for i in range(max(map(len, by_file))) for file in by_file if i < len(file)]
        assert len(turns) >= count
        return turns[:count]

    def prompts(self, count: int) -> list[list[int]]:
        """To be continued: pieces of all LENGTHS in turn."""
        longest = self.pieces(max(LENGTHS), count)
        return [piece[: LENGTHS[i % len(LENGTHS)]] for i, piece in enumerate(longest)]

    def renamed(self, count: int) -> dict[int, int]:
        """The identifiers that occur most often, and rare ones for them."""
        counts = dict.fromkeys(self.names, 0)
        for file in self.files:
            for token in file:
                if token in counts:
                    counts[token] += 1
        ranked = sorted(counts, key=lambda token: -counts[token])
        return dict(zip(ranked[:count], ranked[::-1], strict=False))
