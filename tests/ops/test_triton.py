"""``sample`` in Triton: in the interpreter against the oracle, and on a GPU where there is one (``test_triton_compile`` compiles it)."""

from __future__ import annotations

from typing import Any

import pytest
import sample_cases
import torch
from interpreted import Interpreted
from torch import Tensor

from engine.kernels import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, SampleResult, reference
from engine.kernels import triton as backend

pytest.importorskip("triton")

# ---- in the interpreter ----

GROUPS = (
    "arithmetic", "controls", "crossing", "hostile", "search", "flat_boundaries", "hard_boundaries", "large", "many_draws",
    "batch_positions", "bad_parameters", "workspaces",
)  # fmt: skip
INTERPRETED = Interpreted("ops/triton_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_draws_the_oracles_tokens(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


def test_interpreter_met_every_status_and_every_way_to_a_threshold(interpreted: dict[str, Any]) -> None:
    assert set(interpreted["hostile"]["statuses"]) == {STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED}
    assert set(interpreted["search"]["calls"]) == {"kth_largest", "mass_threshold", "race_candidates", "_last_resort"}
    assert interpreted["hard_boundaries"]["calls"]["_last_resort"] == 8  # two rows each, and one needs it for both of its thresholds


# ---- arguments ----


def _given(rows: int, device: str = "cpu") -> dict[str, Tensor]:
    return {
        "temperature": torch.ones(rows, device=device),
        "top_k": torch.zeros(rows, dtype=torch.int32, device=device),
        "top_p": torch.ones(rows, device=device),
        "min_p": torch.zeros(rows, device=device),
        "seed": torch.arange(rows, device=device),
        "position": torch.zeros(rows, dtype=torch.int32, device=device),
        "stream": torch.zeros(rows, dtype=torch.int32, device=device),
    }


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="logits is on cpu; these kernels run on cuda"):
        backend.sample(torch.zeros(2, 9), **_given(2))
    with pytest.raises(ValueError, match="top_k is on meta while logits is on cpu"):
        backend.sample(torch.zeros(2, 9), **{**_given(2), "top_k": torch.zeros(2, dtype=torch.int32, device="meta")})


@pytest.mark.parametrize(
    ("sizes", "call", "message"),
    [
        ((2, 9), {"rows": 3}, "workspace is for up to 2 rows of 9 logits, got 3 rows of 9"),
        ((2, 9), {"vocab_size": 8}, "workspace is for up to 2 rows of 9 logits, got 2 rows of 8"),
        ((2, 9, 3), {"logprobs": 4}, "workspace is for up to 3 logprobs, got 4"),
        ((2, 9), {"device": torch.device("cuda")}, "workspace is on meta while logits is on cuda"),
    ],
)
def test_workspace_that_does_not_fit(sizes: tuple[int, ...], call: dict[str, Any], message: str) -> None:
    rows, vocab, *most = sizes
    workspace = backend.Workspace(rows, vocab, "meta", *most, lists=False)
    usual = {"rows": rows, "vocab_size": vocab, "device": torch.device("meta"), "logprobs": None, "lists": False}
    workspace.check(**usual)
    with pytest.raises(ValueError, match=message):
        workspace.check(**{**usual, **call})
    with pytest.raises(ValueError, match="made with lists=False, so penalties, bias and end_tokens must be None"):
        workspace.check(**{**usual, "lists": True})


@pytest.mark.parametrize("sizes", [(-1, 9, 0), (1, 0, 0), (1, (1 << 22) + 1, 0), (1, 9, 10), (1, 9, -1)])
def test_workspace_of_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a workspace needs max_rows >= 0, vocab_size from 1 to 2\\^22 and max_logprobs"):
        backend.Workspace(sizes[0], sizes[1], "meta", sizes[2])


@pytest.mark.parametrize("vocab", [1, 4096, 4097, 128256, (1 << 18) + 1, 1 << 22])
def test_sub_blocks_cover_the_row(vocab: int) -> None:
    from engine.kernels.triton import sampler

    c = sampler.constants(vocab)
    assert c["SUB"] * c["NSUB"] >= vocab and c["NSUB"] <= 4096 and sampler.MASS_CHUNK % c["SUB"] == 0
    assert c["MAX_CHUNKS"] * sampler.CHUNK >= vocab


# ---- on a GPU ----

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def _to_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(*map(_to_gpu, value)) if isinstance(value, tuple) else value


def _compare(result: SampleResult, expected: SampleResult) -> None:
    for field, got, want in zip(SampleResult._fields, result, expected, strict=True):
        assert (got is None) == (want is None), field
        if got is not None and got.is_floating_point():
            assert torch.allclose(got.cpu(), want, rtol=2e-6, atol=4e-6, equal_nan=True), field
        elif got is not None:
            assert torch.equal(got.cpu(), want), field


class TestOnGpu:
    pytestmark = needs_gpu

    def test_tokens_are_those_of_the_cpu(self) -> None:
        for _, logits, arguments in sample_cases.cases():
            result = backend.sample(logits.cuda(), **{name: _to_gpu(value) for name, value in arguments.items()})
            _compare(result, reference.sample(logits, **arguments))

    def test_a_captured_graph_replays_new_parameters_without_a_sync_or_an_allocation(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, vocab = 16, 5000
        logits = torch.randn(rows, vocab, generator=generator)
        given: dict[str, Any] = {**_given(rows), **sample_cases.lists(rows, vocab, generator)}
        given["top_k"] = (torch.arange(rows) % 4 * 500).int()
        given["top_p"] = torch.tensor([1.0, 0.9]).repeat(rows // 2)
        on_gpu = {name: _to_gpu(value) for name, value in given.items()}
        logits_on_gpu = logits.cuda()
        workspace = backend.Workspace(rows, vocab, "cuda", max_logprobs=2)
        backend.sample(logits_on_gpu, **on_gpu, logprobs=2, workspace=workspace)  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = backend.sample(logits_on_gpu, **on_gpu, logprobs=2, workspace=workspace)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        _compare(result, reference.sample(logits, **given, logprobs=2))

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = backend.sample(logits_on_gpu, **on_gpu, logprobs=2, workspace=workspace)
        for step in range(3):
            given["seed"] = given["seed"] + 1000 * step
            given["temperature"] = torch.full((rows,), 0.5 * step)
            for name in ("seed", "temperature"):
                on_gpu[name].copy_(given[name])
            graph.replay()
            _compare(result, reference.sample(logits, **given, logprobs=2))

    def test_bad_values_give_the_row_a_status(self) -> None:
        given = {**_given(3, "cuda"), "top_p": torch.tensor([1.0, 2.0, float("nan")], device="cuda")}
        result = backend.sample(torch.zeros(3, 9, device="cuda"), **given)
        assert result.status.tolist() == [STATUS_OK, STATUS_BAD_PARAMETER, STATUS_BAD_PARAMETER]
