"""The oracle of ``sample_head`` past its product, in plain PyTorch, any device (contract in ``api``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import noise as noise_law
from .api import GREEDY_BELOW, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, HeadDraw
from .head_draws import below

_MAX_ELEMENTS = 1 << 20  # of a group of rows worked on at once: bounds the memory of the noise


def draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: Tensor, first_token: int) -> HeadDraw:
    """What the shard with these ``logits`` (float32 ``[R, V]``), of the tokens from ``first_token`` on, says of each row."""
    parts = torch.arange(len(logits), device=logits.device).split(max(1, _MAX_ELEMENTS // logits.shape[1]))
    draws = [_draw(logits[p], temperature[p], seed[p], position[p], stream[p], first_token) for p in parts]
    return HeadDraw(*(torch.cat(column, dim=-1) for column in zip(*draws, strict=True)))


def _draw(raw: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: Tensor, first_token: int) -> HeadDraw:
    greedy = (temperature < GREEDY_BELOW)[:, None]
    z = raw / torch.where(greedy, 1.0, temperature[:, None])
    status = torch.full(raw.shape[:1], STATUS_OK, dtype=torch.int32, device=raw.device)
    status[(z == -torch.inf).all(dim=1)] = STATUS_NOTHING_ALLOWED
    status[raw.isnan().any(dim=1)] = STATUS_NAN
    ok = status == STATUS_OK

    noise = noise_law.noise(seed, position, stream, raw.shape[1], first_token=first_token).log_exponential
    score = torch.where(greedy, z, z - noise)
    best = score.argmax(dim=1, keepdim=True)  # the first of several maxima
    values = torch.stack((raw, z))  # [2, R, V]
    largest = values.amax(dim=2)
    mass = below(values.double(), largest[..., None].double()).exp().sum(dim=2)
    chosen = values.gather(2, best.expand(2, -1, -1))[..., 0]
    return HeadDraw(
        tokens=torch.where(ok, best[:, 0] + first_token, -1),
        status=status,
        scores=torch.where(ok, score.gather(1, best)[:, 0], -torch.inf),
        logprobs=torch.where(ok, below(chosen.double(), largest.double()) - mass.log(), torch.nan).float(),
        largest=torch.where(ok, largest, -torch.inf),
        mass=torch.where(ok, mass, 0.0).float(),
    )
