"""The processes that share one model by tensor parallelism, and all that they say to each other (``torch.distributed``).

Rank 0 drives: it alone has requests, schedules and decides. The others follow: they are told each step and compute their part of it.
What rank 0 tells is a few small numbers from memory of the host, over gloo; what all compute together is summed and gathered where it lies,
by the backend of the group that was given (gloo on CPUs, NCCL on GPUs), on the stream of the computation and without waiting for it.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ANY_TIME = datetime.timedelta(days=365)  # how long a follower may wait for the next step: rank 0 may have nothing to do


class Parallel:
    """This process among those of one model, over process groups of its own.

    Args:
        group: the processes, in the order of their ranks in it; None: all of ``torch.distributed``, which must be initialised.
        timeout: seconds after which a rank that waits for another in the midst of a step gives up. NCCL then ends the process.

    Every process of the group makes one, at the same time, for each ``Decoder`` that is to be shared. Raises ``RuntimeError`` where
    ``torch.distributed`` is not initialised, and ``ValueError`` in a process that is not of the group.
    """

    def __init__(self, group: Any = None, *, timeout: float = 300.0) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("Parallel() needs torch.distributed.init_process_group() to be called first, in every process")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("group does not hold this process; only processes of the group make a Parallel of it")
        self.size = dist.get_world_size(group)
        self.taken = False  # by a Decoder
        self.lost: str | None = None  # why nothing can be done together any more
        self._lock = threading.Lock()
        backend = dist.get_backend(group)
        made = {"ranks": dist.get_process_group_ranks(group), "timeout": datetime.timedelta(seconds=timeout)}
        # Of its own: so closing it disturbs nobody else's, and a rank that fails can let go the others, which then fail at once.
        self._host = dist.new_group(backend="gloo", use_local_synchronization=True, **made)
        self._device = self._host if backend == "gloo" else dist.new_group(backend=backend, use_local_synchronization=True, **made)

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    # ---- computing together; every rank calls the same, in the same order ----

    def sum_(self, x: Tensor, in_order: bool) -> None:
        """``x`` becomes the sum of the ``x`` of all ranks, the same bits in each.

        ``in_order``: rank by rank for every element, so that its bits do not depend on how many others are summed beside it. What else is
        summed so is the library's choice by the size of the whole (of two ranks there is one order anyway).
        """
        if self.size == 2 or not in_order:
            dist.all_reduce(x, group=self._device)
            return
        # Each rank gets one part of x from every rank, sums it, and gives it to all: the traffic of a reduction in a ring.
        share = -(-x.numel() // self.size)
        given = x.new_zeros(self.size, share)
        given.view(-1)[: x.numel()] = x.flatten()
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=self._device)
        total = taken[0]
        for part in taken[1:]:
            total += part
        dist.all_gather(list(given), total, group=self._device)
        x.copy_(given.view(-1)[: x.numel()].view_as(x))

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """``[R, sum(widths)]`` of all ranks' ``x [R, widths[rank]]`` side by side, on rank 0; on others ``x`` itself."""
        widest = max(widths)
        given = x
        if x.shape[1] < widest:
            given = x.new_empty(len(x), widest)
            given[:, : x.shape[1]] = x
        parts = [torch.empty_like(given) for _ in widths] if self.rank == 0 else None
        dist.gather(given, parts, group_dst=0, group=self._device)
        return x if parts is None else torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The ``x`` of every rank, which have one shape and dtype."""
        gathered = list(x.new_empty((self.size, *x.shape)))
        dist.all_gather(gathered, x.contiguous(), group=self._device)
        return gathered

    # ---- telling; from memory of the host ----

    def agree(self, value: Any) -> list[Any]:
        """What every rank has given, in their order. Anything that can be pickled; for the beginning, not for steps."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def tell(self, *numbers: Tensor) -> None:
        """From rank 0 to all others: tensors of the host that they take by ``hear``."""
        for tensor in numbers:
            self._broadcast(tensor)

    def hear(self, *numbers: Tensor, patient: bool = False) -> None:
        """On the others: fill tensors of the shapes and dtypes that rank 0 tells. ``patient``: wait for it however long it takes."""
        for tensor in numbers:
            self._broadcast(tensor, _ANY_TIME if patient else None)

    def _broadcast(self, tensor: Tensor, timeout: datetime.timedelta | None = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        if timeout is not None:
            options.timeout = timeout
        self._host.broadcast([tensor], options).wait()

    # ---- the end ----

    @contextmanager
    def together(self) -> Iterator[None]:
        """What the ranks do together, one thing at a time. If it fails here the others cannot go on with it: they are let go, so that none
        waits for long, and nothing more can be done together. Raises ``RuntimeError`` if that has happened before."""
        with self._lock:
            if self.lost is not None:
                raise RuntimeError(f"{self!r} works with the others no more, and all must be started anew: {self.lost}")
            try:
                yield
            except BaseException as error:
                self.close(f"{type(error).__name__}: {error}")
                raise

    def close(self, reason: str = "it was closed") -> None:
        """Leave the group. Others that wait for this rank, or will, get an error. More than once is as good as once."""
        if self.lost is not None:
            return
        self.lost = reason
        if dist.is_initialized():  # else all groups have gone with it
            for group in {id(group): group for group in (self._device, self._host)}.values():
                dist.destroy_process_group(group)
        del self._device, self._host  # connections end with the last reference
