"""Speculative decoding: drafts made ready to be verified, and the verdict on them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import fetch, upload
from ..drafters.draft import MAX_DRAFT, Draft
from ..kernels import STATUS_NAN, STATUS_OK, Ops
from ..plan import StepPlan
from ..request import Drawn, Lookahead, Request
from .grammar import GrammarError
from .rows import as_int64, lists
from .sample import law

CERTAIN = 1 << 40  # mass of a token that is certain


def go_on(before: Request | Lookahead, token: int) -> Lookahead | None:
    """The request after a drafted token; None where it ends there, or cannot have it, so that no draft need hold it."""
    if token in before.end_token_ids:
        return None
    try:
        after = Lookahead(before, token)
    except GrammarError:
        return None
    if after.matcher is not None and after.matcher.complete and after.num_new_tokens >= after.params.min_new_tokens:
        return None
    return after


def certain_end(before: Request | Lookahead, token: int) -> Lookahead:
    """What stands for the request after a drafted token that it does not go on after: nothing that is drawn for it is ever used."""
    after = Lookahead(before)
    after.drafted = (*after.drafted, token)
    return after


def usable(request: Request, draft: Draft, limit: int, vocab_size: int) -> Draft:
    """What of a draft can be verified: at most ``limit`` tokens of the vocabulary, in a draft's order, that the request can go on after.

    A stochastic draft for block verification is taken as it is: to leave out what its tokens tell would favour others. One that is not what
    it should be counts as certain.
    """
    lengths = {len(column) for column in (draft.tokens, draft.parents, draft.confidence, draft.sequences, draft.proposal)}
    whole = lengths == {len(draft)} and len(draft) <= limit and all(0 <= token < vocab_size for token in draft.tokens)
    if draft.proposal and whole and draft.is_chain:
        own = all(after.request is request and after.drafted == draft.tokens[:i] for i, after in enumerate(draft.sequences, 1))
        if own and all(masses.shape == (vocab_size,) for masses in draft.proposal):
            return draft
    sequences: dict[int, Lookahead] = {}
    depths = {0: 0}
    deepest = 0
    size = min(len(draft.tokens), len(draft.parents), limit)
    for node, (token, parent) in enumerate(zip(draft.tokens[:size], draft.parents, strict=False), 1):
        depth = depths.get(parent, MAX_DRAFT) + 1
        if depth > MAX_DRAFT or depth < deepest or not 0 <= token < vocab_size:
            continue
        before = sequences[parent] if parent else request
        path = (*(before.drafted if isinstance(before, Lookahead) else ()), token)
        given = draft.sequences[node - 1] if len(draft.sequences) == len(draft) else None
        after = given if given is not None and given.request is request and given.drafted == path else go_on(before, token)
        if after is not None:
            sequences[node], depths[node], deepest = after, depth, depth
    # A drafter need not have any, and its own code may make anything of it.
    confidence = tuple(c if 0 <= c <= 1 else 0.5 for c in (*draft.confidence, *[0.5] * size)[:size])
    all_of_it = Draft(tuple(draft.tokens[:size]), tuple(draft.parents[:size]), confidence)
    return replace(all_of_it.keep(list(sequences)), sequences=tuple(sequences.values()))


def masses(ops: Ops, logits: Tensor, rows: Sequence[Request | Lookahead]) -> tuple[Tensor, Tensor]:
    """``kernels.masses`` of these rows: what each is drawn from, and its status."""
    given = law(rows, array("i", [row.num_tokens for row in rows]))
    temperature, top_k, top_p, min_p, _, position, _ = upload(given, logits.device)
    return ops.masses(logits, temperature, top_k, top_p, min_p, position, **upload(lists(rows, logits.shape[1]), logits.device))


class Verdict(NamedTuple):
    """What a step's rows of logits decide for one request."""

    request: Request
    draft: Draft
    drawn: list[Drawn]  # its next tokens, or in the last place why there is none
    path: list[int]  # of the draft, the nodes that hold, from node 0 on: one for each of `drawn`

    @property
    def num_accepted(self) -> int:
        return len(self.path) - 1


class _Drafted(NamedTuple):
    request: Request
    draft: Draft
    first: int  # its first row

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + 1 + len(self.draft))


def verdicts(ops: Ops, plan: StepPlan, logits: Tensor | None, drawn: Sequence[Drawn], device: torch.device) -> list[Verdict]:
    """The verdict on each request with rows, in their order.

    Args:
        logits: float32 ``[R, V]`` of the plan's rows; None where the LM head has drawn, which it does not for block verification.
        drawn: what the token law gives for each row that is no beam's.
        device: the model's.
    """
    found: dict[int, Verdict] = {}
    replayed: list[_Drafted] = []
    blocks: list[_Drafted] = []
    for r, (row, one) in enumerate(zip(plan.rows, drawn, strict=False)):
        if row.node:
            continue
        request, draft = row.sequence, plan.sequences[row.scheduled].draft
        assert isinstance(request, Request)
        if draft:
            by_block = request.params.verification == "block" and not request.controls.greedy and draft.is_chain
            (blocks if by_block else replayed).append(_Drafted(request, draft, r))
        found[r] = Verdict(request, draft, [one], [0])  # in its place; drafted ones are replaced
    if replayed:
        for drafted, path in zip(replayed, _replay(ops, replayed, drawn, device), strict=True):
            first = drafted.first
            found[first] = Verdict(drafted.request, drafted.draft, [drawn[first + node] for node in path], path)
    if blocks:
        assert logits is not None
        for drafted, verdict in zip(blocks, _blocks(ops, blocks, logits, drawn), strict=True):
            found[drafted.first] = verdict
    return list(found.values())


def _starts(drafted: Sequence[_Drafted]) -> Tensor:
    start = [0]
    for one in drafted:
        start.append(start[-1] + 1 + len(one.draft))
    return torch.tensor(start, dtype=torch.int32)


def _replay(ops: Ops, drafted: Sequence[_Drafted], drawn: Sequence[Drawn], device: torch.device) -> Iterator[list[int]]:
    """The path of each: as long as what was drafted is what the law draws."""
    own = [d for one in drafted for d in drawn[one.rows]]
    draft = [token for one in drafted for token in (-1, *one.draft.tokens)]
    parent = [node for one in drafted for node in (-1, *one.draft.parents)]
    start = _starts(drafted)
    given = (
        torch.tensor([d.token for d in own]),
        torch.tensor([STATUS_OK if d.error is None else STATUS_NAN for d in own], dtype=torch.int32),
        torch.tensor(draft, dtype=torch.int32),
        torch.tensor(parent, dtype=torch.int32),
        start,
    )
    result = ops.verify_drafts(*upload(given, device))
    path, num_accepted = (t.tolist() for t in fetch((result.path, result.num_accepted)))
    for first, accepted in zip(start.tolist(), num_accepted, strict=False):
        yield path[first : first + accepted + 1]


def _blocks(ops: Ops, drafted: Sequence[_Drafted], logits: Tensor, drawn: Sequence[Drawn]) -> Iterator[Verdict]:
    """Block verification of chains: what is kept, and what is drawn after it."""
    rows = [r for one in drafted for r in range(one.rows.start, one.rows.stop)]
    own = logits[upload(torch.tensor(rows), logits.device)]
    after: list[Request | Lookahead] = [s for one in drafted for s in (one.request, *one.draft.sequences)]  # type: ignore[misc]
    target, status = masses(ops, own, after)
    proposal = torch.zeros_like(target)
    first = 0
    for one in drafted:
        for i, token in enumerate(one.draft.tokens):
            if one.draft.proposal:
                proposal[first + 1 + i].copy_(one.draft.proposal[i], non_blocking=True)
            else:
                proposal[first + 1 + i, token] = CERTAIN
        first += 1 + len(one.draft)
    start = _starts(drafted)
    given = (
        torch.tensor([token for one in drafted for token in (-1, *one.draft.tokens)], dtype=torch.int32),
        start,
        torch.tensor([as_int64(one.request.seed) for one in drafted]),
        torch.tensor([one.request.num_tokens for one in drafted], dtype=torch.int32),
        torch.tensor([one.request.stream for one in drafted], dtype=torch.int32),
    )
    result = ops.verify_block(target, status, proposal, *upload(given, logits.device))
    assert result.tokens is not None and result.status is not None
    num_accepted, last_tokens = (t.tolist() for t in fetch((result.num_accepted, result.tokens)))
    kept: list[tuple[_Drafted, list[tuple[int, int]]]] = []  # of each: the tokens it gets, and the rows of `own` behind them
    for one, first, accepted, last in zip(drafted, start.tolist()[:-1], num_accepted, last_tokens, strict=True):
        tokens = [*one.draft.tokens[:accepted], last]
        kept.append((one, [(token, first + node) for node, token in enumerate(tokens)]))
    # What `sample` drew from the same row, or why it could not: its log-probabilities tell those of any other token.
    at = [(row, token, drawn[rows[row]].token) for _, tokens in kept for token, row in tokens]
    row_of, token_of, given_of = upload(tuple(torch.tensor(column).clamp(min=0) for column in zip(*at, strict=True)), logits.device)
    columns = (own[row_of, token_of], own[row_of, given_of], target[row_of, token_of], target[row_of, given_of])
    told = zip(*(t.tolist() for t in fetch(columns)), strict=True)
    for one, tokens in kept:
        after_it: list[Drawn] = []
        for token, row in tokens:
            given_draw, (raw, given_raw, mass, given_mass) = drawn[rows[row]], next(told)
            if token >= 0 and given_draw.error is None:
                processed = given_draw.processed_logprob + math.log(mass / max(given_mass, 1))
                given_draw = given_draw._replace(token=token, logprob=given_draw.logprob + raw - given_raw, processed_logprob=processed)
            after_it.append(given_draw)
        yield Verdict(one.request, one.draft, after_it, list(range(len(tokens))))
