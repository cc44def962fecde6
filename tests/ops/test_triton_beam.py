"""``beam_select`` in Triton: in the interpreter against the oracle, and on a GPU if there is one (``test_triton_compile`` compiles it)."""

from __future__ import annotations

from typing import Any

import beam_cases
import pytest
import sample_cases
import torch
from interpreted import Interpreted
from torch import Tensor

from engine.kernels import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, BeamResult, reference
from engine.kernels import triton as backend

pytest.importorskip("triton")

# ---- in the interpreter ----

GROUPS = ("shared", "wide", "ties", "bounds", "top_k", "edges", "group_positions", "bad_parameters", "workspaces")
INTERPRETED = Interpreted("ops/triton_beam_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_finds_the_oracles_continuations(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


def test_interpreter_met_every_status_and_every_bisection(interpreted: dict[str, Any]) -> None:
    assert set(interpreted["shared"]["statuses"]) == {STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED}
    ties = interpreted["ties"]
    assert ties["calls"]["_bound"] >= ties["groups"] + 4  # of continuations too
    assert ties["calls"]["_count"] > 10 * ties["calls"]["_bound"]


# ---- arguments ----


def _given(widths: list[int], num_candidates: int, device: str = "cpu") -> dict[str, Any]:
    rows = sum(widths)
    return {
        "scores": -torch.arange(rows, device=device) / 8,
        "group_start": torch.tensor([0, *widths], device=device).cumsum(0).int(),
        "num_candidates": num_candidates,
        "temperature": torch.ones(rows, device=device),
        "top_k": torch.zeros(rows, dtype=torch.int32, device=device),
        "position": torch.arange(rows, dtype=torch.int32, device=device),
    }


def test_other_devices_and_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="logits is on cpu; these kernels run on cuda"):
        backend.beam_select(torch.zeros(2, 9), **_given([2], 4))
    with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
        backend.beam_select(torch.zeros(2, 9), **_given([2], 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"rows": 4}, "workspace is for up to 3 rows of 9 logits, got 4 rows of 9"),
        ({"vocab_size": 8}, "workspace is for up to 3 rows of 9 logits, got 3 rows of 8"),
        ({"groups": 3}, "workspace is for up to 2 groups and 6 candidates, got 3 groups and num_candidates 6"),
        ({"num_candidates": 7}, "workspace is for up to 2 groups and 6 candidates, got 2 groups and num_candidates 7"),
        ({"device": torch.device("cuda")}, "workspace is on meta while logits is on cuda"),
        ({"lists": True}, "made with lists=False, so penalties, bias and end_tokens must be None"),
    ],
)
def test_workspace_that_does_not_fit(call: dict[str, Any], message: str) -> None:
    workspace = backend.BeamWorkspace(3, 9, 2, 6, "meta", lists=False)
    usual = {"rows": 3, "vocab_size": 9, "groups": 2, "num_candidates": 6, "device": torch.device("meta"), "lists": False}
    workspace.check(**usual)
    with pytest.raises(ValueError, match=message):
        workspace.check(**{**usual, **call})


@pytest.mark.parametrize("sizes", [(-1, 9, 1, 1), (1, 0, 1, 1), (1, (1 << 22) + 1, 1, 1), (1, 9, -1, 1), (1, 9, 1, 0)])
def test_workspace_of_impossible_sizes(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="a workspace needs max_rows >= 0, vocab_size from 1 to 2\\^22, max_groups >= 0 and max_candid"):
        backend.BeamWorkspace(*sizes, "meta")


def test_rows_beyond_what_keys_hold() -> None:
    backend.BeamWorkspace(511, 1 << 22, 1, 8, "meta", lists=False)
    with pytest.raises(ValueError, match="beam_select takes at most 511 rows of 4194304 logits in one call on a GPU, got 512"):
        backend.BeamWorkspace(512, 1 << 22, 1, 8, "meta", lists=False)


@pytest.mark.parametrize("vocab", [1, 4096, 4097, 128256, (1 << 18) + 1, 1 << 22])
def test_sub_blocks_cover_the_row(vocab: int) -> None:
    from engine.kernels.triton import beam

    c = beam.constants(vocab)
    assert c["SUB"] * c["NSUB"] >= vocab and c["NSUB"] <= 1024 and beam.CHUNK % c["SUB"] == 0
    assert c["MAX_CHUNKS"] * beam.CHUNK >= vocab


# ---- on a GPU ----


def _to_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(*map(_to_gpu, value)) if isinstance(value, tuple) else value


def _compare(result: BeamResult, expected: BeamResult) -> None:
    for field, got, want in zip(BeamResult._fields, result, expected, strict=True):
        got = got.cpu()
        assert torch.equal(*(t.view(torch.int32) if t.is_floating_point() else t for t in (got, want))), field


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    def test_continuations_are_those_of_the_cpu(self) -> None:
        for logits, given in beam_cases.cases():
            result = backend.beam_select(logits.cuda(), **{name: _to_gpu(value) for name, value in given.items()})
            _compare(result, reference.beam_select(logits, **given))

    def test_a_captured_graph_replays_new_parameters_without_a_sync_or_an_allocation(self) -> None:
        generator = torch.Generator().manual_seed(0)
        widths, vocab = [4, 1, 0, 7], 5000
        rows = sum(widths)
        logits = torch.randn(rows, vocab, generator=generator)
        given = {**_given(widths, 20), **sample_cases.lists(rows, vocab, generator)}
        given |= {"seed": torch.arange(rows), "stream": torch.zeros(rows, dtype=torch.int32)}
        on_gpu = {name: _to_gpu(value) for name, value in given.items()}
        logits_on_gpu = logits.cuda()
        workspace = backend.BeamWorkspace(rows, vocab, len(widths), 20, "cuda")
        backend.beam_select(logits_on_gpu, **on_gpu, workspace=workspace)  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = backend.beam_select(logits_on_gpu, **on_gpu, workspace=workspace)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        _compare(result, reference.beam_select(logits, **given))

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = backend.beam_select(logits_on_gpu, **on_gpu, workspace=workspace)
        for step in range(3):
            given["seed"] = given["seed"] + 1000 * step
            given["scores"] = given["scores"].flip(0)
            given["top_k"] = torch.full((rows,), 50 * step, dtype=torch.int32)
            given["group_start"] = torch.tensor([0, step, 3, 3 + step, rows], dtype=torch.int32)
            for name in ("seed", "scores", "top_k", "group_start"):
                on_gpu[name].copy_(given[name])
            graph.replay()
            _compare(result, reference.beam_select(logits, **given))

    def test_bad_values_give_the_row_a_status(self) -> None:
        given = {**_given([3], 4, "cuda"), "temperature": torch.tensor([1.0, 0.0, float("nan")], device="cuda")}
        result = backend.beam_select(torch.zeros(3, 9, device="cuda"), **given)
        assert result.status.tolist() == [STATUS_OK, STATUS_BAD_PARAMETER, STATUS_BAD_PARAMETER]
