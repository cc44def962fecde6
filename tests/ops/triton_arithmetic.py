"""The Triton forms of the law's noise, logarithm, exponential and masses against their specification, under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import fixed_math as law
from engine.kernels import noise as noise_law
from engine.kernels.triton import fixed_math, noise


@triton.jit
def _noise(words, tails, out, tailed, lower, upper, N: tl.constexpr):
    index = tl.arange(0, N)
    word = tl.load(words + index).to(tl.uint32)
    tl.store(out + index, noise.log_exponential(word))
    tl.store(tailed + index, noise.log_exponential_tailed(word, tl.load(tails + index).to(tl.uint32)))
    low, high = noise.bounds(word)
    tl.store(lower + index, low)
    tl.store(upper + index, high)


@triton.jit
def _weight(d, out, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, fixed_math.weight(tl.load(d + index)))


@triton.jit
def _mass_needed(mass, top_p, out, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, fixed_math.mass_needed(tl.load(mass + index), tl.load(top_p + index)))


@triton.jit
def _order(x, tokens, o, back, value, token, N: tl.constexpr):
    index = tl.arange(0, N)
    ordered = fixed_math.ordered(tl.load(x + index))
    tl.store(o + index, ordered)
    tl.store(back + index, fixed_math.unordered(ordered))
    key = fixed_math.make_key(ordered, tl.load(tokens + index))
    tl.store(value + index, fixed_math.key_value(key))
    tl.store(token + index, fixed_math.key_token(key))


def _padded(values: Tensor) -> Tensor:
    """As many values as a power of two, the last one repeated."""
    size = 1 << (len(values) - 1).bit_length()
    return torch.cat([values, values[-1:].expand(size - len(values))])


def check() -> dict[str, Any]:
    wrong = []
    generator = torch.Generator().manual_seed(8)

    edges = [0, 256, 512, 1 << 14, 1 << 23, 1 << 24, 1 << 25, 1 << 28, 1 << 29, 1 << 30, 1 << 31, 3 << 30, 1258291200, 1 << 32]
    near = torch.tensor([e + i for e in edges for i in range(-3, 4) if 0 <= e + i < 1 << 32])
    words = _padded(torch.cat([torch.arange(300), near, torch.randint(0, 1 << 32, (16000,), generator=generator)]))
    tails = torch.randint(0, 1 << 32, words.shape, generator=generator)
    tails[:300:3], tails[1:300:3] = 0, (1 << 32) - 1
    out, tailed, lower, upper = torch.empty(4, len(words))
    _noise[(1,)](words, tails, out, tailed, lower, upper, len(words))
    low = torch.where(words < noise_law.TAIL_WORDS, tails, 0)
    expected = law.log(noise_law.exponential(words, low))
    if not torch.equal(tailed, expected):
        wrong.append("log(E) with tails")
    if not torch.equal(out[words >= noise_law.TAIL_WORDS], expected[words >= noise_law.TAIL_WORDS]):
        wrong.append("log(E) without tails")
    if not bool(((lower < -expected) & (-expected < upper)).all()):
        wrong.append("bounds of -log(E)")
    common = (words > 1 << 14) & (words < 1 << 28)
    if not bool((upper - lower)[common].max() < 0.2):
        wrong.append("bounds are too far apart to be of use")

    d = _padded(torch.cat([torch.linspace(-30, 0, 8000), torch.tensor([-0.0, -1e-8, -1e-40, -28.0, -28.000002, -1e30, -torch.inf])]))
    weights = torch.empty(len(d), dtype=torch.int64)
    _weight[(1,)](d, weights, len(d))
    if not torch.equal(weights, law.weight(d)):
        wrong.append("weights")

    mass = torch.randint(1, 1 << 62, (1024,), generator=generator)
    mass[:6] = torch.tensor([1, 2, (1 << 62) - 1, 1 << 31, (1 << 31) - 1, 1 << 61])
    top_p = torch.rand(1024, generator=generator)
    top_p[::4], top_p[1::4], top_p[2::64] = 1 - 2.0**-24, 0.0, 1e-40
    needed = torch.empty_like(mass)
    _mass_needed[(1,)](mass, top_p, needed, 1024)
    if not torch.equal(needed, law.mass_needed(mass, top_p)):
        wrong.append("mass_needed")

    inf = torch.inf
    x = torch.tensor([-inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-45, 1.0, 1.0 + 2.0**-23, 3e38, inf])
    x = _padded(torch.cat([x, torch.randn(1000, generator=generator)]))
    tokens = torch.randint(0, 1 << 22, x.shape, generator=generator, dtype=torch.int32)
    o, value, token = torch.empty(3, len(x), dtype=torch.int32)
    back = torch.empty_like(x)
    _order[(1,)](x, tokens, o, back, value, token, len(x))
    same_order = (o[:, None] < o[None, :]) == (x[:, None] < x[None, :])
    if not (bool(same_order.all()) and torch.equal(back, x) and torch.equal(value, o) and torch.equal(token, tokens)):
        wrong.append("order and keys")
    return {"rows": len(words) + len(d) + len(mass) + len(x), "wrong": wrong}
