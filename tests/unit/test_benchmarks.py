"""What benchmarks make of their numbers, and how they talk to other engines. Nothing is timed here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import against
import measure
import suite_decode
from peers import ALL, BATCHING, NAMES, converted, make
from peers.remote import PeerError, Remote, find, wanted_names


def summary(median: float) -> dict[str, float]:
    return {"median": median, "min": median / 2, "max": median * 2}


def run_of(results: Any, bandwidth: float = 30.0) -> dict[str, Any]:
    return {"machine": {"commit": "abc", "read_bandwidth_gb_s": bandwidth}, "results": results}


# ---- --against ----


def test_measures_are_speeds_named_by_where_they_stand() -> None:
    results = {
        "linear": [{"n": 8, "format": "int8", "seconds": summary(0.5), "limit_share": 0.7, "torch_seconds": summary(0.25)}],
        "decode": {"cells": [{"model": "S", "case": "b1", "tokens_per_second": summary(100.0), "limit": 120.0, "agreement": None}]},
        "search": [{"batch": 1, "tokens_per_second": {"ours": summary(9.0), "peer": summary(3.0)}}],
        "plain": {"tokens_per_second": 7, "rates": [1.0, 2.0]},
    }
    assert dict(against.measures(results)) == {
        ("linear", "n 8, format int8", "seconds"): 2.0,
        ("linear", "n 8, format int8", "torch_seconds"): 4.0,
        ("decode", "cells", "model S, case b1", "tokens_per_second"): 100.0,
        ("search", "batch 1", "tokens_per_second", "ours"): 9.0,
        ("search", "batch 1", "tokens_per_second", "peer"): 3.0,
        ("plain", "tokens_per_second"): 7,
    }


def test_entries_are_compared_wherever_they_stand_in_a_list() -> None:
    earlier = run_of({"a": [{"rows": 1, "seconds": summary(1.0)}, {"rows": 8, "seconds": summary(4.0)}]})
    later = run_of(
        {"a": [{"rows": 8, "seconds": summary(2.0)}, {"rows": 16, "seconds": summary(1.0)}, {"rows": 1, "seconds": summary(1.0)}]}
    )
    assert against.compare(earlier, later) == {("a", "rows 8", "seconds"): 2.0, ("a", "rows 1", "seconds"): 1.0}


def test_measures_that_are_no_speed_are_left_out() -> None:
    assert dict(against.measures({"a_seconds": 0.0, "b_seconds": None, "c_seconds": summary(-1.0), "d_seconds": "3"})) == {}


def test_report_shows_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    def results(first: float, second: float) -> list[dict[str, Any]]:
        return [{"case": "first", "seconds": summary(first)}, {"case": "second", "seconds": summary(second)}]

    against.report(run_of(results(1.0, 1.0)), run_of(results(0.99, 0.5), 60.0), "old.json")
    printed = capsys.readouterr().out
    assert "case second / seconds" in printed and "2.00" in printed and "case first" not in printed
    assert "2 entries in both, 1 within 5%" in printed and "read 2.00 times as fast" in printed
    against.report(run_of([]), run_of(results(1.0, 1.0)), "old.json")
    assert "no entry is in both" in capsys.readouterr().out


# ---- tables, limits, aims ----


def test_columns_of_a_table_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    measure.table("title", ["name", "value"], [["a", "1.5"], ["longer", "12345678"]])
    title, *lines = capsys.readouterr().out.splitlines()[1:]
    assert title == "title" and len({len(line) for line in lines}) == 1
    assert lines[2].startswith("  a ") and lines[2].endswith(" 1.5")


def test_agreement_ends_with_the_first_other_token() -> None:
    assert suite_decode.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == 1.0
    assert suite_decode.agreement([[1, 9, 3], [9, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == pytest.approx(1 / 6)


def test_limit_of_a_step_is_the_larger_of_bytes_and_operations() -> None:
    # Weights of S without norms: 12 layers of 768 * (2 * 768 + 2 * 256 + 3 * 2048), and the head.
    weights = 12 * 768 * (1536 + 512 + 6144) + 32_000 * 768
    keys_and_values = (128 + 16) * 2 * 12 * 256
    reads = measure.Machine(read_bandwidth=1.0, flop_rate=1e30)
    multiplies = measure.Machine(read_bandwidth=1e30, flop_rate=1.0)

    def limit(machine: measure.Machine, group: str, case: suite_decode.Case) -> float | None:
        return suite_decode.limit_rate(machine, "S", group, case, 32)

    assert limit(reads, "fp32", suite_decode.B1) == pytest.approx(1 / (4 * (weights + keys_and_values)))
    assert limit(reads, "16-bit", suite_decode.B8) == pytest.approx(8 / (2 * (weights + 8 * keys_and_values)))
    assert limit(reads, "int4", suite_decode.B1) == pytest.approx(1 / (weights * 0.5625))
    assert limit(multiplies, "fp32", suite_decode.B32) == pytest.approx(32 / (2 * 32 * weights))
    assert limit(multiplies, "fp32", suite_decode.BEAMS[1]) == pytest.approx(4 / (2 * 16 * weights))
    assert limit(reads, "int8", suite_decode.PREFILL) is None


def test_the_yardstick_is_what_the_same_rounds_could_read() -> None:
    machine = measure.Machine(read_bandwidth=1.0, flop_rate=5.0)
    slower = machine.during([0.5, 4.0, 2.0])
    assert (slower.read_bandwidth, slower.flop_rate) == (measure.READ_BYTES / 2.0, 5.0)
    assert machine.read_bandwidth == 1.0


def cell(contender: str, rate: float, *, case: str = "b1", group: str = "fp32") -> dict[str, Any]:
    return {
        "model": "S", "weights": group, "case": case, "contender": contender, "format": group, "tokens_per_second": summary(rate),
        "limit": 200.0, "limit_share": rate / 200, "agreement": 1.0, "first_agreement": 1.0,
    }  # fmt: skip


def test_tables_and_aims_are_against_the_best_peer(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell("ours", 100), cell("slow", 50), cell("fast", 80), cell("ours", 90, case="b8"), cell("fast", 90, case="b8")]
    suite_decode.shape_tables(cells, "S")
    printed = capsys.readouterr().out
    assert "100 50%" in printed and "2.00" in printed and "1.25" in printed
    found = {(a["case"], a["peer"]): (a["reached"], a["met"]) for a in suite_decode.aims(cells)}
    assert found == {("b1", "fast"): (1.25, True), ("b8", "fast"): (1.0, False)}  # at least 1 and 1.25 times
    assert suite_decode.aims([cell("ours", 100)]) == []


# ---- peers ----


@pytest.mark.parametrize("name", NAMES + BATCHING)
def test_every_peer_says_whether_it_can_run(name: str) -> None:
    peer = make(name)
    why = peer.unavailable()
    assert peer.name == name and (why is None or why.startswith("not installed: "))


def test_unknown_peers_are_named() -> None:
    with pytest.raises(ValueError, match="peer 'vllm': must be one of transformers,"):
        make("vllm")
    with pytest.raises(ValueError, match="--peers transformers,nobody: 'nobody' must be one of"):
        wanted_names("transformers,nobody")
    assert wanted_names("transformers,vllm") == ("transformers", "vllm")
    assert wanted_names("auto") == ALL and wanted_names("none") == ()
    assert find(["vllm"], 1) == ([], {})  # a server, and none that decodes here


def test_a_peer_in_a_python_that_is_not_there_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGINE_PEERS_LLAMA_CPP", str(tmp_path / "python"))
    found, absent = find(["llama_cpp"], 1)
    assert found == [] and absent["llama_cpp"].startswith("llama_cpp: cannot start")


def test_a_peer_tells_its_errors_and_goes_on(tmp_path: Path) -> None:
    peer = Remote("transformers", 1)
    try:
        assert peer.unavailable is None and "fp32" in peer.dtypes and peer.beams
        with pytest.raises(PeerError, match="transformers: .*Error"):
            peer.load(tmp_path / "nothing", "fp32")
        with pytest.raises(PeerError, match="transformers: .*Error"):  # it still answers
            peer.prefill([1, 2, 3])
        peer._process.kill()
        peer._process.wait()
        with pytest.raises(PeerError, match="transformers died: "):
            peer.prefill([1, 2, 3])
    finally:
        peer.close()


def test_conversions_are_kept_only_when_they_succeed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    calls = []

    def build(target: Path) -> None:
        calls.append(target)
        (target / "file").write_text("made")
        if len(calls) == 1:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        converted(folder, "peer-fp32", build)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        assert (converted(folder, "peer-fp32", build) / "file").read_text() == "made"
    assert len(calls) == 2 and [path.name for path in tmp_path.iterdir()] == ["peer-fp32"]
