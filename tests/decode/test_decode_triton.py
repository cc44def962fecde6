"""A model decoded end to end by the Triton kernels, in Triton's interpreter, its steps run as on a GPU: the oracle's tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.kernels.triton import OPS

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parents[1]
# Group -> how far log-probabilities may be off: sums in other orders, which 16 bits make larger.
GROUPS = {"fused": 1e-5, "filtered": 1e-5, "prepared": 1e-5, "drafts": 1e-5, "bfloat16": 0.05, "int8 cache": 0.05}


@pytest.fixture(scope="module")
def decoded() -> dict[str, Any]:
    """What ``triton_decode_cases`` found: group -> backend -> outputs."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "ops"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    program = TESTS / "decode" / "triton_decode_cases.py"
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(outcome) == set(GROUPS)
    return outcome


@pytest.mark.parametrize("group", GROUPS)
def test_tokens_are_the_oracles(decoded: dict[str, Any], group: str) -> None:
    triton, reference = decoded[group]["triton"], decoded[group]["reference"]
    assert {op for op, backend in triton["chosen"].items() if backend == "triton"} == set(OPS)
    assert set(reference["chosen"].values()) == {"reference"}
    assert triton["outputs"] == reference["outputs"]
    assert all(error is None and reason == "length" for _, _, reason, error in triton["outputs"])
    assert triton["logprobs"] == pytest.approx(reference["logprobs"], abs=GROUPS[group])


def test_steps_were_replayed_and_drafts_accepted(decoded: dict[str, Any]) -> None:
    """The groups do what they are there for."""
    for group in ("fused", "filtered", "prepared", "bfloat16"):
        assert decoded[group]["triton"]["replays"] == decoded[group]["reference"]["replays"] > 0, group
    drafts = decoded["drafts"]
    for backend in ("triton", "reference"):
        assert drafts[backend]["drafted"] > drafts[backend]["accepted"] > 0
