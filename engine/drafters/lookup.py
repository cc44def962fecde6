"""Drafts copied from text that is there already: no model, no training, some microseconds each.

``PromptLookup`` copies what followed the last few tokens where they stood before in prompt and output (prompt lookup decoding, Saxena
2023). ``SuffixLookup`` looks for the longest earlier match there and in the outputs of requests that have finished, and lets its
occurrences vote (SuffixDecoding, Oliaro et al. 2024). A copy that reaches the last token goes on with what it has copied itself, so that a
repetition is continued for as long as is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..option_checks import check_int, check_range
from ..request import Request
from .draft import Draft

BETWEEN = -1  # stands between the outputs in the store; no token
MAX_MATCH = 32  # a longer match is not told from one of this length
# A match of m tokens is trusted as if DOUBT / m more occurrences had gone on otherwise. Fits code that is written, not copied: one
# occurrence of 1, 2, 4, 8, 16 tokens went on as before in 20, 36, 53, 74 and 87 % of the cases.
DOUBT = 3.5


def confidence(votes: int, occurrences: int, match: int) -> float:
    """How likely a token is that follows ``votes`` of the ``occurrences`` of a match of so many tokens."""
    return votes / (occurrences + DOUBT / match)


class Occurrences:
    """Where each n-gram of a list of tokens ends, for a few n.

    Args:
        tokens: the list; it grows at its end, and may be cut at its beginning by ``forget``.
        sizes: the n, longest first.

    An n-gram is entered when a token has followed it, so that the list's own end is not found. Places count from the first token that the
    list ever had.
    """

    def __init__(self, tokens: list[int], sizes: Sequence[int]) -> None:
        self.tokens = tokens
        self.first = 0  # the place of tokens[0]
        self._latest: dict[int, int] = {}  # hash of an n-gram -> the place after its latest occurrence
        self._earlier: dict[int, list[int]] = {n: [] for n in sizes}  # for each place: that of the occurrence before; -1: none

    def update(self) -> None:
        """Take in the tokens that have been appended: O(1) for each."""
        tokens, latest, first = self.tokens, self._latest, self.first
        for n, earlier in self._earlier.items():
            for end in range(len(earlier), len(tokens)):
                if end < n:
                    earlier.append(-1)
                    continue
                gram = hash(tuple(tokens[end - n : end]))
                earlier.append(latest.get(gram, -1))
                latest[gram] = first + end

    def find(self, context: Sequence[int], n: int, most: int) -> Iterator[int]:
        """The indices into ``tokens`` after the last ``most`` occurrences of the last n of ``context``, latest first."""
        tokens, earlier, first = self.tokens, self._earlier[n], self.first
        wanted = list(context[-n:])
        if len(wanted) < n:
            return
        place = self._latest.get(hash(tuple(wanted)), -1)
        while place >= first and most > 0:
            end = place - first
            if end >= n and tokens[end - n : end] == wanted:  # it may be cut off, and hashes may collide
                yield end
            most -= 1
            place = earlier[end]

    def forget(self, count: int) -> None:
        """Drop the first ``count`` tokens."""
        for n, earlier in self._earlier.items():
            for end in range(n, min(count + n, len(earlier))):
                gram = hash(tuple(self.tokens[end - n : end]))
                if self._latest.get(gram, -1) == self.first + end:
                    del self._latest[gram]
            del earlier[:count]
        del self.tokens[:count]
        self.first += count


def match_length(tokens: Sequence[int], end: int, context: Sequence[int], known: int) -> int:
    """How many tokens before ``end`` are those at the end of ``context``; ``known`` of them are for certain."""
    most = min(MAX_MATCH, end, len(context))
    last = len(context) - 1
    while known < most and tokens[end - 1 - known] == context[last - known]:
        known += 1
    return known


def copied(tokens: list[int], begin: int, count: int) -> list[int]:
    """``count`` tokens from ``begin`` on; past the end of the list it goes on with what it has copied."""
    copy = tokens[begin : begin + count]
    return copy if len(copy) == count else (copy * (count // len(copy) + 1))[:count]


class PromptLookup:
    """Drafts what followed the latest earlier occurrence of a request's last n tokens in its own prompt and output.

    Args:
        max_ngram: the longest n, which is tried first.
        min_ngram: the shortest. 1 drafts nearly always and is wrong nearly as often.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2) -> None:
        check_int("max_ngram", max_ngram, 1, MAX_MATCH)
        check_int("min_ngram", min_ngram, 1, max_ngram)
        self._sizes = tuple(range(max_ngram, min_ngram - 1, -1))
        self._seen: dict[Request, Occurrences] = {}

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        return [self._draft(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def release(self, request: Request) -> None:
        self._seen.pop(request, None)

    def _draft(self, request: Request, limit: int) -> Draft:
        tokens = request.tokens
        seen = self._seen.get(request)
        if seen is None:
            seen = self._seen[request] = Occurrences(tokens, self._sizes)
        seen.update()
        for n in self._sizes:
            for end in seen.find(tokens, n, 1):
                match = match_length(tokens, end, tokens, n)
                return Draft.chain(copied(tokens, end, limit), [confidence(1, 1, match + i) for i in range(limit)])
        return Draft()


class SuffixLookup:
    """Drafts what followed the longest earlier match of a request's last tokens, in its own prompt and output and in the outputs of
    requests that have finished, by a vote of the latest occurrences.

    Args:
        store_tokens: most tokens of finished requests that are kept, at about 300 bytes each; the oldest are dropped first. 0 keeps none.
        min_match: the shortest match that counts.
        min_probability: a draft ends where the product of the shares of the votes falls below this.
        length_factor: a draft has at most so many times the tokens of its match.
    """

    SIZES = (8, 4, 2)  # n-grams that are looked up, with one of `min_match`; between them a match is measured token by token
    MAX_OCCURRENCES = 8

    def __init__(self, store_tokens: int = 65_536, min_match: int = 2, min_probability: float = 0.1, length_factor: float = 8.0) -> None:
        check_int("store_tokens", store_tokens, 0)
        check_int("min_match", min_match, 1, MAX_MATCH)
        check_range("min_probability", min_probability, 0, 1, required=True)
        check_range("length_factor", length_factor, 0, 64, above=True, required=True)
        self._store_tokens = store_tokens
        self._sizes = (*(n for n in self.SIZES if n > min_match), min_match)
        self._min_probability = min_probability
        self._length_factor = length_factor
        self._seen: dict[Request, Occurrences] = {}
        self._store = Occurrences([], self._sizes)

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        return [self._draft(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def release(self, request: Request) -> None:
        """Forget a request. If it has finished, its output is kept for others."""
        self._seen.pop(request, None)
        if request.finished and request.num_new_tokens and self._store_tokens:
            # With the end of the prompt, by which the output's beginning is found.
            text = [BETWEEN, *request.tokens[max(0, len(request.prompt) - MAX_MATCH) :]][-self._store_tokens :]
            store = self._store
            store.forget(max(0, len(store.tokens) + len(text) - self._store_tokens))
            store.tokens += text
            store.update()

    def _draft(self, request: Request, limit: int) -> Draft:
        tokens = request.tokens
        seen = self._seen.get(request)
        if seen is None:
            seen = self._seen[request] = Occurrences(tokens, self._sizes)
        seen.update()
        match, own, stored = self._longest(seen)
        limit = min(limit, max(1, int(self._length_factor * match)))
        following = [copied(tokens, end, limit) for end in own]
        for end in stored:
            text = self._store.tokens[end : end + limit]
            following.append(text + [BETWEEN] * (limit - len(text)))
        return self._vote(following, match) if following else Draft()

    def _longest(self, seen: Occurrences) -> tuple[int, list[int], list[int]]:
        """The length of the longest match, and where its occurrences end in the request's tokens and in the store."""
        context = seen.tokens
        for n in self._sizes:
            match = 0
            ends: tuple[list[int], list[int]] = ([], [])
            for where, found in zip((seen, self._store), ends, strict=True):
                for end in where.find(context, n, self.MAX_OCCURRENCES):
                    length = match_length(where.tokens, end, context, n)
                    if length > match:
                        match = length
                        ends[0].clear()
                        ends[1].clear()
                    if length == match:
                        found.append(end)
            if match:
                return match, *ends
        return 0, [], []

    def _vote(self, following: list[list[int]], match: int) -> Draft:
        """What most of the occurrences go on with, token after token; of equally many the latest."""
        drafted: list[int] = []
        trust: list[float] = []
        product = 1.0
        for i in range(len(following[0])):
            column = [text[i] for text in following]
            chosen = column[0]
            votes = column.count(chosen)
            if votes < len(column):
                chosen = max(column, key=column.count)
                votes = column.count(chosen)
                following = [text for text in following if text[i] == chosen]
            product *= votes / len(column)
            if chosen == BETWEEN or product < self._min_probability:
                break
            drafted.append(chosen)
            trust.append(confidence(votes, len(column), match + i))
        return Draft.chain(drafted, trust)
