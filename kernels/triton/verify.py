"""``verify_drafts`` and ``verify_block`` on a GPU in Triton: their launches (contracts in ``api``; the kernels in ``verify_walk`` and
``verify_chain``).

Grids depend on shapes alone, nothing waits for the host, and calls can be captured in a CUDA graph. Values out of range, which are not
read before the launch, do not raise: a sequence whose rows do not lie in the call has -1 drafts accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks_verify
from ..api import VerifyResult
from .launch import Launch, check_device, launch, run
from .verify_chain import chain_accept, chain_draw, chain_residuals, chain_tokens, chain_totals, chain_weights
from .verify_walk import verify_walk

_CHUNK = 1024  # tokens of a program of `verify_block`


def verify_drafts(tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> VerifyResult:
    """See ``api.verify_drafts``."""
    checks_verify.verify_drafts(tokens, status, draft, parent, start)
    check_device(tokens.device, "tokens")
    result = VerifyResult(torch.empty_like(start[1:]), torch.empty_like(draft))
    run(launches(result, tokens, status, draft, parent, start), tokens.device)
    return result


def launches(result: VerifyResult, tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> Sequence[Launch]:
    """The kernel of a call, with its grid and arguments."""
    given = {"tokens": tokens, "status": status, "draft": draft, "parent": parent, "start": start, "rows": len(tokens)}
    return [launch(verify_walk, (len(start) - 1,), given, {"num_accepted": result.num_accepted, "path": result.path})]


def verify_block(
    target: Tensor, status: Tensor, proposal: Tensor, draft: Tensor, start: Tensor, seed: Tensor, position: Tensor, stream: Tensor
) -> VerifyResult:
    """See ``api.verify_block``."""
    checks_verify.verify_block(target, status, proposal, draft, start, seed, position, stream)
    check_device(target.device, "target")
    accepted = torch.empty_like(start[1:])
    result = VerifyResult(accepted, torch.empty_like(draft), torch.empty_like(seed), torch.empty_like(accepted))
    run(block_launches(result, target, status, proposal, draft, start, seed, position, stream), target.device)
    return result


def block_launches(
    result: VerifyResult,
    target: Tensor,
    status: Tensor,
    proposal: Tensor,
    draft: Tensor,
    start: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: Tensor,
) -> Sequence[Launch]:
    """The kernels of a call in order, each with its grid and arguments."""
    rows, vocab = target.shape
    sequences, chunks, device = len(start) - 1, -(-vocab // _CHUNK), target.device
    i32, i64, f64 = torch.int32, torch.int64, torch.float64
    masses = {"target": target, "proposal": proposal, "totals": torch.zeros((rows, 2), dtype=i64, device=device), "vocab": vocab}
    weights = {"weights": torch.full((rows,), -1.0, dtype=f64, device=device)}
    residuals = {"residuals": torch.zeros(rows, dtype=i64, device=device)}
    chains = {"status": status, "start": start, "rows": rows}
    ends = {"ends": torch.empty(sequences, dtype=f64, device=device), "lengths": torch.empty(sequences, dtype=i32, device=device)}
    draw = {"seed": seed, "position": position, "stream": stream}
    drawn = {
        "drawn_row": torch.empty(sequences, dtype=i64, device=device),
        "drawn_weight": torch.empty(sequences, dtype=f64, device=device),
    }
    best = {"best": torch.empty(sequences, dtype=i64, device=device)}
    outcome = {"num_accepted": result.num_accepted, "path": result.path, "tokens": result.tokens, "outcome": result.status}
    of_chunk = {"CHUNK": _CHUNK}
    return [
        launch(chain_totals, (rows, chunks), masses, of_chunk),
        launch(chain_weights, (sequences,), masses, chains, weights, ends, {"draft": draft}),
        launch(chain_residuals, (rows, chunks), masses, weights, residuals, of_chunk),
        launch(chain_accept, (sequences,), chains, draw, weights, ends, residuals, outcome, drawn, best),
        launch(chain_draw, (sequences, chunks), masses, draw, drawn, best, of_chunk),
        launch(chain_tokens, (sequences,), best, {"tokens": result.tokens}),
    ]
