"""Every benchmark, one command: ``python benchmarks/run.py [--suite kernels|decode|sampling|beam|speculative|scaling|serving|all]
[--full] [--models S|M|S,M] [--device cpu|cuda] [--peers auto|none|NAME,NAME] [--server URL [--server-model NAME] [--api-key KEY]]
[--shared-prompts SHARE] [--out FILE.json] [--against FILE.json] [--explain]``.

The limits of the machine are measured first; contenders run in turn, round after round, and the tables give medians. ``--quick``, the
default, has fewer cases and rounds and takes about two minutes (the first time longer: peers convert the models); ``--full`` is the real
thing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "tests", "scripts")]

import against  # noqa: E402
import torch  # noqa: E402
from clock import measure_limits  # noqa: E402
from load import ServerError  # noqa: E402
from measure import Machine, Setting, write_json  # noqa: E402
from peers.remote import find, wanted_names  # noqa: E402

# Each is a module suite_*.py with run(setting), and plot() where it draws figures.
SUITES = ("kernels", "decode", "sampling", "beam", "speculative", "scaling", "serving")
ON_CUDA = {"kernels": "suite_kernels_cuda", "decode": "suite_decode_cuda", "sampling": "suite_sampling"}  # and their modules
WITH_PEERS = ("decode", "beam")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="fewer cases and rounds, about two minutes in all (default)")
    length.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=f"cuda: only {', '.join(ON_CUDA)}, of a GPU's own")
    parser.add_argument("--peers", default="auto", help="other engines: auto (those installed), none, or names with commas")
    parser.add_argument("--models", choices=("S", "M", "S,M"), help="random models of the decode suite; default: S, with --full both")
    parser.add_argument("--server", metavar="URL", help="measure in the serving suite this server of OpenAI's API, which runs already")
    parser.add_argument("--server-model", metavar="NAME", help="what to ask it for; default: the first model that it lists")
    parser.add_argument("--api-key", metavar="KEY", help="that it asks for")
    parser.add_argument("--shared-prompts", type=float, default=0.0, metavar="SHARE", help="of the serving suite's mix that begin alike")
    parser.add_argument("--out", type=Path, help="write the results here as JSON, and figures beside it")
    parser.add_argument("--against", type=Path, help="an earlier JSON: print how many times as fast this run is, entry by entry")
    parser.add_argument("--explain", action="store_true", help="print where the time of a step goes, and run no suite unless one is named")
    arguments = parser.parse_args()
    names = SUITES if arguments.suite == "all" else (arguments.suite,)
    if arguments.explain and arguments.suite == "all":
        names = ()
    on_cuda = arguments.device == "cuda"
    if on_cuda:
        names = tuple(name for name in names if name in ON_CUDA)
        if not names or arguments.explain:
            parser.error(f"on cuda there are only the suites {', '.join(ON_CUDA)}, not {'--explain' if names else arguments.suite}")
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA GPU")
    try:
        wanted = wanted_names(arguments.peers)
    except ValueError as error:
        parser.error(str(error))
    if not 0 <= arguments.shared_prompts <= 1:
        parser.error(f"--shared-prompts is {arguments.shared_prompts}; it must be from 0 to 1")
    if arguments.out and importlib.util.find_spec("matplotlib") is None:
        parser.error("--out writes figures too, for which matplotlib is missing: pip install -e .[bench]")
    earlier = None
    if arguments.against:
        try:
            earlier = json.loads(arguments.against.read_text())
            earlier["results"], earlier["machine"]["read_bandwidth_gb_s"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--against {arguments.against} is not the JSON of an earlier run: {error!r}")

    machine: Any = measure_limits(torch.device("cuda")) if on_cuda else Machine()
    print(f"limits: {machine.limits_line()}")
    peers, absent = find(wanted if any(name in WITH_PEERS for name in names) and not on_cuda else (), torch.get_num_threads())
    for name, why in absent.items():
        print(f"peer {name} does not take part: {why}")
    models = tuple((arguments.models or ("S,M" if arguments.full else "S")).split(","))
    setting = Setting(
        machine, quick=not arguments.full, device=arguments.device, peers=peers, models=models, wanted=wanted, server=arguments.server,
        server_model=arguments.server_model, api_key=arguments.api_key, shared_prompts=arguments.shared_prompts,
    )  # fmt: skip
    suites = {name: importlib.import_module(ON_CUDA[name] if on_cuda else f"suite_{name}") for name in names}
    try:
        results = {name: suite.run(setting) for name, suite in suites.items()}
        if arguments.explain:
            results["explain"] = importlib.import_module("explain").run(setting)
    except ServerError as error:
        parser.error(str(error))
    finally:
        for peer in peers:
            peer.close()
    machine.measure_again()
    written = {"machine": machine.describe({peer.name: peer.version for peer in peers}), "results": results}
    if arguments.out:
        write_json(arguments.out, written)
        for name, suite in suites.items():
            if hasattr(suite, "plot"):
                for file in suite.plot(results[name], arguments.out):
                    print(f"written: {file}")
    if earlier is not None:
        against.report(earlier, written, arguments.against.name)
    if failed := [error for result in results.values() if isinstance(result, dict) for error in result.get("errors", ())]:
        sys.exit("failed, and left out of the results:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
