"""The text and the bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from ..tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """What single tokens stand for.

    A token may be part of a character, which a tokenizer alone decodes to U+FFFD. Its bytes are exact where the tokenizer's decoder is one
    of the usual two kinds (bytes as printable characters, or pieces with "▁" for spaces), else those of its text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = json.dumps(json.loads(tokenizer.to_json()).get("decoder"))
        self._byte_level = '"ByteLevel"' in kinds
        self._pieces = '"Metaspace"' in kinds or "\\u2581" in kinds

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self._tokenizer.vocabulary.items()}

    @functools.cached_property
    def longest(self) -> int:
        """No token stands for more characters: names have one for each character, or for each byte."""
        return max(map(len, self._names.values()), default=1)

    def bytes(self, token: int) -> bytes:
        name = self._names.get(token)
        if name is None:  # the model's vocabulary may be larger than its tokenizer's
            return b""
        if self._byte_level and all(c in _BYTE_OF for c in name):
            return bytes(_BYTE_OF[c] for c in name)
        if self._pieces:
            if match := _BYTE.fullmatch(name):
                return bytes([int(match[1], 16)])
            return name.replace("\u2581", " ").encode()
        return (self._tokenizer.decode([token]) or name).encode()

    def text(self, token: int) -> str:
        """As text, with U+FFFD for what is no whole character."""
        return self.bytes(token).decode("utf-8", "replace")

    def legacy(self, token: int) -> str:
        """As the older of OpenAI's two forms has it: text, or "bytes:" and the bytes of what is no whole character."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _bytes_of_characters() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write bytes with (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF: dict[str, Any] = _bytes_of_characters()
