"""The benchmarks of GPUs run on a CPU, over the oracle's kernels and at tiny sizes: that they call what is there, and what they make of
their times. No time is looked at."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import clock
import measure
import suite_decode_cuda as decode_suite
import suite_kernels_cuda as kernel_suite
from measure import Setting, interleaved

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def no_rests() -> Iterator[None]:
    """No contender needs a quiet machine here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SETTLE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def limits() -> clock.Limits:
    return clock.measure_limits(CPU, num_bytes=1 << 16, product=16)


def test_limits_are_rates_of_what_was_measured(limits: clock.Limits) -> None:
    assert limits.read_bandwidth >= limits.copy_bandwidth > 0 and limits.operation_rate > 0 and limits.kernel_seconds > 0
    known = replace(limits, read_bandwidth=10.0, operation_rate=100.0)
    assert known.seconds(20.0) == 2.0 and known.seconds(20.0, 1000.0) == 10.0
    described = limits.describe({"peer": None})
    assert described["torch"] == torch.__version__ and json.dumps(described)


def test_every_call_of_a_contender_is_made_in_turn() -> None:
    made: list[int] = []
    run = clock.Clock(CPU).timed([lambda i=i: made.append(i) for i in range(3)])
    times = interleaved({"one": run}, 2)
    assert made == [0, 1, 2] * 2 and all(seconds > 0 for seconds in times["one"])


def test_events_are_around_as_many_calls_as_take_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    events = clock._Launched([lambda: None] * 4)
    asked: list[int] = []

    def seconds(repeats: int) -> float:
        asked.append(repeats)
        return repeats * clock.RUN_SECONDS / 5

    monkeypatch.setattr(events, "_seconds", seconds)
    assert events() == pytest.approx(clock.RUN_SECONDS / 5 / 4) and asked == [1, 5]
    assert events() == pytest.approx(clock.RUN_SECONDS / 5 / 4) and asked == [1, 5, 5]


# ---- kernels ----

TINY = kernel_suite.Sizes(
    hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=200, pool_bytes=1 << 14, rows=(1, 3), contexts=((1, 40), (2, 17)),
    verified=3, prompts=(20,), groups=2, beams=2,
)  # fmt: skip


def test_the_kernel_suite_runs(limits: clock.Limits, capsys: pytest.CaptureFixture[str]) -> None:
    results = kernel_suite.run(Setting(limits), TINY)
    assert results["errors"] == []
    entries = results["entries"]
    assert {e["kernel"] for e in entries} == {
        "paged_attention", "linear", "sample_head", "rms_norm", "silu_mul", "rope_append", "embed", "feed_tokens", "sample", "beam_select",
    }  # fmt: skip
    for e in entries:
        assert e["seconds"]["median"] > 0 and e["bytes"] > 0 and e["limit_share"] > 0 and e["copy_share"] > 0
    assert {e["contender"] for e in entries if e["case"] == "down, 3 rows"} == {"reference", "int8", "int4", "fp8"}
    verified = [e for e in entries if e["contender"] == "3 queries"]
    assert len(verified) == 2 * 3 and len({e["case"] for e in verified}) == 6  # contexts, caches
    # A context of 40 tokens in bfloat16: three blocks of keys and values of two heads of 16, and the queries and their result.
    (one,) = (e for e in entries if (e["case"], e["contender"]) == ("batch 1, 40 tokens, bfloat16 cache", "1 query"))
    assert one["bytes"] == 3 * 16 * 2 * 2 * 16 * 2 + 2 * 4 * 16 * 2
    assert len(results["aims"]) == 2 * 2 + 1 and json.dumps(results)
    assert "paged_attention" in capsys.readouterr().out


def test_a_kernel_that_fails_is_told_and_the_others_go_on(limits: clock.Limits) -> None:
    bench = kernel_suite.Bench(CPU, TINY, limits, 1)

    def failing() -> None:
        raise RuntimeError("no such instruction\nmore")

    bench.clock.timed = lambda calls, captured=True: calls[0]() or (lambda: 2.0)  # type: ignore[method-assign]
    lines = [kernel_suite.Line("bad", [failing], 1.0), kernel_suite.Line("good", [lambda: None], limits.copy_bandwidth)]
    bad, good = bench.measure(kernel_suite.Group("op", "case", lines))
    assert bad["error"] == "RuntimeError: no such instruction" and "seconds" not in bad
    assert good["times_first"] == 1.0 and good["copy_share"] == 0.5


def test_aims_of_kernels() -> None:
    def entry(kernel: str, case: str, contender: str, **values: Any) -> dict[str, Any]:
        return {"kernel": kernel, "case": case, "contender": contender, "seconds": {"median": 1.0}, **values}

    sizes = replace(kernel_suite.SIZES, contexts=((1, 16_384), (64, 1024)))
    entries = [
        entry("paged_attention", "batch 1, 16384 tokens, bfloat16 cache", "1 query", copy_share=0.7, times_first=1.0),
        entry("paged_attention", "batch 64, 1024 tokens, bfloat16 cache", "1 query", copy_share=0.7, times_first=1.0),
        entry("paged_attention", "batch 64, 1024 tokens, bfloat16 cache", "8 queries", copy_share=0.6, times_first=1.2),
        entry("beam_select", "16 groups of 4 beams", "CUDA kernel", times_first=2.9),
    ]
    judged = {a["aim"]: (a["bound"], a["reached"], a["met"]) for a in kernel_suite.aims(entries, sizes)}
    assert judged == {
        "attention, batch 1, 16384 tokens, bfloat16 cache: of copy bandwidth": (">= 0.6", 0.7, True),
        "attention, batch 1, 16384 tokens, bfloat16 cache: 8 queries / 1": ("<= 1.1", None, None),
        "attention, batch 64, 1024 tokens, bfloat16 cache: of copy bandwidth": (">= 0.8", 0.7, False),
        "attention, batch 64, 1024 tokens, bfloat16 cache: 8 queries / 1": ("<= 1.1", 1.2, False),
        "beam_select of Triton, 16 groups of 4 beams: / plain read": ("<= 3", None, None),
        "beam_select of CUDA kernel, 16 groups of 4 beams: / plain read": ("<= 3", 2.9, True),
    }


# ---- decoding ----


def test_the_decode_suite_runs(limits: clock.Limits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shape = decode_suite.Shape("8B", 131, 64, 96, 1, 4, 2, False, (1, 2))
    lengths = decode_suite.Length(4, 2, warm=2, peer_steps=3)
    monkeypatch.setattr(decode_suite, "Length", lambda *given: lengths)
    results = decode_suite.run(Setting(limits, quick=False), (shape, replace(shape, name="200M", tied=True, batches=(1,))), context=20)
    assert results["errors"] == []
    entries = {(e["model"], e["batch"], e["contender"]): e for e in results["entries"]}
    variants = [name for name in decode_suite.VARIANTS if name not in decode_suite.NEEDS_GPU]
    assert set(entries) == {(*case, who) for case in (("8B", 1), ("8B", 2), ("200M", 1)) for who in [*variants, "transformers"]}
    for e in entries.values():
        assert e["step_seconds"]["median"] > 0 and e["tokens_per_second"] == e["batch"] / e["step_seconds"]["median"]
        assert ("limit_share" in e) == (e["contender"] != "transformers") and "agreement" in e
    assert entries["8B", 2, "ours, deterministic"]["agreement"] == entries["8B", 2, "ours"]["agreement"] > 0
    mine, one = entries["8B", 2, "ours"], entries["8B", 1, "ours"]
    # Weights count once, keys and values for each sequence: 2 bytes, keys and values, 2 heads of 16.
    assert (mine["bytes"] - one["bytes"]) % (2 * 2 * 32) == 0 and 20 < (mine["bytes"] - one["bytes"]) / (2 * 2 * 32) < 40
    assert entries["8B", 1, "ours, int8 weights"]["bytes"] < one["bytes"]
    assert len(results["aims"]) == 7 and json.dumps(results)
    assert "of limit" in capsys.readouterr().out


def test_a_contender_that_fails_leaves_the_others(limits: clock.Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any) -> dict[str, Any]:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(decode_suite, "ours", failing)
    shape = decode_suite.Shape("200M", 131, 64, 96, 1, 4, 2, True, (1,))
    with decode_suite.on_device(shape, CPU) as model:
        length = decode_suite.Length(1, 1, peer_steps=2)
        first, last = decode_suite.measure_case(model, shape, 1, 8, ["ours"], length, limits)
    assert first["error"] == "RuntimeError: no kernel" and "tokens_per_second" in last
    judged = decode_suite.aims([first, last])
    assert all(a["reached"] is None and a["met"] is None for a in judged)


def test_aims_of_decoding() -> None:
    def entry(model: str, batch: int, contender: str, seconds: float, **values: Any) -> dict[str, Any]:
        return {"model": model, "batch": batch, "contender": contender, "step_seconds": {"median": seconds}, **values}

    entries = [
        entry("8B", 64, "ours", 2.0, limit_share=0.8), entry("8B", 64, "ours, deterministic", 3.0, limit_share=0.5),
        entry("8B", 64, "transformers", 19.0), entry("200M", 1, "ours", 1.0, limit_share=0.4), entry("200M", 1, "transformers", 11.0),
    ]  # fmt: skip
    judged = {a["aim"]: (a["reached"], a["met"]) for a in decode_suite.aims(entries) if a["reached"] is not None}
    assert judged == {
        "8B, batch 64: of the limit": (0.8, True),
        "8B, batch 64: transformers / ours": (9.5, False),
        "8B, batch 64: deterministic / fast": (1.5, False),
        "200M, batch 1: transformers / ours": (11.0, True),
    }


def test_agreement_is_over_what_both_have() -> None:
    assert decode_suite.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9], [5, 6, 7]]) == 5 / 6


# ---- the command ----


def test_the_command_writes_results_before_it_tells_what_failed(
    limits: clock.Limits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import run as command

    file = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--suite", "kernels", "--peers", "none", "--out", str(file)])
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())  # figures are left out here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "measure_limits", lambda device: limits)
    monkeypatch.setattr(clock, "bandwidths", lambda its_clock: (1.0, 2.0))
    monkeypatch.setattr(kernel_suite, "run", lambda setting: {"entries": [{"seconds": 1.0}], "errors": ["rope_append: no such kernel"]})
    monkeypatch.setattr(kernel_suite, "plot", lambda results, out: [])
    with pytest.raises(SystemExit, match="rope_append: no such kernel"):
        command.main()
    written = json.loads(file.read_text())
    assert written["results"]["kernels"]["entries"] == [{"seconds": 1.0}]
    assert written["machine"]["command"].endswith(f"--out {file}") and written["machine"]["later_read_bandwidth_gb_s"] == 2e-9


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import run as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for suite, said in (("kernels", "torch finds no CUDA GPU"), ("serving", "on cuda there are only the suites kernels, decode, sampling")):
        monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cuda", "--suite", suite])
        with pytest.raises(SystemExit):
            command.main()
        assert said in capsys.readouterr().err
