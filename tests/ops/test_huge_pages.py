"""Memory in huge pages: copies that hold what they were given, apart from one another, and outlive their giver."""

from __future__ import annotations

import gc

import pytest
import torch

from engine.kernels import HugePages, huge_pages, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_copies_are_apart_and_outlive_their_giver(dtype: torch.dtype) -> None:
    memory = HugePages()
    given = [torch.arange(i % 7 * 41, dtype=torch.int64).remainder(100).to(dtype).view(-1, 41) for i in range(40)]
    kept = [memory.keep(tensor) for tensor in given]
    del memory
    gc.collect()
    for i, (tensor, copy) in enumerate(zip(given, kept, strict=True)):
        assert torch.equal(tensor, copy) and copy.is_contiguous() and copy.data_ptr() % huge_pages.LINE == 0
        if tensor.numel():
            assert copy.data_ptr() != tensor.data_ptr()
            copy.zero_()  # harms no other
            assert all(torch.equal(a, b) for a, b in zip(given[i + 1 :], kept[i + 1 :], strict=True))


def test_what_is_larger_than_a_slab_begins_at_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SLAB", huge_pages.PAGE)
    memory = HugePages()
    small, large = torch.randn(17), torch.randn(3 * huge_pages.PAGE // 8)
    a, b, c = memory.keep(small), memory.keep(large.view(3, -1).t()), memory.keep(small)
    assert torch.equal(a, small) and torch.equal(b, large.view(3, -1).t()) and torch.equal(c, small)
    assert b.data_ptr() % huge_pages.PAGE == 0


@pytest.mark.parametrize("absent", [True, False])
def test_a_system_without_them(monkeypatch: pytest.MonkeyPatch, absent: bool) -> None:
    if absent:
        monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(huge_pages.mmap, "MADV_HUGEPAGE", -1, raising=False)  # refused by every kernel
    weight = torch.randn(33, 5)
    assert torch.equal(pack(weight, memory=HugePages()).dense(), weight)
