"""``beam_select`` in CUDA: its source on an emulated grid against the oracle (``emulated``), and on a GPU where there is one.
``test_cuda_compile`` compiles it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import beam_cases
import pytest
import torch
from torch import Tensor

from engine.kernels import BeamResult, cuda, reference

pytest.importorskip("triton")  # whose tests have the cases
import emulated  # noqa: E402
import emulated_cases  # noqa: E402
import triton_beam_cases  # noqa: E402

needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("group", emulated_cases.BEAM_GROUPS)
def test_emulated_grid_chooses_the_oracles_continuations(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = emulated_cases.run_beams(emulated.library(), group, monkeypatch.setattr)
    assert outcome["wrong"] == []
    assert outcome["rows"] > 0


@needs_compiler
def test_a_mistake_is_found(tmp_path: Path) -> None:
    """The mass is read before all blocks have added theirs."""
    right = "row_barrier(g, members);\n    const float log_mass"
    assert emulated_cases.mistake_is_found(tmp_path, "beam_kernel.h", right, "const float log_mass", "bounds")


# ---- arguments ----


def test_other_devices_and_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="logits is on cpu; these kernels run on cuda"):
        cuda.beam_select(torch.zeros(2, 9), **triton_beam_cases.arguments([2], 4))
    with pytest.raises(ValueError, match="a workspace needs max_rows from 0 to 512, .*, got 513, 9, 1 and 1"):
        cuda.BeamWorkspace(513, 9, 1, 1, "meta", plan=_plan)


def _plan(rows: int, vocab_size: int, device: torch.device) -> cuda.Plan:
    return cuda.Plan(2, 128, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"rows": 3}, "workspace is for up to 2 rows of 9 logits, got 3 rows of 9"),
        ({"vocab_size": 8}, "workspace is for up to 2 rows of 9 logits, got 2 rows of 8"),
        ({"groups": 2}, "workspace is for up to 1 groups and 4 candidates, got 2 groups and num_candidates 4"),
        ({"num_candidates": 5}, "workspace is for up to 1 groups and 4 candidates, got 1 groups and num_candidates 5"),
        ({"device": torch.device("cpu")}, "workspace is on meta while logits is on cpu"),
    ],
)
def test_workspace_that_does_not_fit(call: dict[str, Any], message: str) -> None:
    workspace = cuda.BeamWorkspace(2, 9, 1, 4, "meta", plan=_plan)
    usual = {"rows": 2, "vocab_size": 9, "groups": 1, "num_candidates": 4, "device": torch.device("meta")}
    workspace.check(**usual)
    with pytest.raises(ValueError, match=message):
        workspace.check(**{**usual, **call})


# ---- on a GPU ----


def _to_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(*map(_to_gpu, value)) if isinstance(value, tuple) else value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or cuda.unavailable("cuda") is not None, reason="no GPU, or _cuda is not built")
class TestOnGpu:
    def test_continuations_are_those_of_the_oracle(self) -> None:
        cases = [("beam_cases", logits, given) for logits, given in beam_cases.cases()]
        for group in ("wide", "ties", "bounds", "top_k", "edges"):
            cases += getattr(triton_beam_cases, group)()
        wrong = []
        for name, logits, given in cases:
            result = cuda.beam_select(logits.cuda(), **{key: _to_gpu(value) for key, value in given.items()})
            wrong += triton_beam_cases.compare(name, BeamResult(*(t.cpu() for t in result)), reference.beam_select(logits, **given))
        assert wrong == []

    def test_a_captured_graph_replays_new_scores_without_a_sync_or_an_allocation(self) -> None:
        logits = torch.randn(7, 5000, generator=torch.Generator().manual_seed(0)) * 3
        given = triton_beam_cases.arguments([4, 3], 8, noise=True, top_k=[0, 50, 3000, 1, 0, 7, 2])
        on_gpu = {name: _to_gpu(value) for name, value in given.items()}
        logits_on_gpu = logits.cuda()
        workspace = cuda.BeamWorkspace(7, 5000, 2, 8, "cuda")
        cuda.beam_select(logits_on_gpu, **on_gpu, workspace=workspace)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            cuda.beam_select(logits_on_gpu, **on_gpu, workspace=workspace)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = cuda.beam_select(logits_on_gpu, **on_gpu, workspace=workspace)
        for step in range(3):
            given["scores"] = given["scores"] - step
            given["seed"] = given["seed"] + step
            for name in ("scores", "seed"):
                on_gpu[name].copy_(given[name])
            graph.replay()
            on_cpu = BeamResult(*(t.cpu() for t in result))
            assert triton_beam_cases.compare("", on_cpu, reference.beam_select(logits, **given)) == []
