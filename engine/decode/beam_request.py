"""The life of a request that is a beam search: it begins, goes on with what a step chose, shows what has settled, and ends."""

from __future__ import annotations

from typing import Any

from ..blocks import BlockPool
from ..outputs import FinishReason, StreamEvent
from ..params import BeamParams
from ..request import Beam, Drawn, Request
from .beam import BeamSearch, Finished, OriginBeams, StochasticBeams, mix
from .beam_rows import Choice


def begin(request: Request, params: BeamParams, *, as_origin: bool = False) -> None:
    """Make a request a beam search."""
    rule = OriginBeams if as_origin else StochasticBeams if params.stochastic else BeamSearch
    search = rule(
        params.num_beams // params.num_beam_groups,
        len(request.end_token_ids),
        params.length_penalty,
        params.early_stopping,
        request.max_new_tokens,
    )
    request.num_beams = params.num_beams
    request.searches = [search] * params.num_beam_groups
    request.beams = [Beam(request, group) for group in range(params.num_beam_groups)]
    request.restart()


def go_on(choice: Choice, pool: BlockPool) -> None:
    """Carry out what a step chose for a request that has not failed: its beams, their blocks, its events, and its end."""
    request = choice.request
    places = {beam: i for i, beam in enumerate(request.beams)}
    children = []
    for candidate in choice.going_on:
        child = candidate.parent.child(candidate.drawn, candidate.score)
        child.matcher = candidate.matcher
        child.perturbed = candidate.rank
        child.noise_key = mix(candidate.parent.noise_key, candidate.drawn.token)
        children.append(child)
    tables = pool.permute([beam.block_table for beam in request.beams], [places[c.parent] for c in choice.going_on])
    for child, table in zip(children, tables, strict=True):
        child.block_table = table
    request.beams, request.searches = children, choice.searches
    request.note_first_token()
    request.num_forwards += 1
    finished = _finished(request)
    if not children:
        _end(request, finished)
        return
    settled = _settled(request, finished[:1])
    if settled:
        try:
            text = _feed(request.text_state, settled)
        except Exception as error:  # a tokenizer may raise anything; it is this request's alone
            fail(request, "error", error=f"the tokenizer cannot decode token {settled[-1].token}: {error}")
            return
        request.drawn += settled
        if request.streams:
            request.events.append(_event(request, 0, settled, text))


def fail(request: Request, reason: FinishReason, *, error: str | None = None) -> None:
    """End a search without its results: the first output has what had settled, the others nothing."""
    for index in range(request.num_outputs):
        text_state = None if request.text_state is None else request.text_state if index == 0 else request.text_state.anew()
        rest = _rest(text_state) if text_state is not None and reason != "error" else ""
        text = None if text_state is None else text_state.text
        output = request.finish(reason, text=text, error=error, drawn=request.drawn if index == 0 else [])
        request.events.append(_event(request, index, [], rest, output))


def _finished(request: Request) -> list[Finished]:
    """What the searches of a request have finished, best first."""
    return sorted((f for search in request.searches for f in search.finished), key=lambda f: -f.score)


def _settled(request: Request, best: list[Finished]) -> list[Drawn]:
    """Tokens beyond those shown that all beams, and the best that has finished, agree on: the first output will have them."""
    lines = [beam.drawn for beam in request.beams] + [f.drawn for f in best]
    start = end = len(request.drawn)
    shortest = min(map(len, lines))
    while end < shortest and all(line[end].token == lines[0][end].token for line in lines):
        end += 1
    return lines[0][start:end]


def _end(request: Request, finished: list[Finished]) -> None:
    """The outputs: the best that have finished; where there are too few, an error in the place of each that is missing."""
    for index in range(request.num_outputs):
        if index >= len(finished):
            few = f"the search found only {len(finished)} of {request.num_outputs} sequences: too few continuations are possible"
            output = request.finish("error", text=None if request.text_state is None else "", error=few, drawn=[])
            request.events.append(_event(request, index, [], "", output))
            continue
        best = finished[index]
        shown = request.drawn if index == 0 else []
        rest = best.drawn[len(shown) :]
        text_state = None if request.text_state is None else request.text_state if index == 0 else request.text_state.anew()
        reason, stop_reason = best.reason, best.stop_reason
        error: str | None = None
        text = ""
        if text_state is not None:
            try:
                text = _feed(text_state, rest[:-1] if stop_reason is not None else rest) + text_state.flush()[0]
            except Exception as failure:
                reason, stop_reason, error = "error", None, f"the tokenizer cannot decode the tokens: {failure}"
        output = request.finish(
            reason,
            text=None if text_state is None else text_state.text,
            stop_reason=stop_reason,
            error=error,
            drawn=best.drawn,
            beam_score=best.beam_score,
            score=best.score,
        )
        request.events.append(_event(request, index, rest, text, output))


def _feed(text_state: Any, drawn: list[Drawn]) -> str:
    """Text that has settled with some more tokens."""
    return "" if text_state is None else "".join(text_state.feed(d.token)[0] for d in drawn)


def _rest(text_state: Any) -> str:
    """The rest of the text of a search that ends early; none where the tokenizer fails at that, too."""
    try:
        rest: str = text_state.flush()[0]
    except Exception:
        return ""
    return rest


def _event(request: Request, index: int, drawn: list[Drawn], text: str, output: Any = None) -> StreamEvent:
    return StreamEvent(request.prompt_index, index, [d.token for d in drawn], text, output, [d.logprob for d in drawn])
