"""The oracles of ``verify_drafts``, ``masses`` and ``verify_block`` in plain PyTorch, any device (contracts in ``api``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks_sample, checks_verify, fixed_math
from . import noise as noise_law
from .api import STATUS_OK, EndTokens, LogitBias, Penalties, VerifyResult
from .reference_sample import distribution, parts

SHARE_BITS = 62  # a residual's masses are in units of 2^-62


def verify_drafts(tokens: Tensor, status: Tensor, draft: Tensor, parent: Tensor, start: Tensor) -> VerifyResult:
    """See ``api.verify_drafts``."""
    checks_verify.verify_drafts(tokens, status, draft, parent, start)
    starts, parents = start.tolist(), parent.tolist()
    checks_verify.starts(starts, len(tokens))
    checks_verify.parents(parents, starts)
    drawn, drafted, ok = tokens.tolist(), draft.tolist(), (status == STATUS_OK).tolist()
    accepted, path = [], [-1] * len(drawn)
    for first, last in zip(starts, starts[1:], strict=False):
        node, depth = first, 0
        path[first] = 0
        # Children come after their parent, so that one pass meets those of each node of the path, the first of them first.
        for r in range(first + 1, last):
            if first + parents[r] == node and ok[node] and drafted[r] == drawn[node]:
                node, depth = r, depth + 1
                path[first + depth] = r - first
        accepted.append(depth)
    device = tokens.device
    return VerifyResult(torch.tensor(accepted, dtype=torch.int32, device=device), torch.tensor(path, dtype=torch.int32, device=device))


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
    checks_sample.values(logits.shape[1], temperature, top_p, min_p, penalties, bias, end_tokens)
    mass = torch.empty(logits.shape, dtype=torch.int64, device=logits.device)
    status = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    for part, raw, x in parts(logits, position, penalties, bias, end_tokens, allowed):
        d = distribution(raw, x, temperature[part], top_k[part], top_p[part], min_p[part])
        chosen = torch.zeros_like(d.kept).scatter(1, d.z.argmax(dim=1, keepdim=True), True)  # the first of several maxima
        whole = torch.where(d.greedy, chosen, d.kept & (d.largest == torch.inf))  # what has 2^40
        weight = torch.where(d.greedy | (d.largest == torch.inf), 0, d.weight * d.kept)
        ok = (d.status == STATUS_OK)[:, None]
        mass[part] = torch.where(ok, torch.where(whole, 1 << fixed_math.WEIGHT_BITS, weight), 0)
        status[part] = d.status
    return mass, status


def verify_block(
    target: Tensor, status: Tensor, proposal: Tensor, draft: Tensor, start: Tensor, seed: Tensor, position: Tensor, stream: Tensor
) -> VerifyResult:
    """See ``api.verify_block``."""
    checks_verify.verify_block(target, status, proposal, draft, start, seed, position, stream)
    starts, states = start.tolist(), status.tolist()
    checks_verify.starts(starts, len(target))
    accepted = torch.zeros(len(starts) - 1, dtype=torch.int32, device=target.device)
    path = torch.full_like(draft, -1)
    tokens = torch.full_like(seed, -1)
    outcome = torch.empty_like(accepted)
    for s, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        n = 0  # drafts up to the first row that failed
        while first + n + 1 < last and states[first + n] == STATUS_OK:
            n += 1
        p = shares(target[first : first + n + 1])
        q = shares(proposal[first + 1 : first + n + 1])  # row i: what x_(i + 1) was drawn from
        x = draft[first + 1 : first + n + 1].tolist()
        checks_verify.drafts(x, p.shape[1], first + 1)
        w = [1.0]
        for i, token in enumerate(x):
            given = float(q[i, token])  # 0 where it was drawn all the same: a mass below 1 is none
            w.append(min(w[i] * float(p[i, token]) / given, 1.0) if given > 0 else 0.0)
        u = coins(seed[s : s + 1], position[s : s + 1], stream[s : s + 1], n)
        tau = next((i for i in range(n, 0, -1) if u[i] <= _acceptance(w[i], p[i], q[i] if i < n else None)), 0)
        accepted[s] = tau
        path[first : first + tau + 1] = torch.arange(tau + 1, device=path.device)
        outcome[s] = states[first + tau]
        if states[first + tau] != STATUS_OK:
            continue
        mass = residual(w[tau], p[tau], q[tau]) if tau < n else residual(1.0, p[n], torch.zeros_like(p[n]))
        if not bool(mass.any()):
            mass = residual(1.0, p[tau], torch.zeros_like(p[tau]))
        log_e = noise_law.noise(
            seed[s : s + 1], position[s : s + 1], stream[s : s + 1], len(mass), noise_law.DOMAIN_RESIDUAL
        ).log_exponential[0]  # fmt: skip
        share = torch.where(mass > 0, mass, 1 << SHARE_BITS).double().float() * 2.0**-SHARE_BITS
        tokens[s] = torch.where(mass > 0, fixed_math.log(share) - log_e, -torch.inf).argmax()
    return VerifyResult(accepted, path, tokens, outcome)


def shares(mass: Tensor) -> Tensor:
    """Each token's share of its row, float64 ``[rows, V]``."""
    return mass.double() / mass.sum(dim=1, keepdim=True).double()


def residual(w: float, p: Tensor, q: Tensor) -> Tensor:
    """``max(w p - q, 0)`` in units of 2^-62, int64 ``[V]``: integers, so that no order of summation can change a decision."""
    return ((w * p - q).clamp(min=0) * 2.0**SHARE_BITS).long()


def coins(seed: Tensor, position: Tensor, stream: Tensor, n: int) -> list[float]:
    """``u_0`` (unused) to ``u_n`` of one sequence."""
    domain = noise_law.DOMAIN_COIN
    high, low = (noise_law.words(seed, position, stream, n + 1, d)[0].double() for d in (domain, domain + noise_law.DOMAIN_TAIL))
    u: list[float] = ((high * 2.0**32 + low + 0.5) * 2.0**-64).tolist()
    return u


def _acceptance(w: float, p: Tensor, q: Tensor | None) -> float:
    """``h_i``; ``q`` is None at the end of the chain."""
    if q is None:
        return w
    z = float(int(residual(w, p, q).sum())) * 2.0**-SHARE_BITS
    rest = z + (1.0 - w)  # 1 - w first: it is exact near 1, and h is exactly 1 for w = 1
    return z / rest if rest > 0 else 1.0
