"""What a drafter is: something that guesses how requests go on, to be verified by the model in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..params import MAX_DRAFT as MAX_DRAFT
from ..request import Lookahead, Request


@dataclass(frozen=True)
class Draft:
    """Tokens guessed to follow those of a request: a chain, or a tree of alternatives.

    Node 0 is the request's last token, node i the token ``tokens[i - 1]``, which is guessed to follow node ``parents[i - 1]``. Nodes come
    in the order of their depth, each after its parent, and those of one parent with the likeliest first.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    # How likely each is to be accepted where its parent is, as far as the drafter can tell: 0 to 1. What that is worth is measured.
    confidence: tuple[float, ...] = ()
    # The request as it would be after each; the drafter may leave them out.
    sequences: tuple[Lookahead, ...] = ()
    # Block verification: masses of what each was drawn from (int64 [V] of `kernels.masses`); empty where they are certain.
    proposal: tuple[Any, ...] = ()

    @classmethod
    def chain(cls, tokens: Sequence[int], confidence: Sequence[float]) -> Draft:
        """Each token after the one before it."""
        return cls(tuple(tokens), tuple(range(len(tokens))), tuple(confidence))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    def depths(self) -> list[int]:
        """Of each node, the request's last token (0) first."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def ancestors(self) -> list[int]:
        """The bits of each node and those above it, as ``kernels.paged_attention`` takes them (int64: bit 63 is the sign)."""
        bits = [1]
        for node, parent in enumerate(self.parents, 1):
            bits.append(bits[parent] | 1 << node)
        return list(map(signed, bits))

    def keep(self, nodes: Sequence[int]) -> Draft:
        """The draft of some of its nodes (past node 0, in order), each with its parent among them or node 0."""
        if len(nodes) == len(self):
            return self
        place = {0: 0} | {node: i for i, node in enumerate(nodes, 1)}
        pick = [node - 1 for node in nodes]
        return Draft(
            tuple(self.tokens[i] for i in pick),
            tuple(place[self.parents[i]] for i in pick),
            tuple(self.confidence[i] for i in pick),
            tuple(self.sequences[i] for i in pick) if self.sequences else (),
            tuple(self.proposal[i] for i in pick) if self.proposal else (),
        )


class Drafter(Protocol):
    """Drafts for requests. What it guesses changes no token, only how soon they come."""

    def draft(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """A draft for each request, of at most ``limits[i]`` tokens (1 to ``MAX_DRAFT``); an empty one where there is nothing to guess."""
        ...

    def release(self, request: Request) -> None:
        """A request has ended (``request.finished``) or been preempted; one that was may come back."""
        ...


def signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits
