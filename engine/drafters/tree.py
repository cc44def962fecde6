"""Trees of alternatives: at each place what a draft model finds likeliest, grown where that is likeliest to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..decode.rows import as_int64, lists, process
from ..decode.speculate import go_on
from ..device import fetch, upload
from ..kernels import STATUS_OK, Ops
from ..request import Lookahead
from .draft import MAX_DRAFT, Draft

# A small model is less sure than the larger one that it drafts for: temperature of the chances that it gives to the alternatives of a
# greedy request. Found best on the bundled pair, where 0.5 to 0.7 are alike.
_SHARPER = 0.6


def alternatives(ops: Ops, logits: Tensor, sequences: Sequence[Lookahead], width: int) -> list[list[tuple[int, float]]]:
    """The ``width`` likeliest next tokens of each sequence with how likely each is to be the one, best first.

    Those of a sampled request are the best under the noise that its token will be drawn with (Gumbel top-k): the first is what this model
    would draw. Its temperature, top-k, penalties and masks act as in ``beam_select``. ``logits`` float32 ``[R, V]`` may be overwritten.
    """
    failed = {r for r, sequence in enumerate(sequences) if sequence.controls.processors and process(logits[r], sequence) is not None}
    found: list[list[tuple[int, float]]] = [[] for _ in sequences]
    for greedy in (True, False):
        rows = [r for r, s in enumerate(sequences) if s.controls.greedy == greedy and r not in failed]
        if not rows:
            continue
        own = [sequences[r] for r in rows]
        noise = {}
        if not greedy:
            noise["seed"] = torch.tensor([as_int64(s.seed) for s in own])
            noise["stream"] = torch.tensor([s.stream for s in own], dtype=torch.int32)
        columns = (
            torch.zeros(len(rows)),
            torch.arange(len(rows) + 1, dtype=torch.int32),
            torch.tensor([_SHARPER if greedy else s.controls.temperature for s in own], dtype=torch.float32),
            torch.tensor([0 if greedy else s.controls.top_k for s in own], dtype=torch.int32),
            torch.tensor([s.num_tokens for s in own], dtype=torch.int32),
        )
        scores, group_start, *of_rows = upload(columns, logits.device)
        result = ops.beam_select(
            logits if len(rows) == len(sequences) else logits[rows],
            scores,
            group_start,
            min(width, logits.shape[1]),
            *of_rows,
            **upload(noise | lists(own, logits.shape[1]), logits.device),
        )
        # By hand: torch's softmax wakes OpenMP's threads whatever its size, and they then spin on the cores that the kernels want.
        chances = (result.logprobs if greedy else result.scores - result.scores[:, :1]).exp()
        if not greedy:
            chances /= chances.sum(dim=1, keepdim=True)
        found_columns = (t.tolist() for t in fetch((result.tokens, chances, result.status)))
        for r, tokens, chance, status in zip(rows, *found_columns, strict=True):
            if status == STATUS_OK:
                found[r] = [(token, min(p, 1.0)) for token, p in zip(tokens, chance, strict=True) if token >= 0]
    return found


@dataclass
class Tree:
    """One request's tree as it grows, one depth after the other.

    Args:
        root: the request.
        limit: nodes that it is to have in the end: those of the largest chances.
    """

    root: Lookahead
    limit: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    sequences: list[Lookahead] = field(default_factory=list)
    chances: list[float] = field(default_factory=lambda: [1.0])  # of node 0 and the others: the product of the confidences on its path
    depths: list[int] = field(default_factory=lambda: [0])
    # Nodes that have been or are being computed, and of each the bits of those that it sees, itself included; node 0 is not among them.
    computed: list[int] = field(default_factory=list)
    seen: dict[int, int] = field(default_factory=lambda: {0: 0})
    frontier: list[int] = field(default_factory=lambda: [0])  # whose children are asked for

    def after(self, node: int) -> Lookahead:
        return self.sequences[node - 1] if node else self.root

    def grow(self, children: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Add the children of each node of the frontier; the new frontier is those of them that belong to the best ``limit`` nodes."""
        first = len(self.chances)
        for node, found in zip(self.frontier, children, strict=True):
            for token, confidence in found:
                after = go_on(self.after(node), token)
                if after is None:
                    continue
                self.tokens.append(token)
                self.parents.append(node)
                self.confidence.append(confidence)
                self.sequences.append(after)
                self.chances.append(self.chances[node] * confidence)
                self.depths.append(self.depths[node] + 1)
        best = set(self.best())
        room = MAX_DRAFT + 1 - len(self.computed)
        self.frontier = sorted(sorted((n for n in range(first, len(self.chances)) if n in best), key=lambda n: -self.chances[n])[:room])
        for node in self.frontier:
            self.seen[node] = self.seen[self.parents[node - 1]] | 1 << len(self.computed)
            self.computed.append(node)

    def best(self) -> list[int]:
        """The ``limit`` nodes of the largest chances, in order; with each its parent, whose chance is not smaller."""
        ranked = sorted(range(1, len(self.chances)), key=lambda node: (-self.chances[node], node))
        return sorted(ranked[: self.limit])

    def draft(self) -> Draft:
        whole = Draft(tuple(self.tokens), tuple(self.parents), tuple(self.confidence), tuple(self.sequences))
        return whole.keep(self.best())

    def likeliest(self) -> list[float]:
        """The confidences along the path to the likeliest node of the frontier."""
        node = max(self.frontier, key=lambda n: self.chances[n])
        path: list[float] = []
        while node:
            path.append(self.confidence[node - 1])
            node = self.parents[node - 1]
        return path[::-1]
