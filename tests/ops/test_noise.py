"""The noise of the token law: known answers, accuracy, and the same bits in PyTorch and in every instruction set's C++."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu, fixed_math, noise

needs_cpp = pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason=str(cpu.unavailable("cpu")))
MASK = 0xFFFFFFFF


# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# seed 7, stream 1: positions and tokens whose word is below 256, the word and its tail
RARE = [(487, 2256, 38, 1840732209), (379, 21310, 4, 1683029220), (529, 33467, 206, 1443201201)]


def philox_of_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, straight from the paper."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = q >> 32 ^ b ^ k0, q & MASK, p >> 32 ^ d ^ k1, p & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    k0, k1 = (torch.tensor([k]) for k in key)
    assert tuple(int(w) for w in noise.philox4x32((c0, c1, c2, c3), (k0, k1))) == expected
    assert philox_of_integers(counter, key) == expected


# Seeds, positions and streams at the ends of their ranges.
KEYS = [(0, 0, 0), (-1, -1, -1), (0x0123456789ABCDEF, 77, 3), (2**63 - 1, 2**31 - 1, 2**31 - 1), (-(2**63), -(2**31), 9)]


def rows_of(keys: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    seed, position, stream = zip(*keys, strict=True)
    return torch.tensor(seed), torch.tensor(position, dtype=torch.int32), torch.tensor(stream, dtype=torch.int32)


def test_each_token_takes_its_word() -> None:
    words = noise.words(*rows_of(KEYS), 70)
    for row, (seed, position, stream) in enumerate(KEYS):
        for token in (0, 1, 2, 3, 4, 31, 69):
            block = philox_of_integers((token >> 2, position & MASK, stream & MASK, 0), (seed & MASK, seed >> 32 & MASK))
            assert int(words[row, token]) == block[token & 3]


@pytest.mark.parametrize(("position", "token", "word", "tail"), RARE)
def test_small_words_get_a_tail(position: int, token: int, word: int, tail: int) -> None:
    row = noise.noise(*rows_of([(7, position, 1)]), token + 1)
    assert int(row.word[0, token]) == word < noise.TAIL_WORDS
    assert int(row.low[0, token]) == tail == philox_of_integers((token >> 2, position, 1, noise.DOMAIN_TAIL), (7, 0))[token & 3]
    assert not row.low[row.word >= noise.TAIL_WORDS].any()
    u = ((word << 32) + tail + 0.5) * 2.0**-64
    assert float(row.exponential[0, token]) == pytest.approx(u, rel=1e-6)


def hostile_words() -> tuple[Tensor, Tensor]:
    """Words at and around every boundary, many random ones, and tails with their own extremes; int64."""
    edges = [0, noise.TAIL_WORDS, 1 << 23, 1 << 24, 1 << 29, 1 << 30, 1 << 31, 3 << 30, 1258291200, 1 << 32]  # 2^32 (1 - sqrt(1/2)) too
    around = torch.cat([torch.arange(e - 3000, e + 3000) for e in edges])
    generator = torch.Generator().manual_seed(1)
    words = torch.cat([around[(around >= 0) & (around <= MASK)], torch.randint(0, 1 << 32, (200_000,), generator=generator)])
    tails = torch.randint(0, 1 << 32, words.shape, generator=generator)
    extremes = torch.tensor([0, 1, 1 << 23, 1 << 24, 1 << 31, MASK])
    small = torch.arange(noise.TAIL_WORDS)
    words = torch.cat([words, small.repeat_interleave(len(extremes))])
    tails = torch.cat([tails, extremes.repeat(len(small))])
    return words, tails


def test_exponential_is_accurate_everywhere() -> None:
    words, tails = hostile_words()
    e = noise.exponential(words, tails)
    small = words < 1 << 31
    u = torch.where(words < noise.TAIL_WORDS, ((words << 32) + tails).double() * 2.0**-64 + 2.0**-65, (words.double() + 0.5) * 2.0**-32)
    exact = torch.where(small, -torch.log1p(-u), -(((MASK - words).double() + 0.5) * 2.0**-32).log())
    assert float(((e.double() - exact) / exact).abs().max()) < 2.1e-7
    first, last = noise.exponential(torch.tensor([0, MASK]), torch.tensor([0, 0])).tolist()
    assert first == 2.0**-65 and last == pytest.approx(33 * math.log(2), rel=1e-7)
    assert float(e.min()) == first and float(e.max()) == last


def test_noise_never_rises_with_the_word() -> None:
    """Up to the last bit: where two branches meet there is no step."""
    words = torch.cat([torch.arange(e - 20000, e + 20000) for e in (noise.TAIL_WORDS + 20000, 1 << 30, 1 << 31, 3 << 30)])
    e = noise.exponential(words, torch.zeros_like(words)).double()
    follows = words[1:] == words[:-1] + 1
    assert float((e[:-1] / e[1:])[follows].max()) < 1 + 3e-7


def test_logarithm_is_accurate_everywhere() -> None:
    x = torch.cat([torch.arange(0x3F800000, 0x40000000, 97, dtype=torch.int32).view(torch.float32) * 2.0**e for e in range(-66, 6)])
    near_one = torch.arange(0x3F7F0000, 0x3F810000, dtype=torch.int32).view(torch.float32)
    for values in (x[x != 1], near_one[near_one != 1]):
        exact = values.double().log()
        assert float(((fixed_math.log(values).double() - exact) / exact).abs().max()) < 8.4e-8
    assert fixed_math.log(torch.tensor([1.0])).item() == 0.0


def cpp_noise(key: tuple[int, int, int], vocab: int) -> tuple[Tensor, Tensor]:
    words, tails = torch.empty(vocab, dtype=torch.int32), torch.empty(vocab, dtype=torch.int32)
    cpu._cpu.noise_of_row(*key, vocab, words.data_ptr(), tails.data_ptr())
    return words.long() & MASK, tails.long() & MASK


def compare_cpp() -> None:
    """Words, tails, E and log(E) of the C++ in use against PyTorch's, bit for bit."""
    for key in KEYS:
        for vocab in (1, 5, 127, 128, 129, 1000):
            expected = noise.noise(*rows_of([key]), vocab)
            words, tails = cpp_noise(key, vocab)
            assert torch.equal(words, expected.word[0]) and torch.equal(tails, expected.low[0])
    for position, token, word, tail in RARE:
        words, tails = cpp_noise((7, position, 1), token + 1)
        assert (int(words[token]), int(tails[token])) == (word, tail)
    words, tails = hostile_words()
    compact = [t.to(torch.uint32) for t in (words, tails)]
    e, log_e = torch.empty(len(words)), torch.empty(len(words))
    cpu._cpu.noise_of_words(compact[0].data_ptr(), compact[1].data_ptr(), len(words), e.data_ptr(), log_e.data_ptr())
    expected_e = noise.exponential(words, tails)
    assert torch.equal(e.view(torch.int32), expected_e.view(torch.int32))
    assert torch.equal(log_e.view(torch.int32), fixed_math.log(expected_e).view(torch.int32))
    d = hostile_differences()
    for count in (1, 7, 127, 128, 129, len(d)):
        assert torch.equal(cpp_weights(d[:count].contiguous()), fixed_math.weight(d[:count]))


def hostile_differences() -> Tensor:
    """d <= 0 at and around every boundary of the weight, and many random ones; float32."""
    generator = torch.Generator().manual_seed(2)
    edges = torch.tensor([0.0, -0.0, -1e-45, -1e-30, -28.0, -1e30, -3e38, -math.inf])
    bits = torch.tensor([0.5, 1.5, 20.5, 40.0]) * math.log(2)  # where n changes
    near = -(bits.view(torch.int32)[:, None] + torch.arange(-500, 500)).view(torch.float32).flatten()
    floor = -(torch.tensor([28.0]).view(torch.int32) + torch.arange(-500, 500, dtype=torch.int32)).view(torch.float32)
    spread = torch.rand(200_000, generator=generator)
    return torch.cat([edges, near, floor, -28.5 * spread, -(spread**8)])


def test_weight_is_accurate_everywhere() -> None:
    d = hostile_differences()
    weight = fixed_math.weight(d)
    exact = d.double().exp() * 2.0**fixed_math.WEIGHT_BITS
    assert bool(((weight.double() - exact).abs() <= 1 + 1e-7 * exact).all())
    assert int(weight[0]) == 2**40 == int(weight.max()) and int(weight.min()) == 0
    assert not weight[d < fixed_math.WEIGHT_FLOOR].any()


def test_needed_mass_is_that_of_python_integers() -> None:
    masses = [1, 2, 3, 2**31 - 1, 2**31, 2**40, 2**40 + 1, 12345678901234567, 2**62 - 1]
    shares = [0.0, 2.0**-40, 0.1, 0.5, 0.9, 1 - 2.0**-24]
    for mass in masses:
        for share in torch.tensor(shares):
            numerator = int(float(share) * 2**31)
            expected = max(1, -(-numerator * mass // 2**31))
            assert int(fixed_math.mass_needed(torch.tensor([mass]), share[None])) == expected


def cpp_weights(d: Tensor) -> Tensor:
    weights = torch.empty(len(d), dtype=torch.int64)
    cpu._cpu.weights_of_values(d.data_ptr(), len(d), weights.data_ptr())
    return weights


@needs_cpp
def test_cpp_has_the_same_bits() -> None:
    compare_cpp()


@needs_cpp
def test_every_instruction_set_has_the_same_bits() -> None:
    for isa in cpu._cpu.supported_isas():
        if isa == cpu._cpu.isa():
            continue
        code = f"from engine.kernels import cpu; assert cpu._cpu.isa() == {isa!r}; import test_noise; test_noise.compare_cpp()"
        environment = {**os.environ, "ENGINE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent)
