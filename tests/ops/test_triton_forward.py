"""The small ops of a forward in Triton: in the interpreter against the oracle, and on a GPU if there is one (``test_triton_compile``
compiles them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from forward_cases import HOSTILE, rope_case, with_caches
from interpreted import Interpreted
from torch import Tensor

from engine.kernels import pack, quantize, reference
from engine.kernels import triton as backend

pytest.importorskip("triton")

GROUPS = ("embed", "norm", "silu", "feed", "rope", "rope_norms", "rope_hostile", "rope_ranges", "move", "copy")
INTERPRETED = Interpreted("ops/triton_forward_cases.py", GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_interpreter_computes_what_the_oracle_does(interpreted: dict[str, Any], group: str) -> None:
    assert interpreted[group]["wrong"] == []
    assert interpreted[group]["rows"] > 0


# ---- arguments ----


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 5, 3, 1, 24, 16, dtype=dtype), torch.zeros(2, 5, 3, 16, 24, dtype=dtype)


CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "embed": ("tokens", lambda: backend.embed(ids(0), torch.zeros(4, 8))),
    "rms_norm": ("x", lambda: backend.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6)),
    "silu_mul": ("x", lambda: backend.silu_mul(torch.zeros(2, 8))),
    "rope_append": ("qkv", lambda: backend.rope_append(**rope_case(4, (2, 1), 16, 16))),
    "move_tokens": ("key_cache", lambda: backend.move_tokens(*caches(), ids(0), ids(1))),
    "copy_blocks": ("key_cache", lambda: backend.copy_blocks(*caches(), ids(0), ids(1))),
    "feed_tokens": ("tokens", lambda: backend.feed_tokens(ids(0), ids(0), torch.zeros(1, dtype=torch.int64))),
}


@pytest.mark.parametrize("op", CALLS)
def test_other_devices_are_refused(op: str) -> None:
    name, call = CALLS[op]
    with pytest.raises(ValueError, match=f"{name} is on cpu; these kernels run on cuda"):
        call()


def test_tables_packed_for_cpus_are_refused() -> None:
    with pytest.raises(TypeError, match=r"table is packed in the order of the C\+\+ kernels; on a GPU it must be a tensor"):
        backend.embed(ids(0), pack(torch.zeros(4, 8)))


def test_rows_that_no_program_holds_are_refused() -> None:
    x = torch.zeros(1, 32769)
    with pytest.raises(ValueError, match=r"x must have rows of at most 32768 elements on a GPU, got \(1, 32769\)"):
        backend.rms_norm(x, x[0], 1e-6)


# ---- on a GPU ----


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def cache_dtypes() -> list[torch.dtype]:
    """Those that this GPU has."""
    float8 = [torch.float8_e4m3fn] if torch.cuda.get_device_capability() >= (8, 9) else []
    return [torch.float32, torch.bfloat16, torch.int8, *float8]


class TestOnGpu:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("width", [1, 40, 1025, 4096, 14336])
    def test_rows(self, dtype: torch.dtype, width: int) -> None:
        """Near float64, and a row alone has the bits that it has in a batch."""
        generator = torch.Generator().manual_seed(width)
        x, weight = torch.randn(70, width, generator=generator) * 3, torch.randn(width, generator=generator).to(dtype)
        rtol = 3e-6 if dtype == torch.float32 else 2**-7
        got = backend.rms_norm(x.cuda(), weight.cuda(), 1e-5, dtype)
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
        torch.testing.assert_close(got.cpu().double(), exact, rtol=rtol, atol=1e-6)
        pairs = torch.randn(70, 2 * width, generator=generator).to(dtype)
        gated, (gate, up) = backend.silu_mul(pairs.cuda()), pairs.double().chunk(2, dim=-1)
        torch.testing.assert_close(gated.cpu().double(), gate * torch.sigmoid(gate) * up, rtol=rtol, atol=1e-6)
        for row in (0, 33, 69):
            assert torch.equal(backend.rms_norm(x[row : row + 1].cuda(), weight.cuda(), 1e-5, dtype)[0], got[row])
            assert torch.equal(backend.silu_mul(pairs[row : row + 1].cuda())[0], gated[row])

    def test_embed_and_feed(self) -> None:
        table = torch.randn(1000, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
        tokens = ids(5, 999, 0, 1000, -1, 2**31 - 1).cuda()
        for matrix in (table, *(quantize(table, form) for form in ("int8", "int4", "fp8"))):
            on_device = matrix.cuda() if isinstance(matrix, Tensor) else replace(matrix, data=matrix.data.cuda(), scale=matrix.scale.cuda())
            got = backend.embed(tokens, on_device).cpu()
            assert torch.equal(got[:3], reference.embed(ids(5, 999, 0), matrix)) and got[3:].isnan().all()
        backend.feed_tokens(tokens, ids(-1, 1, 0, -1, 2, 9).cuda(), torch.tensor([7, 8, -1]).cuda())
        assert tokens.tolist() == [5, 8, 7, 1000, -1, 2**31 - 1]

    def test_tables_of_more_than_2_31_elements(self) -> None:
        if torch.cuda.mem_get_info()[0] < 6 << 30:
            pytest.skip("needs 6 GiB of GPU memory")
        table = torch.zeros(600_000, 4096, dtype=torch.bfloat16, device="cuda")
        table[599_999] = 3
        assert (backend.embed(ids(599_999).cuda(), table) == 3).all()

    def test_rope_append_is_the_oracles(self) -> None:
        """To the bit without norms, whose order of summation is the GPU's own."""
        for cache in cache_dtypes():
            for tokens, head_dim, rot, interleaved in ((1, 128, 128, False), (15, 64, 64, True), (33, 40, 24, False), (17, 256, 64, False)):
                case = with_caches(rope_case(tokens, (8, 2), head_dim, rot, block_size=32, interleaved=interleaved), cache)
                case["qkv"] = case["qkv"].bfloat16()
                given = {name: on_gpu(value) for name, value in case.items()}
                assert torch.equal(backend.rope_append(**given).cpu(), reference.rope_append(**case))
                for name in ("key_cache", "value_cache"):
                    assert torch.equal(given[name].cpu().view(torch.int8), case[name].view(torch.int8)), (cache, head_dim, name)
            x = torch.zeros(len(HOSTILE), 3, 24)
            for row, values in enumerate(HOSTILE.values()):
                x[row, 2, : len(values)] = torch.tensor(values)
            case = with_caches(rope_case(len(x), (1, 1), 24, 24), cache)
            case |= {"qkv": x.flatten(1), "slots": torch.arange(len(x), dtype=torch.int32)}
            given = {name: on_gpu(value) for name, value in case.items()}
            backend.rope_append(**given)
            reference.rope_append(**case)
            if cache in (torch.int8, torch.float8_e4m3fn):  # with one NaN for all
                assert torch.equal(given["value_cache"].cpu().view(torch.int8), case["value_cache"].view(torch.int8))
            else:
                torch.testing.assert_close(given["value_cache"].cpu(), case["value_cache"], rtol=0, atol=0, equal_nan=True)

    def test_rope_append_of_a_row_alone(self) -> None:
        case = rope_case(40, (8, 2), 128, 128, norm=torch.bfloat16, dtype=torch.bfloat16)
        case["qkv"] = case["qkv"].bfloat16()
        given = {name: on_gpu(value) for name, value in case.items()}
        alone = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        q = backend.rope_append(**given)
        for row in range(40):
            part = {name: alone[name][row : row + 1] for name in ("qkv", "positions", "slots")}
            assert torch.equal(backend.rope_append(**{**alone, **part})[0], q[row])
        for name in ("key_cache", "value_cache"):
            assert torch.equal(alone[name].view(torch.int16), given[name].view(torch.int16))

    def test_copies_are_the_oracles(self) -> None:
        for dtype in cache_dtypes():
            shape = (3, 40, 2, 2, 64, 16) if dtype in (torch.float32, torch.bfloat16) else (3, 40, 2, 2, 68, 16)
            generator = torch.Generator().manual_seed(1)
            size = torch.empty(shape, dtype=dtype).nbytes
            expected = [torch.randint(-128, 128, (size,), generator=generator, dtype=torch.int8).view(dtype).view(shape) for _ in range(2)]
            if shape[4] == 64:
                expected[1] = expected[1].view(3, 40, 2, 32, 64)
            got = [cache.cuda() for cache in expected]
            source = torch.randint(40 * 32, (100,), generator=generator, dtype=torch.int32)
            target = torch.randperm(40 * 32, generator=generator)[:100].int()
            blocks = torch.randperm(40, generator=generator)[:20].int().view(2, 10)
            for name, arguments in (("move_tokens", (source, target)), ("copy_blocks", (blocks[0], blocks[1]))):
                getattr(backend, name)(*got, *(t.cuda() for t in arguments))
                getattr(reference, name)(*expected, *arguments)
                for ours, theirs in zip(got, expected, strict=True):
                    assert torch.equal(ours.cpu().view(torch.int8), theirs.view(torch.int8)), (dtype, name)

    def test_a_captured_graph_replays_other_values_without_a_sync(self) -> None:
        table, weight = torch.randn(50, 64).bfloat16().cuda(), torch.ones(64, device="cuda")
        key_cache, value_cache = (torch.zeros(2, *t.shape, dtype=torch.bfloat16, device="cuda") for t in caches_of_a_layer())
        tokens, source, slots, entries = ids(1, 2, 3).cuda(), ids(-1, -1, -1).cuda(), ids(0, 1, 2).cuda(), ids(-1, -1).cuda()
        positions, drawn, angles = ids(0, 1, 2).cuda(), torch.tensor([40, 41, 42]).cuda(), torch.rand(9, 8, device="cuda")

        def step() -> Tensor:
            backend.feed_tokens(tokens, source, drawn)
            x = backend.rms_norm(backend.embed(tokens, table), weight, 1e-6, torch.bfloat16)
            q = backend.rope_append(
                x, positions, slots, angles.cos(), angles.sin(), key_cache[0], value_cache[0], num_heads=2
            )  # fmt: skip
            backend.move_tokens(key_cache, value_cache, entries, entries + 1)
            backend.copy_blocks(key_cache, value_cache, entries, entries + 2)
            return backend.silu_mul(q.flatten(1))

        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        for fed, to in (((0, 1, 2), (16, 17, -1)), ((2, 0, -1), (-1, 33, 34))):
            source.copy_(ids(*fed))
            slots.copy_(ids(*to))
            graph.replay()
            replayed, caches_then = result.clone(), (key_cache.clone(), value_cache.clone())
            assert torch.equal(step(), replayed)
            assert torch.equal(key_cache, caches_then[0]) and torch.equal(value_cache, caches_then[1])
        assert tokens.tolist() == [42, 40, 42]


def caches_of_a_layer() -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 1, 16, 16), torch.zeros(5, 1, 16, 16)
