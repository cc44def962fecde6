"""How benchmarks measure: interleaved rounds, medians, the machine's limits from the same run, one JSON at the end."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peers.remote import Remote
from tqdm import tqdm

from engine import __version__
from engine.kernels import cpu, limits

# OpenMP threads go on spinning for milliseconds after their last work, on the cores the next contender wants.
SETTLE_SECONDS = 0.03
READ_BYTES = 256 << 20
ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit checked out, with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@dataclass
class Machine:
    """What this run measured the machine to be able to do; the yardstick of its results."""

    read_bandwidth: float = field(default_factory=limits.read_bandwidth)  # bytes/s from memory
    flop_rate: float = field(default_factory=limits.flop_rate)  # float32 operations/s
    later_read_bandwidth: float = 0.0  # the same at the end of the run
    commit: str = field(default_factory=commit)  # what was checked out when the run began

    def seconds(self, num_bytes: float, operations: float) -> float:
        """The least time a kernel that reads so many bytes and does so many operations can take: the roofline."""
        return max(num_bytes / self.read_bandwidth, operations / self.flop_rate)

    def limits_line(self) -> str:
        return f"{self.read_bandwidth / 1e9:.1f} GB/s read, {self.flop_rate / 1e9:.0f} GFLOP/s float32"

    def reader(self) -> Callable[[], float]:
        """A contender that reads READ_BYTES of memory; its seconds are for ``during``."""
        return lambda: READ_BYTES / limits.read_bandwidth(READ_BYTES, 1)

    def during(self, seconds: list[float]) -> Machine:
        """The machine as it was in rounds in which ``reader`` took so long: how fast a shared one reads changes within minutes."""
        return replace(self, read_bandwidth=READ_BYTES / statistics.median(seconds))

    def measure_again(self) -> None:
        """At the end of a run: what other guests of the machine left of it may have changed."""
        self.later_read_bandwidth = limits.read_bandwidth()
        print(f"limits at the end: {self.later_read_bandwidth / 1e9:.1f} GB/s read, of {self.read_bandwidth / 1e9:.1f} at the beginning")

    def describe(self, peers: dict[str, str | None]) -> dict[str, Any]:
        """Machine, versions and commit, for the JSON."""

        processor = platform.processor() or platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
        except OSError:
            pass
        return {
            "processor": processor,
            "kernels": cpu.describe() if cpu.unavailable("cpu") is None else "reference",
            "torch_threads": torch.get_num_threads(),
            "read_bandwidth_gb_s": self.read_bandwidth / 1e9,
            "later_read_bandwidth_gb_s": self.later_read_bandwidth / 1e9,
            "flop_rate_gflop_s": self.flop_rate / 1e9,
            "engine": __version__,
            "torch": torch.__version__,
            "peers": peers,
            "python": platform.python_version(),
            "commit": self.commit,
            "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        }


@dataclass
class Setting:
    """What a suite is run with."""

    machine: Any  # a Machine, or of a GPU `clock.Limits`
    quick: bool = True
    device: str = "cpu"
    peers: list[Remote] = field(default_factory=list)
    models: tuple[str, ...] = ("S", "M")  # of the random models, those that the decode suite runs
    # Of the serving suite: the peers it may ask, what to measure instead of them and ours, and the share of its prompts that begin alike.
    wanted: tuple[str, ...] = ()
    server: str | None = None
    server_model: str | None = None
    api_key: str | None = None
    shared_prompts: float = 0.0


def interleaved(
    contenders: dict[str, Callable[[], float]], rounds: int, progress: tqdm | None = None, slow: Collection[str] = (), slow_rounds: int = 1
) -> dict[str, list[float]]:
    """Run every contender once per round, in turn, so that a drift of the machine's speed meets them all alike; the slow ones in the
    first ``slow_rounds`` rounds only."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name, run in contenders.items():
            if name in slow and i >= slow_rounds:
                continue
            time.sleep(SETTLE_SECONDS)
            results[name].append(run())
            if progress is not None:
                progress.update()
    return results


def seconds_of(run: Callable[[], Any], inner: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - start) / inner


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(values: list[float], work: float) -> dict[str, float]:
    """The summary of ``work`` per second, of seconds."""
    return summary([work / seconds for seconds in values])


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a plain text table."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, ["-" * width for width in widths], *rows]:
        print(
            "  " + "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        )


def write_json(path: Path, written: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"\nwritten: {path}")
