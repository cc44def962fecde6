"""How calls of ``sample``, ``beam_select``, ``masses``, ``verify_drafts`` and ``verify_block`` specialise their kernels, for ``compile``:
argument dtypes, what is absent, and whether sizes are multiples of 16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import EndTokens, LogitBias, Penalties, VerifyResult
from . import beam, row_masses, sampler, verify
from .launch import Launch


class Variant(NamedTuple):
    """A way to call ``sample`` and ``beam_select``."""

    name: str
    dtype: torch.dtype
    vocab: int
    lists: bool = False
    mask: bool = False
    logprobs: int | None = None  # of `sample`
    noise: bool = False  # of `beam_select`


VARIANTS = (
    Variant("plain bf16", torch.bfloat16, 128256),
    Variant("plain fp32", torch.float32, 151936),
    Variant("everything fp32", torch.float32, 128256, lists=True, mask=True, logprobs=5, noise=True),
    Variant("everything fp16, odd V", torch.float16, 50257, lists=True, mask=True, logprobs=5, noise=True),
    Variant("V = 1", torch.float32, 1, lists=True, mask=True, logprobs=1, noise=True),
    Variant("V = 2^22", torch.bfloat16, 1 << 22),
)


def cases() -> Iterator[tuple[str, Iterator[Launch]]]:
    """See ``compile.CASES``."""
    for variant in VARIANTS:
        yield variant.name, _launches(variant)


def _launches(v: Variant) -> Iterator[Launch]:
    """The launches of all calls on meta tensors."""

    def make(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, entries, groups, candidates = 2, 32, 1, 8
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    logits = make(v.dtype, rows, v.vocab)
    floats, ints, seed = make(f32, rows), make(i32, rows), make(i64, rows)
    lists: list[Any] = [None] * 3
    if v.lists:
        ids, starts = make(i32, entries), make(i32, rows + 1)
        lists = [
            Penalties(floats, floats, floats, ids, ids, starts),
            LogitBias(ids, make(f32, entries), starts),
            EndTokens(ids, ints, starts),
        ]
    lists.append(make(i32, rows, -(-v.vocab // 32)) if v.mask else None)
    workspace = sampler.Workspace(rows, v.vocab, "meta", v.logprobs or 0, lists=v.lists)
    call: list[Any] = [workspace, logits, floats, ints, floats, floats, seed, ints, ints, *lists, v.logprobs]
    yield from sampler.launches(*call)
    draw = (seed, ints) if v.noise else (None, None)
    beams = beam.BeamWorkspace(rows, v.vocab, groups, candidates, "meta", lists=v.lists)
    call = [beams, logits, floats, make(i32, groups + 1), candidates, floats, ints, ints, *draw, *lists]
    yield from beam.launches(*call)
    yield from verify.launches(VerifyResult(ints, ints), seed, ints, ints, ints, make(i32, rows + 1))
    with_logprobs = sampler.Workspace(rows, v.vocab, "meta", lists=v.lists)
    mass = make(i64, rows, v.vocab)
    yield row_masses.launches(with_logprobs, mass, logits, floats, ints, floats, floats, ints, *lists)[-1]
    if v.lists:
        return  # which verify_block does not know
    block = VerifyResult(ints, ints, seed, ints)
    yield from verify.block_launches(block, mass, ints, mass, ints, make(i32, rows + 1), seed, ints, ints)
