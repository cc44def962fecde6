"""The kernels of ``linear``: matrix products whose every output has the same bits in whatever batch its row is.

An output is ``sum over segments, in order, of (sum over k of the segment, from 0, in steps of BLOCK_K)``, then times the scale of its
weights (int8, fp8), plus bias, plus residual, then rounded to the dtype of ``out``. How K is cut depends on the widths of the matrices
alone. A program makes a tile of BLOCK_N outputs of BLOCK_M rows, and the weights are the first operand of the product: the machine's
instruction (on Hopper ``wgmma`` of 64 outputs and BLOCK_M rows, on Ampere ``mma.m16n8k16``) and the order in which it is issued are then
the same for one row as for a thousand, as long as BLOCK_M never changes; rows that are not there are zeros. BLOCK_M is 64: a batch of
decoded rows fits one tile, whose 64 multiply-adds for each weight are still fewer than a GPU does while it reads one of 16 bits; and
quantised weights go from the registers where they are unpacked right into the product.

Who computes the segments changes no bit: one program all of them (many rows: enough programs without), or each its own program, whose
sums ``linear_finish`` adds in order (few rows: otherwise a matrix of few outputs would leave most of the GPU idle).

Bytes that must move: the weights once, as stored; x and the result; split, 8 bytes for each output and segment besides (they stay in L2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sample_row import kernel

GROUP = tl.constexpr(32)  # of int4, along K; a block of K holds two: low nibbles, high nibbles
MAGIC, MAGIC_BITS = tl.constexpr(2.0**23), tl.constexpr(0x4B000000)
FLOAT_BITS = tl.constexpr(0x87F00000 - (1 << 32))  # the sign, and the seven bits after the highest of the exponent


@triton.jit
def _e4m3(bits):
    """float32 of float8_e4m3fn given as int8: its sign, exponent and mantissa where float32 has them, whose bias of the exponent is 127 and
    not 7: times 2^120. Exact, on every GPU."""
    return ((bits.to(tl.int32) << 20) & FLOAT_BITS).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _weights(w, scale, column, columns, stride, depth, k, FORMAT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile ``[BLOCK_N, BLOCK_K]`` of weights in DTYPE, without the scale of their output; past the last output any other's."""
    n = column + tl.arange(0, BLOCK_N)
    n = tl.where(n < columns, n - column, 0)
    offset = n[:, None] * stride + (k + tl.arange(0, BLOCK_K))[None, :]
    first = w + tl.cast(column, tl.int64) * stride
    if EVEN or FORMAT != "float":  # the rows of the other formats are padded with zeros to whole blocks
        tile = tl.load(first + offset)
    else:
        tile = tl.load(first + offset, mask=(k + tl.arange(0, BLOCK_K))[None, :] < depth, other=0.0)
    if FORMAT == "fp8":
        tile = _e4m3(tile)
    return tile.to(DTYPE)


@triton.jit
def _rows(x, stride, row, rows, depth, k, EVEN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile ``[BLOCK_M, BLOCK_K]`` of x in DTYPE; zeros past the last row and past K."""
    m = row + tl.arange(0, BLOCK_M)
    columns = k + tl.arange(0, BLOCK_K)
    there = m[:, None] < rows
    if not EVEN:
        there = there & (columns[None, :] < depth)
    return tl.load(x + m.to(tl.int64)[:, None] * stride + columns[None, :], mask=there, other=0.0).to(DTYPE)


@triton.jit
def _nibbles(w, scale, column, columns, k, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The two tiles ``[BLOCK_N, GROUP]`` of an int4 matrix from k on, rounded to DTYPE."""
    n = column + tl.arange(0, BLOCK_N)
    n = tl.where(n < columns, n, 0)
    block = tl.cast(k // (2 * GROUP), tl.int64) * columns
    packed = tl.load(w + block * GROUP + n[:, None] * GROUP + tl.arange(0, GROUP)[None, :]).to(tl.int32)
    scales = tl.load(scale + block + n)  # two float16 as one number: what is 4 bytes wide can be read ahead
    low_scale = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high_scale = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # q + 8 as the last bits of 2^23 is the float32 2^23 + 8 + q: cheaper than a conversion
    low = (((packed & 15) | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + 8)) * low_scale[:, None]
    high = (((packed >> 4) | MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + 8)) * high_scale[:, None]
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def _segment(x, x_stride, row, rows, w, scale, column, columns, stride, depth, begin, end, FORMAT: tl.constexpr, EVEN: tl.constexpr,
             DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """float32 ``[BLOCK_N, BLOCK_M]``: the sum over k from begin to end."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(begin, end, BLOCK_K):
        if FORMAT == "int4":
            low, high = _nibbles(w, scale, column, columns, k, DTYPE, BLOCK_N)
            x_low = _rows(x, x_stride, row, rows, depth, k, EVEN, DTYPE, BLOCK_M, GROUP)
            total = tl.dot(low, tl.trans(x_low), total, input_precision="ieee")
            x_high = _rows(x, x_stride, row, rows, depth, k + GROUP, EVEN, DTYPE, BLOCK_M, GROUP)
            total = tl.dot(high, tl.trans(x_high), total, input_precision="ieee")
        else:
            tile = _weights(w, scale, column, columns, stride, depth, k, FORMAT, EVEN, DTYPE, BLOCK_N, BLOCK_K)
            x_tile = _rows(x, x_stride, row, rows, depth, k, EVEN, DTYPE, BLOCK_M, BLOCK_K)
            total = tl.dot(tile, tl.trans(x_tile), total, input_precision="ieee")
    return total


@triton.jit
def output_scale(scale, column, columns, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 ``[BLOCK_N]``: what multiplies the sums of int8 and fp8 weights; ones for the other formats."""
    n = column + tl.arange(0, BLOCK_N)
    if FORMAT == "int8" or FORMAT == "fp8":
        return tl.load(scale + n, mask=n < columns, other=0.0)
    return tl.full((BLOCK_N,), 1.0, tl.float32)


@triton.jit
def product(x, x_stride, row, rows, w, scale, column, columns, stride, depth, segment_depth, SEGMENTS: tl.constexpr, FORMAT: tl.constexpr,
            EVEN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """float32 ``[BLOCK_N, BLOCK_M]``: ``w @ x.T`` of the outputs from ``column`` and the rows from ``row``, all segments; without bias.

    ``w [columns, depth]`` with row stride ``stride`` (of int4 the order of ``QuantizedWeight``), ``x [rows, depth]``. Outputs past
    ``columns`` hold those of another, rows past ``rows`` zeros. Also the product of the LM head that draws its tokens itself.
    """
    if SEGMENTS == 1:
        total = _segment(x, x_stride, row, rows, w, scale, column, columns, stride, depth, 0, depth, FORMAT, EVEN, DTYPE, BLOCK_M,
                         BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for s in range(SEGMENTS):
            begin = s * segment_depth
            total += _segment(x, x_stride, row, rows, w, scale, column, columns, stride, depth, begin,
                              tl.minimum(begin + segment_depth, depth), FORMAT, EVEN, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if FORMAT == "int8" or FORMAT == "fp8":
        total = total * output_scale(scale, column, columns, FORMAT, BLOCK_N)[:, None]
    return total


@triton.jit
def _choose(tile, tiles0, tiles1, of0, of1, of2, MATRICES: tl.constexpr):
    """That of the three which belongs to the matrix of a tile of outputs; None if there is none."""
    chosen = of0
    if of0 is not None:
        if MATRICES >= 2:
            chosen = tl.where(tile < tiles0, chosen, of1)
        if MATRICES >= 3:
            chosen = tl.where(tile < tiles0 + tiles1, chosen, of2)
    return chosen


@triton.jit
def _place(tile, columns0, columns1, columns2, MATRICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of outputs: the tiles of the first two matrices, the outputs of its matrix, its first output there, and the outputs of the
    matrices before."""
    tiles0, tiles1 = tl.cdiv(columns0, BLOCK_N), tl.cdiv(columns1, BLOCK_N)
    columns = _choose(tile, tiles0, tiles1, columns0, columns1, columns2, MATRICES)
    before = _choose(tile, tiles0, tiles1, 0, tiles0, tiles0 + tiles1, MATRICES)
    start = _choose(tile, tiles0, tiles1, 0, columns0, columns0 + columns1, MATRICES)
    return tiles0, tiles1, columns, (tile - before) * BLOCK_N, start


@triton.jit
def _store(total, bias, columns, n, there, where, residual, out):
    """``total`` plus bias plus residual to ``out``; ``n`` and ``there`` as total."""
    if bias is not None:
        total = total + tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    if residual is not None:
        total = total + tl.load(residual + where, mask=there, other=0.0)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=there)


@kernel
def linear_tiles(x, x_stride, rows, depth, w0, w1, w2, scale0, scale1, scale2, bias0, bias1, bias2, columns0, columns1, columns2, stride,
                 residual, out, out_stride, out_start, partial, segment_depth, MATRICES: tl.constexpr, SEGMENTS: tl.constexpr,
                 SPLIT: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One tile of the result, or (SPLIT) of one segment's sums in ``partial [SEGMENTS, rows, columns0 + columns1 + columns2]``. Grid: tiles
    of rows (next to each other, so that they read the weights together), tiles of outputs of all matrices, segments if SPLIT."""
    row = tl.program_id(0) * BLOCK_M
    tile = tl.program_id(1)
    tiles0, tiles1, columns, column, start = _place(tile, columns0, columns1, columns2, MATRICES, BLOCK_N)
    w = _choose(tile, tiles0, tiles1, w0, w1, w2, MATRICES)
    scale = _choose(tile, tiles0, tiles1, scale0, scale1, scale2, MATRICES)
    n = (column + tl.arange(0, BLOCK_N))[:, None]
    m = (row + tl.arange(0, BLOCK_M))[None, :]
    there = (n < columns) & (m < rows)
    if SPLIT:
        begin = tl.program_id(2) * segment_depth
        total = _segment(x, x_stride, row, rows, w, scale, column, columns, stride, depth, begin,
                         tl.minimum(begin + segment_depth, depth), FORMAT, EVEN, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        width = columns0 + columns1 + columns2
        line = tl.program_id(2).to(tl.int64) * rows + m
        tl.store(partial + line * width + start + n, total, mask=there)
    else:
        total = product(x, x_stride, row, rows, w, scale, column, columns, stride, depth, segment_depth, SEGMENTS, FORMAT, EVEN, DTYPE,
                        BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        bias = _choose(tile, tiles0, tiles1, bias0, bias1, bias2, MATRICES)
        where = m.to(tl.int64) * out_stride + out_start + start + n
        _store(total, bias, columns, n, there, where, residual, out)


@kernel
def linear_finish(partial, rows, scale0, scale1, scale2, bias0, bias1, bias2, columns0, columns1, columns2, residual, out, out_stride,
                  out_start, MATRICES: tl.constexpr, SEGMENTS: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds the segments of ``linear_tiles`` in order and finishes as it does. Grid: tiles of rows, tiles of outputs of all matrices."""
    tile = tl.program_id(1)
    tiles0, tiles1, columns, column, start = _place(tile, columns0, columns1, columns2, MATRICES, BLOCK_N)
    n = (column + tl.arange(0, BLOCK_N))[None, :]
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    there = (n < columns) & (m < rows)
    width = columns0 + columns1 + columns2
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for s in tl.static_range(SEGMENTS):
        line = s * tl.cast(rows, tl.int64) + m
        total += tl.load(partial + line * width + start + n, mask=there, other=0.0)
    if FORMAT == "int8" or FORMAT == "fp8":
        scale = _choose(tile, tiles0, tiles1, scale0, scale1, scale2, MATRICES)
        total = total * output_scale(scale, column, columns, FORMAT, BLOCK_N)[None, :]
    bias = _choose(tile, tiles0, tiles1, bias0, bias1, bias2, MATRICES)
    where = m.to(tl.int64) * out_stride + out_start + start + n
    _store(total, bias, columns, n, there, where, residual, out)


@kernel
def quantized_rows(ids, table, scale, out, vocab, width, stride, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """``embed`` of a quantised table, the weights of a tied head: rows of it in float32. Grid: tokens, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    known = (token >= 0) & (token < vocab)
    there = known & (column < width)
    if FORMAT == "int4":
        line = (column // (2 * GROUP)).to(tl.int64) * vocab + token
        packed = tl.load(table + line * GROUP + column % GROUP, mask=there, other=0).to(tl.int32)
        half = column // GROUP % 2
        x = (((packed >> (4 * half)) & 15) - 8).to(tl.float32)
        factor = (tl.load(scale + line, mask=there, other=0) >> (16 * half)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = tl.load(table + token * stride + column, mask=there, other=0)
        x = _e4m3(x) if FORMAT == "fp8" else x.to(tl.float32)
        factor = tl.load(scale + token, mask=known, other=0.0)
    tl.store(out + row * width + column, tl.where(known, x * factor, float("nan")), mask=column < width)
