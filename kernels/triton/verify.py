"""``verify_drafts`` on a GPU in Triton: its launch (contract in ``api``; the kernel in ``verify_walk``).

The grid depends on shapes alone, nothing waits for the host, and calls can be captured in a CUDA graph. Values out of range, which are not
read before the launch, do not raise: a sequence whose rows do not lie in the call has -1 drafts accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks_verify
from ..api import VerifyResult
from .launch import Launch, check_device, launch, run
from .verify_walk import verify_walk


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
