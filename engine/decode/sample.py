"""Draw one token for every row of a step, all rows in one kernel call."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..columns import tensor_of
from ..device import fetch, upload
from ..kernels import Ops, SampleResult
from ..request import Drawn, Lookahead, Request
from .controls import token_mask
from .rows import as_int64, failure, lists, process

# What can draw tokens for rows, by what they ask for: the LM head itself (no filters, lists, masks, processors, nor other tokens'
# log-probabilities), ``sample`` without lists and masks, or only what the host puts together for these very rows.
FUSED, FILTERED, PREPARED = "fused", "filtered", "prepared"


def drawn_by(rows: Sequence[Request | Lookahead]) -> str:
    """FUSED, FILTERED or PREPARED."""
    if any([not row.controls.is_bare(row) or row.controls.processors or row.params.logprobs for row in rows]):
        return PREPARED
    return FUSED if all([row.controls.unfiltered for row in rows]) else FILTERED


class Sampler:
    """Draws tokens for the rows of steps, all rows of a step in one kernel call.

    What a step's rows ask for is put into the kernel's form once, and stays while steps have the same rows: only their positions move on.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self._workspace = ops.sample_workspace()
        self._rows: list[Request | Lookahead] = []
        self._positions = array("i")
        self._law: tuple[Tensor, ...] = ()
        self._num_top = 0
        self._processed: list[int] = []  # rows that processors rewrite
        self._bare = False  # no row has a list or a mask
        self._result: SampleResult | None = None
        self._columns: list[Any] = []  # views of it

    def draw(self, logits: Tensor, rows: list[Request | Lookahead]) -> list[Drawn]:
        """Draw for ``rows[r]`` from ``logits[r]`` (float32 ``[R, V]``): the token's position is the request's present length.

        Rows of requests with a ``logits_processor`` are overwritten by what it makes of them.
        """
        if rows != self._rows:
            self._take(rows)
        self._positions[:] = array("i", [row.num_tokens for row in rows])
        processed = self._processed
        own = logits[processed] if processed else None
        errors = {r: error for r in processed if (error := process(logits[r], rows[r])) is not None}
        result: SampleResult = self.ops.sample(
            logits,
            *(self._law if logits.is_cpu else upload(self._law, logits.device)),
            **({} if self._bare else upload(lists(rows, logits.shape[1]), logits.device)),
            logprobs=self._num_top,
            workspace=self._workspace,
        )
        if own is not None:
            _restore_raw(self.ops, own, processed, rows, result, self._num_top)
        if result is not self._result or not result.tokens.is_cpu:
            self._columns = columns_of(result)
            self._result = result
        drawn = drawn_of(self._columns, rows, errors)
        if self._num_top:
            _add_top(drawn, rows, result)
        return drawn

    def _take(self, rows: list[Request | Lookahead]) -> None:
        """The rows of this step are others than those of the one before."""
        self._positions = array("i", [row.num_tokens for row in rows])
        self._law = law(rows, self._positions)
        self._num_top = max([row.params.logprobs for row in rows])
        self._processed = [r for r, row in enumerate(rows) if row.controls.processors]
        self._bare = all([row.controls.is_bare(row) for row in rows])
        self._rows = rows  # last, should anything be interrupted


def columns_of(result: SampleResult) -> list[Any]:
    """Its tokens, log-probabilities and statuses on the host, as NumPy's views."""
    assert result.logprobs is not None and result.processed_logprobs is not None
    return [t.numpy() for t in fetch((result.tokens, result.logprobs, result.processed_logprobs, result.status))]


def drawn_of(columns: Sequence[Any], rows: Sequence[Request | Lookahead], errors: Mapping[int, str] = MappingProxyType({})) -> list[Drawn]:
    """What became of each row. ``errors``: why it cannot have a token, whatever its status."""
    tokens, raw, after, status = [column.tolist() for column in columns]
    drawn = list(map(Drawn, tokens, raw, after))
    if errors or any(status):
        for r, one in enumerate(status):
            if one or r in errors:
                drawn[r] = Drawn(-1, math.nan, math.nan, error=errors.get(r) or failure(one, rows[r]))
    return drawn


def law(rows: Sequence[Request | Lookahead], positions: array[int]) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seed, position and stream of each row."""
    return tuple(map(tensor_of, law_columns(rows, positions)))


def law_columns(rows: Sequence[Request | Lookahead], positions: array[int]) -> tuple[array[Any], ...]:
    """Likewise, as arrays."""
    controls = [row.controls for row in rows]
    return (
        array("f", [c.temperature for c in controls]),
        array("i", [c.top_k for c in controls]),
        array("f", [c.top_p for c in controls]),
        array("f", [c.min_p for c in controls]),
        array("q", [as_int64(row.seed) for row in rows]),
        positions,
        array("i", [row.stream for row in rows]),
    )


def _restore_raw(
    ops: Ops, own: Tensor, processed: list[int], rows: Sequence[Request | Lookahead], result: SampleResult, num_top: int
) -> None:
    """Raw log-probabilities of rows that processors changed, from the model's ``own`` rows, into ``result``.

    The kernel takes them from the rows that it is given. So it is given the model's rows, with the token already drawn as the only one
    allowed; one that the model rules out has -inf.
    """
    assert result.logprobs is not None
    tokens = result.tokens[processed]
    possible = (tokens >= 0) & (own.gather(1, tokens.clamp(min=0)[:, None])[:, 0] > -math.inf)
    allowed = torch.full((len(processed), -(-own.shape[1] // 32)), -1, dtype=torch.int32)
    for row, token, one in zip(allowed, *(t.tolist() for t in fetch((tokens, possible))), strict=True):
        if one:
            row.copy_(token_mask([token], own.shape[1]))
    given = law([rows[r] for r in processed], array("i", [rows[r].num_tokens for r in processed]))
    raw = ops.sample(own, *upload(given, own.device), allowed=upload(allowed, own.device), logprobs=num_top)
    result.logprobs[processed] = torch.where(possible, raw.logprobs, -math.inf)
    if result.top_tokens is not None and result.top_logprobs is not None:
        result.top_tokens[processed] = raw.top_tokens
        result.top_logprobs[processed] = raw.top_logprobs


def _add_top(drawn: list[Drawn], rows: Sequence[Request | Lookahead], result: SampleResult) -> None:
    assert result.top_tokens is not None and result.top_logprobs is not None
    assert result.processed_top_tokens is not None and result.processed_top_logprobs is not None
    lists = fetch((result.top_tokens, result.top_logprobs, result.processed_top_tokens, result.processed_top_logprobs))
    for r, (tokens, values, processed_tokens, processed_values) in enumerate(zip(*(t.tolist() for t in lists), strict=True)):
        n = rows[r].params.logprobs
        if n:
            drawn[r] = drawn[r]._replace(top=_ranked(tokens[:n], values), processed_top=_ranked(processed_tokens[:n], processed_values))


def _ranked(tokens: list[int], logprobs: list[float]) -> dict[int, float]:
    """Token to log-probability, best first; -1 is no token."""
    return {token: logprob for token, logprob in zip(tokens, logprobs, strict=False) if token >= 0}
