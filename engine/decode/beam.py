"""Who goes on in a beam search, what has finished, and when it ends: in Python's numbers, float32 where transformers computes so."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..outputs import FinishReason
from ..request import Beam, Drawn


class Candidate(NamedTuple):
    """A beam with one more token."""

    parent: Beam
    drawn: Drawn
    score: float  # of the beam with it, float32
    rank: float  # what candidates are compared by: the score, or with noise
    matcher: Any = None  # decode.grammar.Matcher after the token, once ``end_of`` has looked at it


class Finished(NamedTuple):
    """A sequence that has ended."""

    score: float  # what it is ranked by among the finished
    beam_score: float
    drawn: list[Drawn]
    reason: FinishReason
    stop_reason: int | str | None


# The end of a candidate, (finish reason, stop reason), or None if it can go on; and the candidate, its matcher advanced.
EndOf = Callable[[Candidate], tuple[Candidate, tuple[FinishReason, int | None] | None]]


def float32(x: float) -> float:
    """``x`` rounded. Of float32 numbers a sum or quotient rounded like this is the float32 operation's."""
    return ctypes.c_float(x).value


def mix(key: int, token: int) -> int:
    """The noise key of a beam with one more token: SplitMix64's step and mixing (Steele et al. 2014) on key and token."""
    mask = 2**64 - 1
    z = (key + (token + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def noise_stream(beam: Beam) -> int:
    """The stream of the token law that a stochastic beam draws from: 31 bits of the request's stream and the beam's new tokens."""
    return mix(beam.noise_key, -1) >> 33


@dataclass(frozen=True)
class BeamSearch:
    """One search of ``width`` beams by the rules of transformers' ``_beam_search``. A step makes a new value; nothing changes in place."""

    width: int
    num_ends: int  # tokens that end a sequence
    length_penalty: float
    early_stopping: bool | str
    max_new_tokens: int
    finished: tuple[Finished, ...] = ()  # best first, at most ``width``
    done: bool = False

    @property
    def num_candidates(self) -> int:
        """So many that ``width`` can go on, if every end token of every beam is among the best."""
        return max(2, 1 + self.num_ends) * self.width

    def penalised(self, score: float, length: int) -> float:
        return float32(score / float32(length**self.length_penalty))

    def step(self, candidates: list[Candidate], length: int, end_of: EndOf) -> tuple[BeamSearch, list[Candidate]]:
        """After choosing from ``candidates`` (best first, each with ``length`` new tokens): the search, and who goes on.

        The best ``width`` that do not end go on. What ends counts only among the first ``width``, and is kept if its penalised score is
        among the best ``width`` finished. The search is done when nothing that goes on is taken to be able to improve on those.
        """
        live: list[Candidate] = []
        ended: list[Finished] = []
        for place, candidate in enumerate(candidates):
            candidate, end = end_of(candidate)
            if end is None:
                live.append(candidate)
            elif place < self.width:
                drawn = [*candidate.parent.drawn, candidate.drawn]
                ended.append(Finished(self.penalised(candidate.score, length), candidate.score, drawn, *end))
            if len(live) == self.width and place + 1 >= self.width:
                break
        finished = sorted((*self.finished, *ended), key=lambda f: -f.score)[: self.width]  # stable: of equals the earlier
        full = len(finished) == self.width
        done = not live or (full and (self.early_stopping is True or not self._can_improve(live[0].score, finished[-1].score, length)))
        return replace(self, finished=tuple(finished), done=done), [] if done else live

    def _can_improve(self, best: float, worst: float, length: int) -> bool:
        """transformers' guess whether a running beam with the score ``best`` may yet become better than ``worst``, a finished one's."""
        longest = self.early_stopping == "never" and self.length_penalty > 0
        return self.penalised(best, self.max_new_tokens if longest else length) > worst


@dataclass(frozen=True)
class StochasticBeams(BeamSearch):
    """Stochastic beam search (Kool, van Hoof and Welling, ICML 2019): the best ``width`` by perturbed log-probability, ended or not.

    Each candidate's rank is its perturbed log-probability; the ended keep theirs and compete on. In the end they are ``width`` sequences
    drawn without replacement, in the order of the draws.
    """

    @property
    def num_candidates(self) -> int:
        return self.width

    def step(self, candidates: list[Candidate], length: int, end_of: EndOf) -> tuple[BeamSearch, list[Candidate]]:
        ranked: list[Finished | Candidate] = [*self.finished, *candidates]
        ranked.sort(key=lambda entry: -(entry.score if isinstance(entry, Finished) else entry.rank))
        live: list[Candidate] = []
        finished: list[Finished] = []
        for entry in ranked[: self.width]:
            if isinstance(entry, Finished):
                finished.append(entry)
                continue
            candidate, end = end_of(entry)
            if end is None:
                live.append(candidate)
            else:
                finished.append(Finished(candidate.rank, candidate.score, [*candidate.parent.drawn, candidate.drawn], *end))
        return replace(self, finished=tuple(finished), done=not live), live


@dataclass(frozen=True)
class OriginBeams(BeamSearch):
    """The origin model's rule: nothing is retired, and the search ends when the best beam's last token is an end token."""

    @property
    def num_candidates(self) -> int:
        return self.width

    def step(self, candidates: list[Candidate], length: int, end_of: EndOf) -> tuple[BeamSearch, list[Candidate]]:
        live = candidates[: self.width]
        if not live:
            return replace(self, done=True), []
        best, end = end_of(live[0])
        if end is None:
            return self, live
        return replace(self, finished=(Finished(best.score, best.score, [*best.parent.drawn, best.drawn], *end),), done=True), []


def condition(parent: Beam, noisy: Iterable[float]) -> list[float]:
    """Perturbed log-probabilities of a beam's continuations, given that their maximum is the beam's own (Kool et al. 2019, section 4.1).

    Args:
        parent: the beam.
        noisy: log-probabilities in the beam plus Gumbel noise, largest first.

    Returns:
        ``-log(exp(-T) - exp(-Z) + exp(-G))`` in float64 for each continuation with the unconditioned ``G``, where ``Z`` is the largest of
        those and ``T`` the parent's, in the numerically stable form of their appendix B.3. At the root there is no ``T`` to meet.
    """
    unconditioned = [parent.score + x for x in noisy]
    if parent.perturbed is None or not unconditioned:
        return unconditioned
    target, largest = parent.perturbed, unconditioned[0]
    result = []
    for g in unconditioned:
        if g == largest:
            result.append(target)
            continue
        v = target - g + _log1mexp(g - largest)
        result.append(target - max(0.0, v) - math.log1p(math.exp(-abs(v))))
    return result


def _log1mexp(x: float) -> float:
    """``log(1 - exp(x))`` for x < 0 (Maechler 2012)."""
    return math.log(-math.expm1(x)) if x > -0.6931471805599453 else math.log1p(-math.exp(x))
