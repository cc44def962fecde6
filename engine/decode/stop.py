"""Text as it settles, and where a request ends."""

from __future__ import annotations

from collections.abc import Callable

INCOMPLETE = "\ufffd"  # what tokenizers decode bytes to that are no whole character


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

    A tokenizer can only decode whole runs of ids: characters may span several tokens, and spaces depend on what stands before. So each new
    token is decoded together with the few before it, and what it adds to their text has settled unless it ends in an incomplete character.

    Args:
        decode: ids to text, incomplete characters as U+FFFD (``Tokenizer.decode``).
        stops: the request's stop strings.
        min_new_tokens: the text of so many tokens is not searched for them.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...], min_new_tokens: int = 0) -> None:
        self._decode = decode
        self._unsearched = min_new_tokens  # of the tokens to come
        self._matcher = StopMatcher(stops)
        self._settled: list[int] = []  # the last ids whose text has been given,
        self._pending: list[int] = []  # and those after them whose text has not
        self.text = ""  # all text emitted

    def feed(self, token: int) -> tuple[str, str | None]:
        """Settled text after one more token, and the stop string it completed, if any."""
        self._pending.append(token)
        self._unsearched -= 1
        piece = self._new_text()
        if not piece or piece.endswith(INCOMPLETE):
            return "", None
        self._settled, self._pending = self._pending, []
        return self._emit(piece, last=False)

    def anew(self) -> TextState:
        """A state at the beginning of other tokens, without stop strings."""
        return TextState(self._decode, ())

    def flush(self) -> tuple[str, str | None]:
        """The rest of the text when no more tokens follow; a stop string may yet appear in it."""
        return self._emit(self._new_text() if self._pending else "", last=True)

    def _new_text(self) -> str:
        return self._decode(self._settled + self._pending)[len(self._decode(self._settled)) :]

    def _emit(self, piece: str, *, last: bool) -> tuple[str, str | None]:
        text, stop = self._matcher.feed(piece) if self._unsearched < 0 else (piece, None)
        if last and stop is None:
            text += self._matcher.flush()
        self.text += text
        return text, stop
