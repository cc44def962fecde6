"""``sample_head`` on a GPU in Triton: the launches and their memory (contract in ``api``; the kernels are in ``head_kernels``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks_sample
from ..api import HeadDraw
from . import linear
from .head_kernels import head_merge, head_tiles
from .launch import Launch, check_device, launch, run


def sample_head(
    x: Tensor,
    head: linear.Weight,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
    *,
    first_token: int = 0,
) -> HeadDraw:
    """See ``api.sample_head``. A ``first_token`` that is no multiple of 4 makes the noise cost up to four times as much."""
    checks_sample.sample_head(x, head, temperature, seed, position, stream, first_token)
    check_device(x.device, "x")
    rows = len(x)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    result = HeadDraw(
        tokens=empty(rows, dtype=torch.int64), status=empty(rows, dtype=torch.int32), scores=empty(rows), logprobs=empty(2, rows),
        largest=empty(2, rows), mass=empty(2, rows),
    )  # fmt: skip
    run(launches(result, x, head, temperature, seed, position, stream, first_token), x.device)
    return result


def launches(
    result: HeadDraw, x: Tensor, head: linear.Weight, temperature: Tensor, seed: Tensor, position: Tensor, stream: Tensor, first_token: int
) -> Sequence[Launch]:
    """The kernels of a call in order, each with its grid and arguments."""
    rows, depth = x.shape
    vocab = head.shape[0]
    format, dtype = linear._format(head), linear.product_dtype(x, head)
    cut = linear.tiling(vocab, depth, format, dtype)
    tiles = -(-vocab // cut.block_n)
    product = {
        "x": x,
        "x_stride": x.stride(0),
        "head": linear._data(head),
        "scale": getattr(head, "scale", None),
        "stride": linear.row_stride(head),
        "depth": depth,
        "segment_depth": cut.segment_depth,
        "vocab": vocab,
        "SEGMENTS": cut.segments,
        "FORMAT": format,
        "EVEN": depth % cut.block_k == 0,
        "DTYPE": linear._DTYPE[dtype],
        **cut.constants(),
    }

    def scratch(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((rows, tiles), dtype=dtype, device=x.device)

    of_tiles = {"scores": scratch(), "winners": scratch(torch.int32), "logits": scratch(), "largest": scratch(), "mass": scratch(), "scaled_mass": scratch()}
    common = {"rows": rows, "first_token": first_token, "temperature": temperature, "tiles": tiles, "BLOCK_N": cut.block_n}
    draw = {"seed": seed, "position": position, "stream": stream, "ALIGNED": first_token % 4 == 0}
    return [
        launch(head_tiles, (-(-rows // linear.BLOCK_M), tiles), common, of_tiles, product, draw),
        launch(
            head_merge, (rows,), common, of_tiles,
            {"tokens": result.tokens, "status": result.status, "scores": result.scores, "logprobs": result.logprobs},
            {"all_largest": result.largest, "all_mass": result.mass},
        ),
    ]  # fmt: skip
