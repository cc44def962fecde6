"""Every benchmark, one command: ``python benchmarks/run.py [--suite linear|sampling|beam|decode|speculative|all] [--quick]
[--out FILE.json]``.

``--device cuda`` measures what there is on a GPU: the sampling suite.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "tests", "scripts")]

from measure import Machine, write_json  # noqa: E402

SUITES = ("linear", "sampling", "beam", "decode", "speculative")  # each a module suite_*.py with run(), and plot() where it draws figures
ON_CUDA = ("sampling",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: about a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results here as JSON, and figures beside it")
    arguments = parser.parse_args()
    names = SUITES if arguments.suite == "all" else (arguments.suite,)
    if arguments.device == "cuda":
        names = tuple(name for name in names if name in ON_CUDA)
        if not names:
            parser.error(f"on cuda there is only the suite {', '.join(ON_CUDA)}, not {arguments.suite}")
    machine = Machine()
    print(f"limits: {machine.read_bandwidth / 1e9:.1f} GB/s read, {machine.flop_rate / 1e9:.0f} GFLOP/s float32")
    suites = {name: importlib.import_module(f"suite_{name}") for name in names}
    results = {
        name: suite.run(machine, arguments.quick, arguments.device) if name in ON_CUDA else suite.run(machine, arguments.quick)
        for name, suite in suites.items()
    }
    if arguments.out:
        write_json(arguments.out, machine, results)
        for name, suite in suites.items():
            if hasattr(suite, "plot"):
                for file in suite.plot(results[name], arguments.out):
                    print(f"written: {file}")


if __name__ == "__main__":
    main()
