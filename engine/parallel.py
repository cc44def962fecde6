"""The processes that share one model by tensor parallelism, and all that they say to each other (``torch.distributed``).

Rank 0 drives: it alone has requests, schedules and decides. The others follow: they are told each step and compute their part of it.
What rank 0 tells is a few small numbers from memory of the host, over gloo; what all compute together is summed and gathered where it lies:
on a CPU over gloo too, on a GPU by the backend of the group (NCCL), in the order of the GPU's work and without waiting for it.
"""

from __future__ import annotations

import datetime
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ANY_TIME = datetime.timedelta(days=365)  # how long a follower may wait for the next step: rank 0 may have nothing to do
_made: Counter[tuple[int, ...]] = Counter()  # by ranks; each finds its others under the number that it has


class Parallel:
    """This process among those of one model.

    Args:
        group: the processes, in the order of their ranks in it; None: all of ``torch.distributed``, which must be initialised. On GPUs it
            needs a backend for them.
        timeout: seconds after which a rank that waits for another in the midst of a step gives up (of NCCL: the group's own).

    Every process of the group makes one, at the same time, for each ``Decoder`` that is to be shared. Raises ``RuntimeError`` where
    ``torch.distributed`` is not initialised, and ``ValueError`` in a process that is not of the group.
    """

    def __init__(self, group: Any = None, *, timeout: float = 300.0) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("Parallel() needs torch.distributed.init_process_group() to be called first, in every process")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("group does not hold this process; only processes of the group make a Parallel of it")
        self.size = dist.get_world_size(group)
        self.taken = False  # by a Decoder
        self.lost: str | None = None  # why nothing can be done together any more
        self._lock = threading.Lock()
        ranks = tuple(dist.get_process_group_ranks(group))
        name = f"engine.Parallel/{'-'.join(map(str, ranks))}/{_made[ranks]}"
        _made[ranks] += 1
        # A backend of its own: when a rank fails it can let the others go, who then fail at once, and disturbs nobody else's group.
        store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
        self._host: Any = dist.ProcessGroupGloo(store, self.rank, self.size, datetime.timedelta(seconds=timeout))
        self._group = group

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    # ---- computing together; every rank calls the same, in the same order ----

    def sum_(self, x: Tensor, in_order: bool) -> None:
        """``x`` becomes the sum of the ``x`` of all ranks, the same bits in each.

        ``in_order``: rank by rank for every element, so that its bits do not depend on how many others are summed beside it. What else is
        summed so is the library's choice by the size of the whole (of two ranks there is one order anyway).
        """
        backend = self._backend(x)
        if self.size < 3 or not in_order:
            self._wait(backend.allreduce, x)
            return
        # Each rank gets one part of x from every rank, sums it, and gives it to all: the traffic of a reduction in a ring.
        share = -(-x.numel() // self.size)
        given = x.new_zeros((self.size, share))
        given.view(-1)[: x.numel()] = x.flatten()
        taken = torch.empty_like(given)
        self._wait(backend.alltoall_base, taken, given, [], [])
        total = taken[0]
        for part in taken[1:]:
            total += part
        x.copy_(torch.cat(self.all_gather(total))[: x.numel()].view_as(x))

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """``[R, sum(widths)]`` of all ranks' ``x [R, widths[rank]]`` side by side, on rank 0; on others ``x`` itself."""
        widest = max(widths)
        given = x
        if x.shape[1] < widest:
            given = x.new_empty(len(x), widest)
            given[:, : x.shape[1]] = x
        parts = [torch.empty_like(given) for _ in widths] if self.rank == 0 else []
        self._wait(self._backend(x).gather, parts, given, 0)
        return x if self.rank else torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The ``x`` of every rank, which have one shape and dtype."""
        gathered = list(x.new_empty((self.size, *x.shape)))
        self._wait(self._backend(x).allgather, gathered, x.contiguous())
        return gathered

    def share(self, x: Tensor) -> None:
        """``x`` becomes rank 0's ``x``."""
        self._wait(self._backend(x).broadcast, x, 0)

    def _backend(self, x: Tensor) -> Any:
        """Where ``x`` lies."""
        return self._host if x.is_cpu else self._group._get_backend(x.device)

    def _wait(self, call: Callable[..., Any], *args: Any) -> None:
        """What a backend does for ``args``; on a GPU it is its stream that waits."""
        try:
            call(*args).wait()
        except RuntimeError as error:
            raise ConnectionError(f"{self!r} waited in vain for another rank, which has failed, gone, or is late") from error

    # ---- telling; from memory of the host ----

    def agree(self, value: Any) -> list[Any]:
        """What every rank has given, in their order. Anything that can be pickled; for the beginning, not for steps."""
        given = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = torch.cat(self.all_gather(torch.tensor([len(given)]))).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(given)] = given
        parts = self.all_gather(padded)
        return [pickle.loads(bytes(part[:n].tolist())) for part, n in zip(parts, lengths, strict=True)]

    def tell(self, *numbers: Tensor) -> None:
        """From rank 0 to all others: tensors of the host, which they take by ``hear``."""
        for tensor in numbers:
            self._wait(self._host.broadcast, tensor, 0)

    def hear(self, numbers: Tensor, patient: bool = False) -> None:
        """On the others: fill a tensor of the shape and dtype that rank 0 tells. ``patient``: wait for it however long it takes."""
        self._wait(self._host.broadcast, numbers, 0, _ANY_TIME if patient else None)

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
        del self._host  # connections end with the last reference
