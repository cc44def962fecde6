"""``verify_drafts``, ``masses`` and ``verify_block`` in Triton: in the interpreter against the oracle, and on a GPU if there is one
(``test_triton_compile`` compiles)."""

from __future__ import annotations

from typing import Any

import block_cases
import masses_cases
import pytest
import torch
import verify_cases
from interpreted import Interpreted

from engine.kernels import reference
from engine.kernels import triton as backend

pytest.importorskip("triton")

GROUPS = (
    "trees", "full_trees", "bad_starts", "bad_parents", "masses", "masses_of_bad_parameters", "blocks", "block_ranges",
)  # fmt: skip
INTERPRETED = Interpreted("ops/triton_verify_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_finds_what_the_oracle_does(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


def test_other_devices_are_refused() -> None:
    given = verify_cases.call([verify_cases.chain([1, 2], [1])])
    with pytest.raises(ValueError, match="tokens is on cpu; these kernels run on cuda"):
        backend.verify_drafts(**given)
    with pytest.raises(ValueError, match="parent is on meta while tokens is on cpu"):
        backend.verify_drafts(**{**given, "parent": given["parent"].to("meta")})


def test_blocks_and_masses_on_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="target is on cpu; these kernels run on cuda"):
        backend.verify_block(**block_cases.chains([2], "near", 9, False, torch.Generator()))
    _, logits, given = next(masses_cases.cases())
    with pytest.raises(ValueError, match="logits is on cpu; these kernels run on cuda"):
        backend.masses(logits, **given)


class TestOnGpu:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

    def test_drafts_kept_are_those_of_the_cpu(self) -> None:
        for name, given in verify_cases.cases():
            result = backend.verify_drafts(**{field: t.cuda() for field, t in given.items()})
            expected = reference.verify_drafts(**given)
            assert torch.equal(result.num_accepted.cpu(), expected.num_accepted), name
            assert torch.equal(result.path.cpu(), expected.path), name

    def test_values_out_of_range_are_not_followed(self) -> None:
        """A tree like this on the host raises; the device may not read where it points."""
        far = 2**31 - 1
        given = verify_cases.call([([5] * 4, [0] * 4, [5] * 4, [0, 0, far, 1]), ([5], [0], [5], [0])])
        result = backend.verify_drafts(**{name: t.cuda() for name, t in given.items()})
        assert result.num_accepted.tolist() == [2, 0] and result.path.tolist() == [0, 1, 3, -1, 0]
        result = backend.verify_drafts(**{**{name: t.cuda() for name, t in given.items()}, "start": verify_cases.ints(0, 4, far).cuda()})
        assert result.num_accepted.tolist() == [2, -1]
        torch.cuda.synchronize()

    def test_a_captured_graph_replays_other_trees_without_a_sync(self) -> None:
        first, second = (verify_cases.call([verify_cases.chain(drawn, [1, 2, 3])] * 3) for drawn in ([1, 2, 3, 4], [1, 9, 3, 4]))
        given = {name: t.cuda() for name, t in first.items()}
        backend.verify_drafts(**given)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            backend.verify_drafts(**given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = backend.verify_drafts(**given)
        for trees, accepted in ((first, [3] * 3), (second, [1] * 3)):
            for name, t in trees.items():
                given[name].copy_(t)
            graph.replay()
            assert result.num_accepted.tolist() == accepted

    def test_masses_are_the_oracles(self) -> None:
        for vocab, logits, given in masses_cases.cases():
            mass, status = backend.masses(logits.cuda(), **{name: _to_gpu(value) for name, value in given.items()})
            expected, expected_status = reference.masses(logits, **given)
            assert torch.equal(status.cpu(), expected_status) and torch.equal(mass.cpu(), expected), vocab

    def test_blocks_are_the_oracles(self) -> None:
        for name, given in block_cases.cases():
            result = backend.verify_block(**{field: t.cuda() for field, t in given.items()})
            for got, expected in zip(result, reference.verify_block(**given), strict=True):
                assert torch.equal(got.cpu(), expected), name

    def test_blocks_and_masses_in_a_graph(self) -> None:
        generator = torch.Generator().manual_seed(0)
        first, second = (block_cases.chains([4] * 16, kind, 5000, False, generator) for kind in ("near", "apart"))
        given = {name: t.cuda() for name, t in first.items()}
        logits = torch.randn(4, 5000, generator=generator).cuda()
        law = {name: torch.full((4,), value, device="cuda") for name, value in (("temperature", 1.0), ("top_p", 0.9), ("min_p", 0.0))}
        law |= {name: torch.zeros(4, dtype=torch.int32, device="cuda") for name in ("top_k", "position")}
        expected_mass = backend.masses(logits, **law)[0].clone()  # compiles
        backend.verify_block(**given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            backend.verify_block(**given)
            backend.masses(logits, **law)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = backend.verify_block(**given)
            mass, _ = backend.masses(logits, **law)
        for chains in (first, second):
            for name, t in chains.items():
                given[name].copy_(t)
            graph.replay()
            for got, expected in zip(result, reference.verify_block(**chains), strict=True):
                assert torch.equal(got.cpu(), expected)
            assert torch.equal(mass, expected_mass)


def _to_gpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return type(value)(*map(_to_gpu, value)) if isinstance(value, tuple) else value
