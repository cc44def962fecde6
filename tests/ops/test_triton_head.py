"""``sample_head`` in Triton: in the interpreter against the oracle, and on a GPU if there is one (``test_triton_compile`` compiles it)."""

from __future__ import annotations

from typing import Any

import head_cases
import pytest
import torch
from interpreted import Interpreted

from engine.kernels import STATUS_BAD_PARAMETER, STATUS_OK, merge_draws, quantize
from engine.kernels import triton as backend

pytest.importorskip("triton")

GROUPS = ("hostile", "products", "formats", "shards", "alone", "bad_temperatures", "many_tiles")
INTERPRETED = Interpreted("ops/triton_head_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_draws_the_oracles_tokens(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


def test_what_these_kernels_do_not_take() -> None:
    ((_, x, head, given),) = head_cases.products([(2, 32, 9)], [torch.float32])
    with pytest.raises(ValueError, match="x is on cpu; these kernels run on cuda"):
        backend.sample_head(x, head, **given)
    with pytest.raises(ValueError, match="position is on meta while x is on cpu"):
        backend.sample_head(x, head, **{**given, "position": given["position"].to("meta")})


# ---- on a GPU ----


def _on_gpu(case: head_cases.Case) -> head_cases.Case:
    name, x, head, given = case
    return name, x.cuda(), head.cuda(), {key: value.cuda() for key, value in given.items()}


class TestOnGpu:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

    @pytest.mark.parametrize("vocab", [1, 7, 129, 5003, 140_000])
    def test_hostile_rows(self, vocab: int) -> None:
        for case in head_cases.hostile_cases([vocab]):
            assert head_cases.against_sample(backend.sample_head, _on_gpu(case), backend.linear) == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_fused_and_unfused_draw_the_same_token(self, dtype: torch.dtype) -> None:
        """Of the logits of the deterministic product, which have its bits (those of a shard may have others: K is cut by the width)."""
        sizes = [(1, 40, 70), (3, 600, 131), (200, 24, 100), (1, 1024, 128256), (16, 2048, 32003), (65, 4096, 5000)]
        for case in head_cases.products(sizes, [dtype]):
            assert head_cases.against_sample(backend.sample_head, _on_gpu(case), backend.linear, [1]) == []

    @pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
    def test_quantised_heads(self, format: str) -> None:
        for name, x, head, given in map(_on_gpu, head_cases.products([(5, 1000, 9001)], [torch.bfloat16])):
            case = (name, x, quantize(head, format), given)
            assert head_cases.against_sample(backend.sample_head, case, backend.linear, [1]) == []

    def test_a_row_has_the_same_bits_in_every_batch(self) -> None:
        ((_, x, head, given),) = map(_on_gpu, head_cases.products([(200, 1024, 32003)], [torch.bfloat16]))
        together = backend.sample_head(x, head, **given)
        for index in (torch.arange(1), torch.arange(5, 13), torch.arange(60, 130), torch.randperm(200)):
            index = index.cuda()
            mine = {key: value[index] for key, value in given.items()}
            for a, b in zip(backend.sample_head(x[index], head, **mine), together, strict=True):
                assert torch.equal(a, b[..., index])

    def test_a_captured_graph_replays_new_parameters_without_a_sync(self) -> None:
        ((_, x, head, given),) = map(_on_gpu, head_cases.products([(9, 256, 5000)], [torch.bfloat16]))
        backend.sample_head(x, head, **given)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            merge_draws(head_cases.shards(backend.sample_head, ("", x, head, given), 2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole = merge_draws([backend.sample_head(x, head, **given)])
            merged = merge_draws(head_cases.shards(backend.sample_head, ("", x, head, given), 2))
        for step in range(3):
            given["seed"] += 1000 * step
            given["temperature"].fill_(0.5 * step)
            x += step
            graph.replay()
            logits = backend.linear(x, [head], out=torch.empty(9, 5000, device="cuda"))
            want = head_cases.sampled(logits, given)
            assert head_cases.differences(f"step {step}", whole, want) == []
            assert head_cases.differences(f"step {step}, 2 shards", merged, want) == []

    def test_bad_temperatures_give_the_row_a_status(self) -> None:
        ((_, x, head, given),) = map(_on_gpu, head_cases.products([(3, 32, 100)], [torch.bfloat16]))
        given["temperature"] = torch.tensor([1.0, -1.0, float("nan")], device="cuda")
        result = merge_draws([backend.sample_head(x, head, **given)])
        assert result.status.tolist() == [STATUS_OK, STATUS_BAD_PARAMETER, STATUS_BAD_PARAMETER]
