"""Every benchmark, one command: ``python benchmarks/run.py [--suite linear|decode|all] [--quick] [--out FILE.json]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "tests")]

import suite_decode  # noqa: E402
import suite_linear  # noqa: E402
from measure import Machine, write_json  # noqa: E402

SUITES = {"linear": suite_linear.run, "decode": suite_decode.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: about a minute")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    machine = Machine()
    print(f"limits: {machine.read_bandwidth / 1e9:.1f} GB/s read, {machine.flop_rate / 1e9:.0f} GFLOP/s float32")
    results = {name: run(machine, arguments.quick) for name, run in SUITES.items() if arguments.suite in (name, "all")}
    if arguments.out:
        write_json(arguments.out, machine, results)


if __name__ == "__main__":
    main()
