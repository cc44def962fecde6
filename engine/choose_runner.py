"""What runs the steps of a decoder: by the model's device, its kernels, and the processes that share it."""

from __future__ import annotations

from typing import Any

import torch

from .device import CudaDevice, HostDevice, StepDevice
from .graph_runner import GraphRunner
from .kv_cache import KVCache
from .models.transformer import Transformer
from .parallel import Parallel
from .parallel_runner import FollowingRunner, LeadingRunner
from .runner import Runner
from .scheduler import Scheduler


def choose_runner(model: Transformer, cache: KVCache, scheduler: Scheduler, max_position: int, parallel: Parallel | None) -> Runner:
    """On a GPU steps that nobody waits for, in graphs, where its kernels can be captured; of a model in parts the same on every rank; else
    steps one after the other."""
    sizes: dict[str, Any] = {
        "max_batch_size": scheduler.max_batch_size,
        "max_batch_tokens": scheduler.max_batch_tokens,
        "max_blocks": scheduler.pool.blocks_for(max_position),
    }
    block_size = scheduler.pool.block_size
    device = step_device(model.device)
    if parallel is not None:
        kind = LeadingRunner if parallel.rank == 0 else FollowingRunner
        return kind(parallel, model, cache, block_size, device, **sizes)
    if model.device.type == "cpu":
        return Runner(model, cache, block_size)
    if not model.ops.capturable:
        return Runner(model, cache, block_size)  # `select` has said which kernels are the oracle's, and why
    return GraphRunner(model, cache, block_size, device, **sizes)


def step_device(device: torch.device) -> StepDevice:
    """What steps on a device are run by."""
    return HostDevice() if device.type == "cpu" else CudaDevice(device)
