"""Bytes and text of single tokens."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine import Decoder
from engine.server.token_text import TokenText
from engine.tokenizer import Tokenizer


def test_bytes_of_a_byte_level_tokenizer(alone: Decoder) -> None:
    tokens, text = TokenText(alone.tokenizer), "déjà vu 中文 \u200d\n\t\x00'"
    ids = alone.tokenizer.encode(text)
    assert b"".join(tokens.bytes(token) for token in ids) == text.encode()
    assert tokens.legacy(alone.tokenizer.encode("é")[0]) in ("é", "bytes:\\xc3")
    for token in range(alone.tokenizer.vocab_size):
        if token != 0:  # the special one
            assert tokens.text(token) == alone.tokenizer._tokenizer.decode([token], skip_special_tokens=False)


def test_bytes_of_pieces_with_a_mark_for_spaces() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "cat": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "\u2581": 6}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = TokenText(Tokenizer(tokenizer))
    assert [tokens.bytes(token) for token in (1, 2, 3, 6)] == [b" the", b"cat", b"\xe2", b" "]
    assert b"".join(map(tokens.bytes, (3, 4, 5))).decode() == "€" and tokens.legacy(3) == "bytes:\\xe2" and tokens.text(3) == "\ufffd"
    assert tokens.bytes(99) == b""


def test_bytes_of_any_other_tokenizer() -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"one": 0, "zwei": 1}, unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenText(Tokenizer(tokenizer)).bytes(1) == b"zwei"
