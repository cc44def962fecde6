"""Compares the results of two runs: entries that both have, by how many times as fast the later one is.

A measure is a number, or a summary with a median, under a key that ends with ``seconds`` (less is faster) or ``per_second`` (more is).
Where it stands in the results names it: by the keys on the way, and in lists by what says which entry it is (its texts and whole numbers).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from measure import table

CHANGED = 0.05  # a ratio this far from 1 is shown; the others are counted


def measures(results: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every measure as (path, speed), more is faster."""
    if isinstance(results, Mapping):
        for key, value in results.items():
            yield from _measure(str(key), value, path)
    elif isinstance(results, list):
        for i, entry in enumerate(results):
            yield from measures(entry, (*path, _identity(entry) or str(i)))


def _measure(key: str, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    faster_is_more = key.endswith("per_second")
    if not faster_is_more and not key.endswith("seconds"):
        yield from measures(value, (*path, key))
        return
    by_name = {"": value} if isinstance(value, (int, float)) or _is_summary(value) else value
    if not isinstance(by_name, Mapping):
        return
    for name, one in by_name.items():
        number = one["median"] if _is_summary(one) else one
        if isinstance(number, (int, float)) and number > 0:
            yield (*path, key, name) if name else (*path, key), number if faster_is_more else 1 / number


def _is_summary(value: Any) -> bool:
    return isinstance(value, Mapping) and "median" in value


def _identity(entry: Any) -> str:
    """What of a list's entry says which it is: texts, whole numbers and truth values."""
    if not isinstance(entry, Mapping):
        return ""
    return ", ".join(f"{key} {value}" for key, value in entry.items() if isinstance(value, (str, int)))


def compare(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """Speed of ``later`` over that of ``earlier`` for every measure that both have."""
    before = dict(measures(earlier["results"]))
    return {path: speed / before[path] for path, speed in measures(later["results"]) if path in before}


def report(earlier: Mapping[str, Any], later: Mapping[str, Any], name: str) -> None:
    """Print the comparison: what changed, the median, and what the machine could do both times."""
    ratios = compare(earlier, later)
    if not ratios:
        print(f"\nagainst {name}: no entry is in both runs")
        return
    shown = sorted((item for item in ratios.items() if abs(item[1] - 1) > CHANGED), key=lambda item: item[1])
    table(
        f"against {name} ({earlier['machine'].get('commit', '?')}): times as fast",
        ["", "ratio"],
        [[" / ".join(path), f"{ratio:.2f}"] for path, ratio in shown],
    )
    bandwidth = later["machine"]["read_bandwidth_gb_s"] / earlier["machine"]["read_bandwidth_gb_s"]
    print(
        f"  {len(ratios)} entries in both, {len(ratios) - len(shown)} within {CHANGED:.0%}; median ratio "
        f"{statistics.median(ratios.values()):.2f}; the machine read {bandwidth:.2f} times as fast"
    )
