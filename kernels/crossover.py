"""When the automatic choice takes an op of the backend ``cuda`` rather than Triton's: where it was measured, and nowhere slower.

``benchmarks/run.py --suite sampling --device cuda`` times both in the same run (the peer "CUDA kernel" of every case); its results are
where cells come from. The table is empty: nothing has been measured on any GPU. So the ops of ``cuda`` are taken only where they are asked
for by name, ``select("cuda", "cuda")`` or ``ENGINE_KERNELS=cuda``.
"""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """Median seconds of one call of an op on one GPU."""

    op: str
    gpu: str
    rows: int
    vocab: int
    control: str  # which filters, as the benchmark calls them
    cuda: float
    triton: float
    source: str  # the file of results


CELLS: tuple[Cell, ...] = ()


def automatic(op: str, cells: tuple[Cell, ...] = CELLS) -> bool:
    """Whether CUDA's kernel of ``op`` was measured, and was in no cell slower than Triton's."""
    of_op = [cell for cell in cells if cell.op == op]
    return bool(of_op) and all(cell.cuda <= cell.triton for cell in of_op)
