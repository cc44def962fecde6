"""``python -m engine verify``: prints every check, returns 0, and 1 where a backend is wrong. Its laws and statistics: test_sample_law."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from engine import kernels, verify
from engine.cli import main

CONTROLS = (
    "temperature", "top-k", "top-p", "min-p", "repetition", "presence", "frequency", "bias", "allowed", "end tokens", "all controls",
)  # fmt: skip
FASTEST = kernels.select("cpu")
OTHERS = (
    "Philox",
    "hostile rows",
    "each token",
    "next to 0 and 2^32",
    "alone, shuffled",
    "long row",
    "edge",
    "pairs of neighbours",
    "far tail",
)


def lines_of(text: str) -> list[str]:
    """Those with a verdict."""
    return [line for line in text.splitlines() if line.endswith(("  holds", "  FAILS", "fails, as it must", "NOT FOUND"))]


def test_quick_run_prints_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--quick", "--draws", "1000"]) == 0
    printed = capsys.readouterr().out
    for name, reason in kernels.backends("cpu").items():
        assert (f"{name} on cpu" in printed) == (reason is None)
        assert (f"{name} is absent" in printed) == (reason is not None)
    lines = lines_of(printed)
    checks = [line for line in lines if line.endswith("  holds")]
    for name in CONTROLS + OTHERS:
        assert any(name in line for line in checks), name
    assert sum(line.endswith("fails, as it must") for line in lines) == len(verify.checks.teeth(1, 0))
    assert not any(line.endswith(("FAILS", "NOT FOUND")) for line in lines)
    assert f"none of {len(lines)} not as it must be" in printed


def plant(monkeypatch: pytest.MonkeyPatch, sample: Callable[..., Any]) -> None:
    """``sample`` in the place of every backend's; no teeth, which are not the backend's."""
    monkeypatch.setattr(kernels, "select", lambda device_type, backend: dataclasses.replace(FASTEST, sample=sample))
    monkeypatch.setattr(verify, "_teeth", lambda key: [])


def temperature_ignored(**given: Any) -> Any:
    given["temperature"] = given["temperature"].clamp(max=1).ceil()
    return FASTEST.sample(**given)


def raises(**given: Any) -> Any:
    raise RuntimeError("no such kernel")


def status_forgotten(**given: Any) -> Any:
    result = FASTEST.sample(**given)
    return result._replace(status=result.status * 0)


@pytest.mark.parametrize(
    ("sample", "failing"),
    [(temperature_ignored, "temperature 1.7, flat"), (raises, "RuntimeError: no such kernel"), (status_forgotten, "hostile rows")],
)
def test_broken_backend_fails(
    sample: Callable[..., Any], failing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, sample)
    assert main(["verify", "--quick", "--draws", "1000", "--backend", "reference"]) == 1
    assert any(failing in line and line.endswith("FAILS") for line in lines_of(capsys.readouterr().out))


def test_tooth_that_does_not_bite_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A planted wrong sampler that the statistics do not find is a failure of the command."""
    monkeypatch.setattr(verify, "_contract", lambda *arguments: [])
    monkeypatch.setattr(verify.checks, "teeth", lambda draws, key: [(verify.checks.wrong.plain, verify.checks.extreme_words)])
    assert main(["verify", "--quick"]) == 1
    assert lines_of(capsys.readouterr().out)[0].endswith("NOT FOUND")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draws", "5"], "--draws is 5; it must be from 100"),
        (["--seed", "-1"], "--seed is -1; it must be from 0"),
        (["--backend", "none"], "known backends are"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *options]) == 2
    assert message in capsys.readouterr().err
