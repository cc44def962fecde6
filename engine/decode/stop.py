"""Text as it settles, and where a request ends."""

from __future__ import annotations

from collections.abc import Callable


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, holding back what could still become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Text that is now certain not to be part of a stop string, and the stop string if one is complete (then nothing more follows)."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # The earliest to begin; of several beginning there the longest, so that the result does not depend on their order.
            at, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[:at], stop
        keep = next((n for n in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)

    def flush(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held


class TextState:
    """Turns one request's tokens into settled text.

    Args:
        step: takes a token id, returns the text it settles or None while a character is incomplete (``Tokenizer.stream_decoder``).
        decode: all ids to text, for the bytes still incomplete at the end.
        stops: the request's stop strings.
    """

    def __init__(self, step: Callable[[int], str | None], decode: Callable[[list[int]], str], stops: tuple[str, ...]) -> None:
        self._step = step
        self._decode = decode
        self._matcher = StopMatcher(stops)
        self._ids: list[int] = []
        self._decoded = ""  # all text the decoder has given
        self.text = ""  # all text emitted

    def feed(self, token: int) -> tuple[str, str | None]:
        """Settled text after one more token, and the stop string it completed, if any."""
        self._ids.append(token)
        piece = self._step(token) or ""
        self._decoded += piece
        settled, stop = self._matcher.feed(piece)
        self.text += settled
        return settled, stop

    def flush(self) -> tuple[str, str | None]:
        """The rest of the text when no more tokens follow; a stop string may yet appear in it."""
        whole = self._decode(self._ids)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        settled, stop = self._matcher.feed(rest)
        if stop is None:
            settled += self._matcher.flush()
        self.text += settled
        return settled, stop
