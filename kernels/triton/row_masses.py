"""``masses`` on a GPU in Triton: its launches (contract in ``api``). The sampler's kernels find the threshold of each row, as they do where
log-probabilities are asked for, and ``masses_write`` writes the integers. Grids and values out of range: as in ``sampler``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks_sample
from ..api import EndTokens, LogitBias, Penalties
from .launch import CHUNK, Launch, check_device, launch, run
from .masses_write import masses_write
from .sample_race import sample_finish, sample_race
from .sampler import Workspace
from .sampler import launches as sample_launches


def masses(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    position: Tensor,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    end_tokens: EndTokens | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``api.masses``."""
    checks_sample.masses(logits, temperature, top_k, top_p, min_p, position, penalties, bias, end_tokens, allowed)
    check_device(logits.device)
    rows, vocab = logits.shape
    lists = penalties is not None or bias is not None or end_tokens is not None
    workspace = Workspace(rows, vocab, logits.device, lists=lists)
    mass = torch.empty((rows, vocab), dtype=torch.int64, device=logits.device)
    given = (temperature, top_k, top_p, min_p, position, penalties, bias, end_tokens, allowed)
    run(launches(workspace, mass, logits, *given), logits.device)
    return mass, workspace.status


def launches(
    w: Workspace,
    mass: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    position: Tensor,
    penalties: Penalties | None,
    bias: LogitBias | None,
    end_tokens: EndTokens | None,
    allowed: Tensor | None,
) -> Sequence[Launch]:
    """The kernels of a call in order, each with its grid and arguments."""
    rows, vocab = logits.shape
    seed = torch.zeros(rows, dtype=torch.int64, device=logits.device)  # of draws that nobody looks at
    calls = sample_launches(
        w, logits, temperature, top_k, top_p, min_p, seed, position, position, penalties, bias, end_tokens, allowed, logprobs=0
    )
    given = {
        "logits": logits, "row_stride": logits.stride(0), "vocab": vocab, "temperature": temperature,
        "values": w.values, "touched": w.touched, "listed": w.listed, "allowed": allowed, "state": w.state, "tokens": w.tokens,
        "status": w.status, "mass": mass,
    }  # fmt: skip
    search = [call for call in calls if call[0] not in (sample_race, sample_finish)]
    return [*search, launch(masses_write, (rows, -(-vocab // CHUNK)), given)]
