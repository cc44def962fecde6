"""Drafts for the requests of a decoder: who gets one in the next step, from whom, and how long."""

from __future__ import annotations

import itertools
import logging
import operator
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..decode.speculate import Verdict, usable
from ..models.config import ModelConfig
from ..request import Request
from ..tokenizer import Tokenizer
from .draft import MAX_DRAFT, Draft, Drafter
from .governor import Costs, Depth, Rates, Record, prune
from .model import DraftModel

BUNDLED = Path(__file__).parent.parent / "bundled" / "draft"
logger = logging.getLogger("engine.drafters")
_FIRST = 4  # tokens that a model drafts at first, to see what it costs


def make_drafters(draft: Any) -> list[Drafter]:
    """What ``Decoder(draft=...)`` was given as drafters, in the order in which they are asked."""
    if isinstance(draft, (list, tuple)):
        if not draft:
            raise ValueError("draft is an empty list; it must name at least one drafter, or be None")
        return [drafter for one in draft for drafter in make_drafters(one)]
    if isinstance(draft, str) and draft == "bundled":
        return [DraftModel(BUNDLED)]
    if draft == "":
        raise ValueError("draft is ''; it must be a path, 'bundled', a model, a drafter, a list of these, or None")
    if isinstance(draft, (str, os.PathLike, nn.Module)):
        try:
            return [DraftModel(draft)]
        except (ValueError, TypeError, OSError) as error:
            if type(error) in (ValueError, TypeError, FileNotFoundError):  # those of the loader: a sentence about its model
                raise type(error)(f"draft: {error}") from None
            raise
    if callable(getattr(draft, "draft", None)) and callable(getattr(draft, "release", None)) and not isinstance(draft, type):
        return [draft]
    raise TypeError(
        f"draft is a {type(draft).__name__}; it must be a model, a path, 'bundled', a drafter (PromptLookup(), SuffixLookup(), "
        "DraftModel(...)), a list of these, or None"
    )


class Speculator:
    """Asks the drafters, and learns from what becomes of their drafts.

    Args:
        drafters: in the order in which they are asked: a request gets the first draft that is not empty.
        config, tokenizer: the model's that verifies.
        max_batch_size, block_size: the decoder's.
    """

    def __init__(
        self, drafters: Sequence[Drafter], config: ModelConfig, tokenizer: Tokenizer | None, *, max_batch_size: int, block_size: int
    ) -> None:
        self.drafters = list(drafters)
        self.step_costs = Costs()  # of the model's steps, those with drafts with all that drafts take beside drafting
        self._drafting = 0.0  # seconds of the present step
        self._vocab_size = config.vocab_size
        self._rates = [Rates() for _ in self.drafters]
        self._records: dict[Request, list[Record]] = {}
        self._asked: dict[Request, Record] = {}  # whose drafter drafted for the present step
        self._failed: dict[Request, list[Drafter]] = {}  # drafters that failed while drafting for it: they are asked for it no more
        if len({id(drafter) for drafter in self.drafters}) < len(self.drafters):
            raise ValueError("draft holds the same drafter twice; each must be one of its own")
        models = [drafter for drafter in self.drafters if isinstance(drafter, DraftModel)]
        for model in models:
            model.check(config, tokenizer)
        for model in models:
            model.bind(config, max_batch_size=max_batch_size, block_size=block_size)

    def propose(self, running: Sequence[Request]) -> None:
        """Give requests that only lack their last token a draft for the next step."""
        self._asked.clear()
        self._drafting = 0.0
        for request in running:
            request.draft = None
        wanting = [(request, most) for request in running if (most := _most(request))]
        if not wanting:
            return
        batch = sum(len(request.sequences) for request in running)
        for place, drafter in enumerate(self.drafters):
            self._ask(place, drafter, wanting, batch)
            wanting = [(request, most) for request, most in wanting if request.draft is None]
            if not wanting:
                break
        self._prune(batch)

    def _ask(self, place: int, drafter: Drafter, wanting: Sequence[tuple[Request, int]], batch: int) -> None:
        """Have one drafter draft for those whom that promises to serve. One that raises, or answers nonsense, leaves them without."""
        model = drafter if isinstance(drafter, DraftModel) else None
        costs = None if model is None else model.costs
        nodes = 1 if model is None else model.nodes
        depth = None if costs is None else Depth(self.step_costs, costs(len(wanting)), batch, len(wanting), nodes)
        requests: list[Request] = []
        limits: list[int] = []
        records: list[Record] = []
        for request, most in wanting:
            if drafter in self._failed.get(request, ()):
                continue
            record = self._record(request)[place]
            limit = most
            if request.params.num_assistant_tokens is None:
                record.compare(request.tokens)
                if model is not None and depth is not None and model.costs:
                    record.cost = model.catching_up(request) + depth.share
                unknown = costs is not None and not costs
                limit = min(most, _FIRST if unknown else record.limit(depth, most) * nodes)
            if limit:
                requests.append(request)
                limits.append(limit)
                records.append(record)
        if not requests:
            return
        start = time.perf_counter()
        try:
            if model is not None:
                drafts = model.draft(requests, limits, None if depth is None else partial(_goes_on, requests, records, depth))
            else:
                drafts = drafter.draft(requests, limits)
            drafts = self._checked(drafter, drafts, requests, limits)
        except Exception as error:
            name = type(drafter).__name__
            logger.warning("drafter %s failed, and %d requests go on without its drafts", name, len(requests), exc_info=error)
            for request in requests:
                self._failed.setdefault(request, []).append(drafter)
                self._release(drafter, request)
            return
        self._drafting += time.perf_counter() - start
        plain = self.step_costs(batch) / batch
        for request, record, draft in zip(requests, records, drafts, strict=True):
            governed = request.params.num_assistant_tokens is None and not draft.proposal  # see _prune
            if not draft:
                record.missed(plain)
            elif governed and record.chances(draft)[0] < self._promised(request, place + 1):
                record.leave(draft, request.num_tokens)
                record.missed(plain)
            else:
                request.draft = draft
                self._asked[request] = record
            if model is None:
                record.cost = (time.perf_counter() - start) / len(requests)

    def _checked(self, drafter: Drafter, drafts: Any, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """What of a drafter's answer can be verified; ``ValueError`` or ``TypeError`` for one that is no answer."""
        name = type(drafter).__name__
        if not isinstance(drafts, Sequence):
            raise TypeError(f"drafter {name} returned a {type(drafts).__name__}; it must return a list with a Draft for each request")
        if len(drafts) != len(requests):
            raise ValueError(f"drafter {name} returned {len(drafts)} drafts for {len(requests)} requests; it must return one for each")
        try:
            return [usable(r, draft, limit, self._vocab_size) for r, draft, limit in zip(requests, drafts, limits, strict=True)]
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise TypeError(f"drafter {name} returned what is no Draft of token ids, parents and confidences: {error}") from error

    def _promised(self, request: Request, place: int) -> float:
        """The chance of a token from the drafters that would be asked from this place on."""
        return max((record.rates.mean for record in self._record(request)[place:] if not record.asleep), default=0.0)

    def _prune(self, batch: int) -> None:
        """Verify of the drafts what is likely enough to hold. Not of those for block verification: that would favour tokens."""
        governed = []
        rows = batch
        for request, record in self._asked.items():
            draft = request.draft
            assert draft is not None
            if request.params.num_assistant_tokens is None and not draft.proposal:
                governed.append((request, record, draft))
            else:
                rows += len(draft)
        if not governed:
            return
        drafting = sum(record.cost for record in self._asked.values())  # about: of models one depth
        kept = prune(self.step_costs, drafting, rows, [record.chances(draft) for _, record, draft in governed])
        for (request, record, draft), nodes in zip(governed, kept, strict=True):
            request.draft = draft.keep(nodes) or None
            if request.draft is None:
                record.leave(draft, request.num_tokens)
                record.missed(self.step_costs(batch) / batch)

    def note_step(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of decoding has taken so long, with drafting. One that asked in vain is neither plain nor drafted."""
        if rows > sequences or not self._drafting:
            self.step_costs.note(rows, seconds - self._drafting)

    def learn(self, verdict: Verdict) -> None:
        """Take in what became of a draft."""
        request = verdict.request
        request.num_drafted += len(verdict.draft)
        request.num_accepted += verdict.num_accepted
        self._asked[request].learn(verdict.draft, [drawn.token for drawn in verdict.drawn if drawn.error is None])

    def release(self, request: Request) -> None:
        """A request has ended or been preempted."""
        self._records.pop(request, None)
        self._asked.pop(request, None)
        self._failed.pop(request, None)
        for drafter in self.drafters:
            self._release(drafter, request)

    def _release(self, drafter: Drafter, request: Request) -> None:
        try:
            drafter.release(request)
        except Exception as error:
            logger.warning("drafter %s failed to release a request", type(drafter).__name__, exc_info=error)

    def _record(self, request: Request) -> list[Record]:
        if request not in self._records:
            self._records[request] = [
                Record(Rates(rates), patience=2 if isinstance(drafter, DraftModel) else 1)
                for rates, drafter in zip(self._rates, self.drafters, strict=True)
            ]
        return self._records[request]


def _most(request: Request) -> int:
    """How many tokens may be drafted for a request in the next step."""
    params = request.params
    if request.searches or request.followers or request.num_missing != 1 or params.speculative is False:
        return 0
    wanted = MAX_DRAFT if params.num_assistant_tokens is None else params.num_assistant_tokens
    return min(wanted, request.max_new_tokens - request.num_new_tokens - 1)  # the last token needs no draft


def _goes_on(requests: Sequence[Request], records: Sequence[Record], depth: Depth, i: int, confidence: Sequence[float]) -> bool:
    """Whether the i-th request's draft is worth another token after some of such confidence."""
    if requests[i].params.num_assistant_tokens is not None:
        return True
    rates = records[i].rates
    return depth.goes_on(list(itertools.accumulate(map(rates.of, confidence), operator.mul)), rates.mean)
