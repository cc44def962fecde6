"""``sample_head`` on a GPU in Triton: the launches and their memory (contract in ``api``; the kernels are in ``head_kernels``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks_sample
from ..api import HeadDraw
from ..packed import PackedWeight
from ..quantized import QuantizedWeight
from .head_kernels import head_merge, head_tiles
from .launch import Launch, check_device, launch, run
from .linear_launch import BLOCK_M, Weight, dtype_of, elements, format_of, product_arguments, scales, tiling


def sample_head(
    x: Tensor,
    head: Tensor | PackedWeight | QuantizedWeight,
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
    if isinstance(head, PackedWeight):
        raise TypeError(f"head is packed for the CPU's kernels ({head.format}); a GPU takes tensors or kernels.quantize(...)")
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
    result: HeadDraw, x: Tensor, head: Weight, temperature: Tensor, seed: Tensor, position: Tensor, stream: Tensor, first_token: int
) -> Sequence[Launch]:
    """The kernels of a call in order, each with its grid and arguments."""
    rows, depth = x.shape
    vocab = head.shape[0]
    cut = tiling(vocab, depth, format_of(head), dtype_of(x, head))
    tiles = -(-vocab // cut.block_n)

    def scratch(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((rows, tiles), dtype=dtype, device=x.device)

    of_tiles = {
        "tile_scores": scratch(), "tile_tokens": scratch(torch.int32), "tile_logits": scratch(), "tile_largest": scratch(),
        "tile_mass": scratch(), "tile_scaled_mass": scratch(), "tiles": tiles,
    }  # fmt: skip
    common = {"rows": rows, "first_token": first_token, "temperature": temperature, "BLOCK_N": cut.block_n}
    matrix = {"head": elements(head), "scale": scales(head), "vocab": vocab}
    draw = {"seed": seed, "position": position, "stream": stream, "ALIGNED": first_token % 4 == 0}
    return [
        launch(head_tiles, (-(-rows // BLOCK_M), tiles), common, of_tiles, matrix, draw, product_arguments(x, head, cut)),
        launch(
            head_merge, (rows,), common, of_tiles,
            {"tokens": result.tokens, "status": result.status, "scores": result.scores, "logprobs": result.logprobs},
            {"largest": result.largest, "mass": result.mass},
        ),
    ]  # fmt: skip
