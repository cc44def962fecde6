"""What a row of logits must be drawn like: laws with every control, their exact probabilities, and the statistics that judge draws by them.

The probabilities come from the text of ``kernels.api.sample``, in float64, by sorting and softmax; they share no code with the kernels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import EndTokens, LogitBias, Penalties

GREEDY_BELOW = 1e-5
CHUNK_ROWS = 50_000  # of one call
CHUNK_ELEMENTS = 1 << 28  # read in one call; a law's row is one row of memory however often it is drawn from


@dataclass(frozen=True)
class Law:
    """A row of logits and how it is drawn from; the controls are those of ``kernels.api.sample``."""

    name: str
    logits: Tensor  # float32 [V]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    counts: Mapping[int, int] = field(default_factory=dict)  # the penalised ids, and how often each occurs in the output
    bias: Mapping[int, float] = field(default_factory=dict)
    end_tokens: tuple[int, ...] = ()
    early: bool = False  # whether the position is the last at which end tokens are forbidden, or the first at which they are not
    allowed: Tensor | None = None  # bool [V]
    cell: Tensor | None = None  # int64 [V]: tokens of one cell are counted together

    def processed(self, dtype: torch.dtype) -> Tensor:
        """Steps 1 to 3 of the contract, each operation rounded to ``dtype``."""

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float32).to(dtype)

        x = self.logits.to(dtype).clone()
        for token, count in self.counts.items():
            x[token] = x[token] / number(self.repetition) if x[token] > 0 else x[token] * number(self.repetition)
            if count > 0:
                x[token] = x[token] - number(self.frequency) * count
                x[token] = x[token] - number(self.presence)
        for token, addend in self.bias.items():
            x[token] = x[token] + number(addend)
        if self.early:
            x[list(self.end_tokens)] = -math.inf
        if self.allowed is not None:
            x[~self.allowed] = -math.inf
        return x if self.temperature < GREEDY_BELOW else x / number(self.temperature)

    def kept(self, z: Tensor) -> Tensor:
        """Which of ``z`` (float64, after step 3) may be drawn: steps 4 to 6, bool ``[V]``."""
        if self.temperature < GREEDY_BELOW:
            return torch.arange(len(z)) == z.argmax()
        kept = z > -math.inf
        if 0 < self.top_k < len(z):
            kept &= z >= z.sort(descending=True).values[self.top_k - 1]
        if self.top_p < 1:
            mass = torch.where(kept, (z - z.max()).exp(), 0)
            values, index = z.unique(return_inverse=True)
            by_value = torch.zeros_like(values).index_add(0, index, mass)
            larger = by_value.sum() - by_value.cumsum(0)  # the mass of all larger values, for each value
            top_p = torch.tensor(self.top_p, dtype=torch.float32).double()
            kept &= (larger < (top_p * mass.sum()).clamp(min=1e-12))[index]
        if self.min_p > 0:
            kept &= z >= z.max() + math.log(self.min_p)
        return kept

    def probabilities(self) -> Tensor:
        """Of each token, float64 ``[V]``."""
        z = self.processed(torch.float64)
        return z.masked_fill(~self.kept(z), -math.inf).softmax(dim=0)

    def arguments(self, seed: Tensor, position: Tensor, stream: Tensor, device: torch.device) -> dict[str, Any]:
        """What ``sample`` takes to draw one token for each of ``seed``, ``position``, ``stream`` (``[N]``)."""
        rows = len(seed)

        def floats(value: float) -> Tensor:
            return torch.full((rows,), value, device=device)

        def ids(values: list[Any], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).repeat(rows)

        def start(size: int) -> Tensor:
            return torch.arange(rows + 1, dtype=torch.int32, device=device) * size

        position = position.to(device, torch.int32)
        given: dict[str, Any] = {
            "logits": self.logits.to(device).expand(rows, -1),
            "temperature": floats(self.temperature),
            "top_k": torch.full((rows,), self.top_k, dtype=torch.int32, device=device),
            "top_p": floats(self.top_p),
            "min_p": floats(self.min_p),
            "seed": seed.to(device, torch.int64),
            "position": position,
            "stream": stream.to(device, torch.int32),
        }
        if self.counts:
            penalties = (floats(self.repetition), floats(self.presence), floats(self.frequency))
            given["penalties"] = Penalties(*penalties, ids(list(self.counts)), ids(list(self.counts.values())), start(len(self.counts)))
        if self.bias:
            given["bias"] = LogitBias(ids(list(self.bias)), ids(list(self.bias.values()), torch.float32), start(len(self.bias)))
        if self.end_tokens:
            given["end_tokens"] = EndTokens(ids(list(self.end_tokens)), position + int(self.early), start(len(self.end_tokens)))
        if self.allowed is not None:
            given["allowed"] = pack(self.allowed[None]).to(device).repeat(rows, 1)
        return given


def pack(allowed: Tensor) -> Tensor:
    """Bool ``[R, V]`` as the bitmask of ``sample``, int32 ``[R, ceil(V / 32)]``."""
    rows, vocab = allowed.shape
    bits = torch.zeros(rows, (vocab + 31) // 32 * 32, dtype=torch.int64)
    bits[:, :vocab] = allowed
    return (bits.view(rows, -1, 32) << torch.arange(32)).sum(dim=2).to(torch.int32)


Sampler = Callable[[Law, Tensor, Tensor, Tensor], Tensor]  # law, seeds [N], positions [N], streams [N] -> tokens [N] on the CPU


def draw(sampler: Sampler, law: Law, vary: str, draws: int, key: int = 42) -> Tensor:
    """``draws`` tokens over consecutive positions, seeds or streams, or over seeds spread over all 64 bits; int64 ``[draws]``.

    Each law has a place of its own in what is not varied, so that the draws of two laws are independent.
    """
    place = zlib.crc32(law.name.encode()) >> 8
    tokens = []
    rows = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // len(law.logits)))
    for first in range(0, draws, rows):
        index = torch.arange(first, min(first + rows, draws))
        fixed = torch.zeros_like(index)
        seed = {"seed": key + index, "wide seed": key + index * 0x9E3779B97F4A7C15}.get(vary, fixed + key)
        position = index if vary == "position" else fixed + (place if vary == "stream" else 17)
        stream = index if vary == "stream" else fixed + place
        tokens.append(sampler(law, seed, position, stream))
    return torch.cat(tokens)


# ---- statistics ----


class Statistic(NamedTuple):
    """A statistic and the chance that the law gives one as far off."""

    value: float
    freedom: int | None
    p: float


def chi_square(observed: Tensor, probabilities: Tensor) -> Statistic:
    """Pearson's, of counts against probabilities. Cells that expect less than 5 are pooled with the next likely ones; p is 0 where
    something impossible was drawn."""
    draws = int(observed.sum())
    order = probabilities.argsort(descending=True, stable=True)
    expected, seen = probabilities[order] * draws, observed[order].double()
    if bool(seen[expected == 0].any()):
        return Statistic(math.inf, 0, 0.0)
    alone = int((expected >= 5).sum())
    pool = ((expected[alone:].cumsum(0) - expected[alone:]) / 5).floor().long()
    cell = torch.cat([torch.arange(alone), alone + pool])
    size = int(cell.max()) + 1
    cells_expected, cells_seen = (torch.zeros(size, dtype=torch.float64).index_add(0, cell, t) for t in (expected, seen))
    large = cells_expected >= 5
    rest = [float(t[~large].sum()) for t in (cells_seen, cells_expected)]  # joins the last of the large
    cells_seen, cells_expected = cells_seen[large], cells_expected[large]
    cells_seen[-1] += rest[0]
    cells_expected[-1] += rest[1]
    value = float(((cells_seen - cells_expected) ** 2 / cells_expected).sum())
    freedom = len(cells_seen) - 1
    if freedom == 0:
        return Statistic(value, 0, 1.0)
    return Statistic(value, freedom, float(torch.special.gammaincc(_number(freedom / 2), _number(value / 2))))


def poisson(hits: int, expected: float) -> Statistic:
    """Hits of rare events, both sides."""
    at_least = float(torch.special.gammainc(_number(hits), _number(expected))) if hits else 1.0
    at_most = float(torch.special.gammaincc(_number(hits + 1), _number(expected)))
    return Statistic(hits, None, min(1.0, 2 * min(at_least, at_most)))


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ---- the laws that are checked ----

# Peaked rows: a flat one would hide many a wrong law. TIED has four tokens at its sixth largest value.
PEAKED = torch.tensor([4.0, 1.0, 3.5, -2.0, 0.0, 2.0, 3.0, -1.0, 1.5, -4.0, 0.5, -6.0])
TIED = torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0, -1.0, 0.0, 1.5, 2.5, -2.0, 0.0, -0.5])
FLAT = torch.tensor([0.1 * (i * 7 % 17) - 0.8 for i in range(17)])
# 12 sub-blocks of 128. GPT-2's logits are as far from 0, where bfloat16 has steps of a half.
LONG = torch.randn(1500, generator=torch.Generator().manual_seed(2)) * 2 - 100
COUNTS = {0: 2, 2: 1, 3: 3, 6: 0, 7: 0, 8: 5}  # positive and negative logits; 0 is a token of the prompt only
BIAS = {1: 2.5, 0: -1.5, 4: -math.inf, 9: 6.0}


def edge_of_top_p(inside: bool) -> Law:
    """A crowd of ties at the very edge of top-p: with ``top_p`` one step of float32 larger or smaller all of it is in or out.

    Which of the two is a matter of 2e-8 of the mass. A sum of 3,000 masses in float32 is wrong by more than that, in either direction,
    as its order falls.
    """
    generator = torch.Generator().manual_seed(EDGE_SEED)
    logits = torch.cat([1 + 2 * torch.rand(3000, generator=generator), torch.zeros(4000)])
    logits = logits[torch.randperm(len(logits), generator=generator)]
    mass = (logits.double() - logits.max().double()).exp()
    share = float(mass[logits > 0].sum() / mass.sum())
    near = torch.tensor(share, dtype=torch.float32)
    other = torch.nextafter(near, torch.tensor(1.0 if float(near) < share else 0.0))
    low, high = sorted((float(near), float(other)))
    name = "top-p, the edge just in" if inside else "top-p, the edge just out"
    return Law(name, logits, top_p=high if inside else low, cell=(logits == 0).long())


EDGE_SEED = 187  # found by search: the share of the crowd's betters lies halfway between two float32


def _mask(vocab: int, *forbidden: int) -> Tensor:
    allowed = torch.ones(vocab, dtype=torch.bool)
    allowed[list(forbidden)] = False
    return allowed


def small_laws() -> list[Law]:
    """Each control alone, on peaked and flat rows, then combinations."""
    return [
        Law("temperature 0.8, peaked", PEAKED, 0.8),
        Law("temperature 1.7, flat", FLAT, 1.7),
        Law("top-k 6 with ties", TIED, 1.3, top_k=6),
        Law("top-k 5, flat", FLAT, top_k=5),
        Law("top-p 0.8, peaked", PEAKED, top_p=0.8),
        Law("top-p 0.6, flat", FLAT, top_p=0.6),
        Law("top-p 0.9 with ties", TIED, top_p=0.9),
        Law("min-p 0.1, peaked", PEAKED, min_p=0.1),
        Law("min-p 0.5, flat", FLAT, min_p=0.5),
        Law("repetition penalty 1.4", PEAKED, repetition=1.4, counts=COUNTS),
        Law("presence penalty 0.9", PEAKED, presence=0.9, counts=COUNTS),
        Law("frequency penalty 0.5", PEAKED, frequency=0.5, counts=COUNTS),
        Law("bias", PEAKED, bias=BIAS),
        Law("allowed tokens", PEAKED, allowed=_mask(12, 0, 6, 11)),
        Law("end tokens, one position early", PEAKED, end_tokens=(0, 5), early=True),
        Law("end tokens, in time", PEAKED, end_tokens=(0, 5)),
        Law("top-k 3 + top-p 0.8", PEAKED, top_k=3, top_p=0.8),
        Law("top-k 6 with ties + top-p 0.95", TIED, top_k=6, top_p=0.95),
        Law("top-p 0.95 + min-p 0.2, flat", FLAT, 0.5, top_p=0.95, min_p=0.2),
        Law("penalties + bias", PEAKED, repetition=1.2, presence=0.3, frequency=0.2, counts=COUNTS, bias=BIAS),
        Law(
            "all controls", PEAKED, 1.4, top_k=9, top_p=0.97, min_p=0.01, repetition=1.2, presence=0.3, frequency=0.2, counts=COUNTS,
            bias={1: 2.5, 0: -1.5, 9: 6.0}, end_tokens=(5,), early=True, allowed=_mask(12, 2),
        ),
    ]  # fmt: skip


def long_laws() -> list[Law]:
    """Over many sub-blocks, lanes and words of a kernel."""
    return [
        Law("long row", LONG),
        Law("long row, its sub-blocks", LONG, cell=torch.arange(1500) // 128),
        Law("long row, top-k 40", LONG, top_k=40),
        Law("long row, top-p 0.9", LONG, 0.9, top_p=0.9),
        Law("long row, min-p 0.02", LONG, min_p=0.02),
        Law(
            "long row, all controls", LONG, 0.9, top_k=300, top_p=0.95, min_p=0.001, repetition=1.01, presence=0.5, frequency=0.1,
            counts={7 * i: i % 4 for i in range(200)}, bias={11 * i: 0.5 - i % 2 for i in range(100)}, end_tokens=(3, 1499), early=True,
            allowed=torch.arange(1500) % 5 != 2,
        ),
    ]  # fmt: skip
