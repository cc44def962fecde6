"""Every Triton kernel compiled ahead of time, without a GPU: registers, shared memory, spills."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

VARIANTS = (
    "plain bf16",
    "everything fp32",
    "forward fp32",
    "forward fp8 cache",
    "linear: bf16, split",
    "linear: int4, split",
    "head: bf16",
    "bf16, D = 128",
)  # those compiled here; ``python -m engine.kernels.triton.compile`` compiles all


@pytest.fixture(scope="module")
def compiled() -> Any:
    from engine.kernels.triton import compile as module

    table = module.table(VARIANTS)
    assert {u.variant for u in table} == set(VARIANTS)
    return module, table


def test_every_kernel_compiles_without_spills(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, table = compiled
    with capsys.disabled():
        module.show(table)
    from engine.kernels.triton import launch

    for architecture in (80, 90):
        assert {u.kernel for u in table if u.architecture == architecture} == set(launch.WARPS)
    assert [u for u in table if u.spills or u.stack] == []


def test_no_kernel_fuses_multiplications_and_additions(compiled: Any) -> None:
    module, table = compiled
    assert [u for u in table if u.fused] == []
    (fusing,) = module.table(VARIANTS[:1], (90,), ["sample_race"], fusion=True)
    assert fusing.fused > 100  # the count can see them
