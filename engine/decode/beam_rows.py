"""The rows of a step that are beams: their best continuations, in one kernel call for all requests, and who goes on."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..columns import tensor_of
from ..device import fetch, upload
from ..kernels import STATUS_NAN, STATUS_OK, Ops
from ..outputs import FinishReason
from ..request import Beam, Drawn, Request
from .beam import BeamSearch, Candidate, StochasticBeams, condition, float32, noise_stream
from .grammar import GrammarError
from .rows import as_int64, failure, lists, process

SCORE_LIMIT = 1e30  # of what `beam_select` takes


@dataclass
class Choice:
    """What a step decides for one request; nothing of the request has changed yet."""

    request: Request
    beams: list[Beam]
    searches: list[BeamSearch]
    going_on: list[Candidate] = field(default_factory=list)  # of all its searches, in their order
    taken: list[int] = field(default_factory=list)  # the tokens that they go on with, at the last position those that they would
    failures: dict[Beam, str] = field(default_factory=dict)  # beams without a continuation, and why
    error: str | None = None  # why the request ends now

    def penalised(self, group: int) -> dict[int, float]:
        """What beams of a group pay for tokens that those of earlier groups have just taken (Hamming diversity)."""
        if group == 0:
            return {}
        penalty: float = self.request.params.diversity_penalty  # type: ignore[attr-defined]
        return {token: penalty * count for token, count in Counter(self.taken).items()}


def choose(ops: Ops, logits: Tensor, beams: list[Beam]) -> list[Choice]:
    """Choose continuations for ``beams[r]`` from ``logits[r]`` (float32 ``[R, V]``), which are all beams of their requests, in order.

    Rows of requests with a ``logits_processor`` are overwritten by what it makes of them.
    """
    choices: dict[Request, Choice] = {}
    for beam in beams:
        request = beam.request
        choices.setdefault(request, Choice(request, [], list(request.searches))).beams.append(beam)
    own, log_mass = logits, None
    changed = [r for r, beam in enumerate(beams) if not beam.controls.plain]
    if changed:
        # Row by row, for a row's bits must not depend on others; NaN where the kernel's log-probabilities are the model's own.
        log_mass = torch.full((len(beams),), math.nan, dtype=torch.float64, device=logits.device)
        for r in changed:
            log_mass[r] = logits[r].double().logsumexp(dim=0)
        if any(beam.controls.processors for beam in beams):
            own = logits.clone()
            for row, beam in zip(logits, beams, strict=True):
                if beam.controls.processors and (error := process(row, beam)) is not None:
                    choices[beam.request].error = error
    for rows in _turns(beams):
        turn = [beams[r] for r in rows]
        whole = len(rows) == len(beams)
        part = logits if whole else logits[rows]
        raw = None if log_mass is None else (own if whole else own[rows], log_mass if whole else log_mass[rows])
        _turn(ops, part, turn, choices, raw)
    for choice in choices.values():
        if choice.error is None and not choice.going_on and not any(search.finished for search in choice.searches):
            position = len(choice.beams[0].tokens)
            choice.error = next(
                iter(choice.failures.values()), f"no beam can go on at position {position}: no score is above {-SCORE_LIMIT:g}"
            )
    return list(choices.values())


def _turns(beams: list[Beam]) -> Iterator[list[int]]:
    """Rows that one kernel call takes: stochastic beams apart, and beam groups one after the other, as later ones look at earlier ones."""
    keys = [-1 if isinstance(beam.request.searches[0], StochasticBeams) else beam.group for beam in beams]
    for key in sorted(set(keys)):
        yield [r for r, k in enumerate(keys) if k == key]


def _turn(ops: Ops, logits: Tensor, beams: list[Beam], choices: Mapping[Request, Choice], raw: tuple[Tensor, Tensor] | None) -> None:
    """One kernel call, and the steps of the searches whose ``beams`` these are. ``raw``: the model's own logits and log-masses."""
    stochastic = isinstance(beams[0].request.searches[0], StochasticBeams)
    first = beams[0].group
    starts = [r for r, beam in enumerate(beams) if stochastic or r == 0 or beam.request is not beams[r - 1].request]
    searches = [beams[r].request.searches[beams[r].group] for r in starts]
    noise: dict[str, Tensor] = {}
    if stochastic:
        noise = {
            "seed": tensor_of(array("q", [as_int64(beam.request.seed) for beam in beams])),
            "stream": tensor_of(array("i", [noise_stream(beam) for beam in beams])),
        }
    columns = (
        tensor_of(array("f", [0.0 if stochastic else beam.score for beam in beams])),
        tensor_of(array("i", [*starts, len(beams)])),
        tensor_of(array("f", [beam.controls.temperature for beam in beams])),
        tensor_of(array("i", [beam.controls.top_k for beam in beams])),
        tensor_of(array("i", [len(beam.tokens) for beam in beams])),
    )
    scores, group_start, *of_rows = upload(columns, logits.device)
    masks = lists(beams, logits.shape[1], [choices[beam.request].penalised(first) for beam in beams] if first else None)
    most = max([search.num_candidates for search in searches])
    result = ops.beam_select(logits, scores, group_start, most, *of_rows, **upload(noise | masks, logits.device))
    own = result.logprobs
    if raw is not None:
        parents, tokens = result.parents.long().clamp(min=0), result.tokens.clamp(min=0)
        own = (raw[0][parents, tokens] - raw[1][parents]).float()
    *found_columns, statuses = (
        t.tolist() for t in fetch((result.scores, result.tokens, result.parents, result.logprobs, own, result.status))
    )
    found: dict[Request, list[Candidate]] = {}
    for search, group in zip(searches, zip(*found_columns, strict=True), strict=True):
        # What is below the limit is as good as impossible, like -inf.
        entries = [e for e in zip(*group, strict=True) if e[1] >= 0 and e[0] > -SCORE_LIMIT][: search.num_candidates]
        if entries:
            beam = beams[entries[0][2]]
            found.setdefault(beam.request, []).extend(_candidates(beams, entries, stochastic))
            if entries[0][0] > SCORE_LIMIT:
                choice = choices[beam.request]
                choice.error = choice.error or f"a beam's score passes {SCORE_LIMIT:g} at position {len(beam.tokens)}"
    for beam, status in zip(beams, statuses, strict=True):
        if status != STATUS_OK:
            choice = choices[beam.request]
            choice.failures[beam] = failure(status, beam)
            if status == STATUS_NAN:
                choice.error = choice.error or choice.failures[beam]
    for request in {beam.request: None for beam in beams}:
        choice = choices[request]
        if choice.error is None:
            try:
                length = len(choice.beams[0].tokens) + 1 - len(request.prompt)
                candidates = found.get(request, [])
                search, going_on = request.searches[first].step(candidates, length, _end_of)
            except GrammarError as error:
                choice.error = f"the grammar cannot go on: {error}"
            else:
                choice.searches[first] = search
                choice.going_on += going_on
                last = length == request.max_new_tokens
                choice.taken += [c.drawn.token for c in (candidates[: search.width] if last else going_on)]


def _candidates(beams: list[Beam], entries: list[tuple[float, int, int, float, float]], stochastic: bool) -> Iterator[Candidate]:
    """Of one group: the kernel's score, token, parent, log-probability, and the model's own log-probability of each."""
    ranks = [entry[0] for entry in entries]
    if stochastic:
        ranks = condition(beams[entries[0][2]], ranks)
    for rank, (score, token, parent, logprob, own) in zip(ranks, entries, strict=True):
        beam = beams[parent]
        if stochastic:
            score = float32(beam.score + logprob)
        yield Candidate(beam, Drawn(token, own if math.isfinite(own) else logprob, logprob), score, rank)


def _end_of(candidate: Candidate) -> tuple[Candidate, tuple[FinishReason, int | None] | None]:
    """See ``beam.EndOf``."""
    beam, token = candidate.parent, candidate.drawn.token
    length = beam.num_new_tokens + 1
    if token in beam.end_token_ids:
        return candidate, ("stop", token)
    if beam.matcher is not None:
        candidate = candidate._replace(matcher=beam.matcher.copy())
        candidate.matcher.advance([*beam.tokens, token], len(beam.prompt))
        if candidate.matcher.complete and length >= beam.params.min_new_tokens:
            return candidate, ("stop", None)
    return candidate, ("length", None) if length == beam.request.max_new_tokens else None
