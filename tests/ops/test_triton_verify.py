"""``verify_drafts`` in Triton: in the interpreter against the oracle, and on a GPU if there is one (``test_triton_compile`` compiles)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_cases

from engine.kernels import reference
from engine.kernels import triton as backend

pytest.importorskip("triton")

GROUPS = ("trees", "full_trees", "bad_starts", "bad_parents")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What ``triton_verify_cases`` found, by group."""
    program = Path(__file__).with_name("triton_verify_cases.py")
    done = subprocess.run(
        [sys.executable, str(program), *GROUPS], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_keeps_the_oracles_drafts(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


def test_other_devices_are_refused() -> None:
    given = verify_cases.call([verify_cases.chain([1, 2], [1])])
    with pytest.raises(ValueError, match="tokens is on cpu; these kernels run on cuda"):
        backend.verify_drafts(**given)
    with pytest.raises(ValueError, match="parent is on meta while tokens is on cpu"):
        backend.verify_drafts(**{**given, "parent": given["parent"].to("meta")})


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
