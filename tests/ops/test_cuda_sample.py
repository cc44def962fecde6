"""``sample`` in CUDA: its source on an emulated grid against the oracle (``emulated``), and on a GPU where there is one.
``test_cuda_compile`` compiles it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sample_cases
import torch
from torch import Tensor

from engine import kernels
from engine.kernels import STATUS_BAD_PARAMETER, STATUS_OK, SampleResult, cuda, reference, registry
from engine.kernels.crossover import CELLS, Cell, automatic

pytest.importorskip("triton")  # whose tests have the cases
import emulated  # noqa: E402
import emulated_cases  # noqa: E402
import triton_cases  # noqa: E402

# ---- on an emulated grid ----

needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("group", emulated_cases.GROUPS)
def test_emulated_grid_draws_the_oracles_tokens(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = emulated_cases.run(emulated.library(), group, monkeypatch.setattr)
    assert outcome["wrong"] == []
    assert outcome["rows"] > 0


@needs_compiler
def test_results_depend_neither_on_the_blocks_nor_on_the_order_of_threads() -> None:
    """To the bit, log-probabilities too."""
    generator = torch.Generator().manual_seed(8)
    rows, vocab = 10, 3000
    logits = torch.randn(rows, vocab, generator=generator) * 3
    settings: list[dict[str, Any]] = [{}, {"top_k": 700}, {"top_p": 0.9}, {"top_k": 900, "top_p": 0.8}, {"top_k": 20, "top_p": 0.5}]
    columns = {name: [settings[i % 5].get(name, default) for i in range(rows)] for name, default in (("top_k", 0), ("top_p", 1.0))}
    given = triton_cases.arguments(rows, **columns, **sample_cases.lists(rows, vocab, generator), logprobs=3)
    library = emulated.library()
    first = emulated.Emulated(library, 1, 1, emulated.FORWARD).sample(logits, **given)
    assert set(first.status.tolist()) == {STATUS_OK}
    for members, groups, order in ((1, 3, emulated.BACKWARD), (2, 1, emulated.SHUFFLED), (5, 2, emulated.SHUFFLED)):
        other = emulated.Emulated(library, members, groups, order).sample(logits, **given)
        for field, a, b in zip(SampleResult._fields, first, other, strict=True):
            assert torch.equal(a, b), (field, members, groups)


@needs_compiler
@pytest.mark.parametrize(
    ("file", "right", "wrong", "group"),
    [
        ("sample_select.h", "before + measure[i] >= *need", "before + measure[i] > *need", "flat_boundaries"),
        ("sample_kernel.h", "load_raw<T>(a, row, s, z);\n    block_barrier();", "load_raw<T>(a, row, s, z);", "flat_boundaries"),
    ],
)
def test_mistakes_are_found(tmp_path: Path, file: str, right: str, wrong: str, group: str) -> None:
    assert emulated_cases.mistake_is_found(tmp_path, file, right, wrong, group)


# ---- arguments, and when it is chosen ----


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="logits is on cpu; these kernels run on cuda"):
        cuda.sample(torch.zeros(2, 9), **triton_cases.arguments(2))
    with pytest.raises(TypeError, match="top_k must be int32"):
        cuda.sample(torch.zeros(2, 9), **{**triton_cases.arguments(2), "top_k": torch.zeros(2)})
    assert cuda.unavailable("cpu") == "these kernels run on cuda, not on cpu"


def _plan(rows: int, vocab_size: int, device: torch.device) -> cuda.Plan:
    return cuda.Plan(2, 128, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"rows": 3}, "workspace is for up to 2 rows of 9 logits, got 3 rows of 9"),
        ({"vocab_size": 8}, "workspace is for up to 2 rows of 9 logits, got 2 rows of 8"),
        ({"logprobs": 4}, "workspace is for up to 3 logprobs, got 4"),
        ({"device": torch.device("cpu")}, "workspace is on meta while logits is on cpu"),
    ],
)
def test_workspace_that_does_not_fit(call: dict[str, Any], message: str) -> None:
    workspace = cuda.Workspace(2, 9, "meta", 3, plan=_plan)
    usual = {"rows": 2, "vocab_size": 9, "device": torch.device("meta"), "logprobs": 3}
    workspace.check(**usual)
    with pytest.raises(ValueError, match=message):
        workspace.check(**{**usual, **call})


@pytest.mark.parametrize("sizes", [(-1, 9, 0), (1, 0, 0), (1, (1 << 22) + 1, 0), (1, 9, 10), (1, 9, -1)])
def test_workspace_of_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a workspace needs max_rows >= 0, vocab_size from 1 to 2\\^22 and max_logprobs"):
        cuda.Workspace(sizes[0], sizes[1], "meta", sizes[2], plan=_plan)


def test_it_is_chosen_by_name_until_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda device_type: None)
    monkeypatch.setattr(registry, "backends", lambda device_type: dict.fromkeys(("cuda", "triton", "reference")) | {"cpu": "", "fast": ""})
    kernels.select.cache_clear()
    try:
        assert kernels.select("cuda").sample is not cuda.sample
        assert kernels.select("cuda", "cuda").sample is cuda.sample
        assert kernels.select("cuda", "cuda").chosen["verify_drafts"] == "triton"
    finally:
        kernels.select.cache_clear()
    assert not automatic("sample", CELLS)
    faster = Cell("sample", "a GPU", 1, 128256, "top-p 0.9", 1e-5, 2e-5, "a file")
    assert automatic("sample", (faster,)) and not automatic("beam_select", (faster,))
    assert not automatic("sample", (faster, faster._replace(rows=64, cuda=3e-5)))


# ---- on a GPU ----


def _to_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(*map(_to_gpu, value)) if isinstance(value, tuple) else value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or cuda.unavailable("cuda") is not None, reason="no GPU, or _cuda is not built")
class TestOnGpu:
    def test_results_are_those_of_the_oracle(self) -> None:
        cases = [("sample_cases", logits, given) for _, logits, given in sample_cases.cases()]
        for group in ("controls", "crossing", "search", "flat_boundaries", "hard_boundaries", "large", "many_draws"):
            cases += getattr(triton_cases, group)()
        wrong = []
        for case in cases:
            _, logits, given = case
            result = cuda.sample(logits.cuda(), **{name: _to_gpu(value) for name, value in given.items()})
            on_cpu = SampleResult(*(None if t is None else t.cpu() for t in result))
            wrong += triton_cases.compare(case, on_cpu, reference.sample(logits, **given))
        assert wrong == []

    def test_a_captured_graph_replays_new_parameters_without_a_sync_or_an_allocation(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, vocab = 16, 5000
        logits = torch.randn(rows, vocab, generator=generator)
        given = {**triton_cases.arguments(rows), **sample_cases.lists(rows, vocab, generator)}
        given["top_k"] = (torch.arange(rows) % 4 * 500).int()
        given["top_p"] = torch.tensor([1.0, 0.9]).repeat(rows // 2)
        on_gpu = {name: _to_gpu(value) for name, value in given.items()}
        logits_on_gpu = logits.cuda()
        workspace = cuda.Workspace(rows, vocab, "cuda", max_logprobs=2)

        def right(result: SampleResult) -> None:
            on_cpu = SampleResult(*(None if t is None else t.cpu() for t in result))
            assert triton_cases.compare(("", logits, given), on_cpu, reference.sample(logits, **given, logprobs=2)) == []

        cuda.sample(logits_on_gpu, **on_gpu, logprobs=2, workspace=workspace)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = cuda.sample(logits_on_gpu, **on_gpu, logprobs=2, workspace=workspace)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        right(result)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = cuda.sample(logits_on_gpu, **on_gpu, logprobs=2, workspace=workspace)
        for step in range(3):
            given["seed"] = given["seed"] + 1000 * step
            given["temperature"] = torch.full((rows,), 0.5 * step)
            for name in ("seed", "temperature"):
                on_gpu[name].copy_(given[name])
            graph.replay()
            right(result)

    @pytest.mark.parametrize("rows", [1, 8, 64, 300])
    def test_any_number_of_rows_gives_the_same_bits(self, rows: int) -> None:
        """Rows are divided among blocks as their number asks for, and wait for each other: many calls, so that a race may show."""
        logits = torch.randn(300, 32000, generator=torch.Generator().manual_seed(1)).cuda() * 3
        top_k, top_p = torch.tensor([0, 50, 0, 2000]).repeat(75), torch.tensor([1.0, 0.9, 0.9, 0.8]).repeat(75)
        given = {n: t.cuda() for n, t in triton_cases.arguments(300, top_k=top_k.tolist(), top_p=top_p.tolist()).items()}
        whole = cuda.sample(logits, **given, logprobs=2)
        workspace = cuda.Workspace(rows, 32000, "cuda", 2)
        for repeat in range(50):
            first = repeat * 7 % (301 - rows)
            part = {name: t[first : first + rows].contiguous() for name, t in given.items()}
            result = cuda.sample(logits[first : first + rows], **part, logprobs=2, workspace=workspace)
            for field, a, b in zip(SampleResult._fields, result, whole, strict=True):
                assert torch.equal(a, b[first : first + rows]), field

    def test_bad_values_give_the_row_a_status(self) -> None:
        given = {name: t.cuda() for name, t in triton_cases.arguments(3, top_p=[1.0, 2.0, float("nan")]).items()}
        result = cuda.sample(torch.zeros(3, 9, device="cuda"), **given)
        assert result.status.tolist() == [STATUS_OK, STATUS_BAD_PARAMETER, STATUS_BAD_PARAMETER]

    @pytest.mark.parametrize("vocab", [1, 127, 4096, 262144, 1 << 21])
    def test_plans_fit_the_device(self, vocab: int) -> None:
        for rows in (1, 2, 8, 64, 300):
            plan = cuda._plan(rows, vocab, torch.device("cuda", 0))
            assert plan.members * plan.chunk >= vocab > (plan.members - 1) * plan.chunk
            assert plan.chunk % 128 == 0 and 1 <= plan.groups <= rows
