"""The kernels of ``embed``, ``rms_norm``, ``silu_mul`` and ``feed_tokens``, which the forward (``Transformer.hidden``) and the step before
it call.

Each reads its input once and writes its result once: ``embed`` the bytes of T rows of the table and 4 T H, ``rms_norm`` 4 M H and M H
results, ``silu_mul`` 2 M F and M F results. At one row their time is that of a launch and of one trip to memory, so a program asks for all
that it needs before it computes anything. A row is computed by one program (``embed`` and ``silu_mul``: element by element), in an order
that its width alone decides.
"""

from __future__ import annotations

import triton.language as tl

from .sample_row import kernel


@kernel
def embed_rows(ids, table, out, vocab, width, BLOCK: tl.constexpr):
    """Grid: tokens, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    known = (token >= 0) & (token < vocab)
    x = tl.load(table + token * width + column, mask=known & (column < width), other=0.0).to(tl.float32)
    tl.store(out + row * width + column, tl.where(known, x, float("nan")), mask=column < width)


@kernel
def norm_rows(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < WIDTH
    w = tl.load(weight + column, mask=there, other=0.0)
    values = tl.load(x + row * WIDTH + column, mask=there, other=0.0)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) * (1.0 / WIDTH) + eps)
    tl.store(out + row * WIDTH + column, (values * factor * w.to(tl.float32)).to(out.dtype.element_ty), mask=there)


@kernel
def silu_rows(x, out, width, BLOCK: tl.constexpr):
    """Grid: rows, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(x + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + (row * 2 + 1) * width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=there)


@kernel
def feed_rows(ids, source, drawn, rows, num_drawn, BLOCK: tl.constexpr):
    """Grid: blocks of the tokens."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(source + row, mask=row < rows, other=-1)
    fed = (place >= 0) & (place < num_drawn)
    tl.store(ids + row, tl.load(drawn + place, mask=fed, other=0).to(tl.int32), mask=fed)
