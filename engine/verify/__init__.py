"""``python -m engine verify``: the exactness contract, checked on this machine and its backends.

Every backend of ``sample`` must draw each token that the law prescribes, as often as it prescribes, whatever else is in the batch; and the
statistics that say so must find planted wrong samplers.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .. import kernels
from . import checks
from .checks import Outcome, sampler_of
from .laws import Law, Sampler, draw, edge_of_top_p, long_laws, small_laws

DRAWS = (500_000, 100_000, 20_000, 2_000)  # as many of these as take a few seconds
VOCABS = (1, 2, 7, 127, 128, 129, 1000, 4097, 32_000)  # of hostile rows: around the edges of a sub-block, and long
QUICK_VOCABS = (1, 7, 127, 128, 129, 4097)
SLOW = 0.02  # seconds of a draw (Triton's interpreter takes 0.5): no counting, a few rows held against the oracle
TEETH_DRAWS = 20_000
KEY = 42

Check = Callable[[], Outcome]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="check this one only; default: every backend that can run")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1; default: cpu")
    parser.add_argument("--draws", type=int, metavar="N", help="draws per law; default: as many as take a few seconds, at most 500,000")
    parser.add_argument("--seed", type=int, default=KEY, metavar="S", help=f"key of the draws; default: {KEY}")
    parser.add_argument("--quick", action="store_true", help="fewer draws and rows")


def command(arguments: argparse.Namespace) -> int:
    """The table; exit status 1 if anything in it is not as it must be."""
    if arguments.draws is not None and not 100 <= arguments.draws <= 10**8:
        raise ValueError(f"--draws is {arguments.draws}; it must be from 100 to 100,000,000")
    if not 0 <= arguments.seed < 2**62:
        raise ValueError(f"--seed is {arguments.seed}; it must be from 0 to 2**62 - 1")
    device = _device(arguments.device)
    if arguments.backend:
        names = [arguments.backend]
    else:
        reasons = kernels.backends(device.type)
        there = [name for name, reason in reasons.items() if reason is None]
        names = [name for name in there if kernels.select(device.type, name).chosen["sample"] == name]  # `fast` draws by another's
        for name, reason in reasons.items():
            if reason is not None:
                print(f"{name} is absent: {reason}")
    sections = [("teeth: planted wrong samplers", _teeth(arguments.seed), True)]
    for name in reversed(names):
        sample = kernels.select(device.type, name).sample
        module = importlib.import_module(f"..kernels.{name}", __package__)
        title = f"{name} on {device}" + (f": {module.describe()}" if hasattr(module, "describe") else "")
        plan = _contract(name, sample, device, arguments.draws, arguments.seed, arguments.quick)
        sections.insert(0, (title + ("; too slow here to count draws" if len(plan) == 1 else ""), plan, False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads would wait for each other and for the kernels' own on every small product
    try:
        failures = _print(sections)
    finally:
        torch.set_num_threads(threads)
    print(f"\n{failures or 'none'} of {sum(len(plan) for _, plan, _ in sections)} not as it must be; key {arguments.seed}")
    return 1 if failures else 0


def _device(name: str) -> torch.device:
    """The device of that name, if its type is one that kernels are for and it is there."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"--device is {name!r}; it must be cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}; torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def _contract(name: str, sample: Callable[..., Any], device: torch.device, draws: int | None, key: int, quick: bool) -> list[Check]:
    """What a backend is held to."""
    sampler = sampler_of(sample, device)
    if _seconds(sampler, small_laws()[0], 1) > SLOW:
        return [partial(checks.hostile_rows, sample, device, (129,), 1)]
    seconds = 0.3 if quick else 3.0
    if draws is None:
        draws = next((n for n in DRAWS if _seconds(sampler, small_laws()[-1], 1000) * n < seconds), DRAWS[-1])
    tail = next((t for t in checks.TAILS if _seconds(sampler, t.law(), 4) * t.draws < 5 * seconds), checks.TAILS[-1])
    follows = partial(checks.follows_law, sampler, key=key)
    plan: list[Check] = [checks.philox_known_answers]
    if name == "cpu":
        plan.append(checks.noise_bits)
    plan += [
        partial(checks.hostile_rows, sample, device, QUICK_VOCABS if quick else VOCABS, 4),
        partial(checks.written_plainly, sampler, min(draws // 10, 2000), key),
        partial(checks.extreme_words, sampler),
        *(partial(checks.batch_invariance, sample, device, vocab) for vocab in (300, 5001 if quick else 70_001)),
    ]
    plan += [partial(follows, law, vary, draws) for law in small_laws() for vary in ("position", "seed")]
    plan += [partial(follows, law, vary, max(draws // 4, 100)) for law in long_laws() for vary in ("position", "wide seed")]
    plan += [partial(follows, edge_of_top_p(inside), "position", max(draws // 10, 100)) for inside in (False, True)]
    independent = partial(checks.neighbours_are_independent, sampler, small_laws()[0])
    plan += [partial(independent, vary, draws, key) for vary in ("position", "seed", "stream")]
    plan.append(partial(checks.far_tail, sampler, tail, key))
    return plan


def _seconds(sampler: Sampler, law: Law, draws: int) -> float:
    """Of a draw, measured after one to warm up; 0 where it fails, which the checks will tell."""
    try:
        draw(sampler, law, "position", 1)
        start = time.perf_counter()
        draw(sampler, law, "position", draws)
        return (time.perf_counter() - start) / draws
    except Exception:
        return 0.0


def _teeth(key: int) -> list[Check]:
    def named(planted: Sampler, check: checks.Check) -> Outcome:
        outcome = check(planted)
        return outcome._replace(check=f"{planted.__name__.replace('_', ' ')}: {outcome.check}")

    return [partial(named, planted, check) for planted, check in checks.teeth(TEETH_DRAWS, key)]


def _print(sections: Sequence[tuple[str, list[Check], bool]]) -> int:
    """Run the checks of ``(title, checks, planted)`` and print a line for each; how many are not as they must be."""
    failures = 0
    with tqdm(total=sum(len(plan) for _, plan, _ in sections), desc="verify", disable=None, leave=False) as progress:
        for title, plan, planted in sections:
            tqdm.write(f"\n{title}\n{'check':<72} {'draws':>8} {'statistic':>10} {'freedom':>7} {'p':>8}  verdict")
            for check in plan:
                outcome = _outcome(check)
                good = outcome.holds != planted
                failures += not good
                verdict = ("fails, as it must" if good else "NOT FOUND") if planted else ("holds" if good else "FAILS")
                tqdm.write(_line(outcome) + f"  {verdict}")
                progress.update()
    return failures


def _outcome(check: Check) -> Outcome:
    try:
        return check()
    except Exception as error:  # a backend that cannot even run has failed
        name = getattr(check, "func", check).__name__.replace("_", " ")
        return Outcome(f"{name}: {type(error).__name__}: {error}", 0, math.nan, None, None, False)


def _line(outcome: Outcome) -> str:
    statistic = f"{outcome.statistic:.1f}" if outcome.freedom else f"{outcome.statistic:.0f}"
    freedom = "" if outcome.freedom is None else str(outcome.freedom)
    p = "" if outcome.p is None else f"{outcome.p:.2g}"
    return f"{outcome.check:<72} {outcome.draws:>8} {statistic:>10} {freedom:>7} {p:>8}"
