"""A model decoded end to end by the Triton kernels, in Triton's interpreter, its steps run as on a GPU: the oracle's tokens."""

from __future__ import annotations

from typing import Any

import pytest
from interpreted import Interpreted

from engine.kernels.triton import OPS

pytest.importorskip("triton")

# Group -> how far log-probabilities may be off: sums in other orders, which 16 bits make larger.
GROUPS = {"fused": 1e-5, "filtered": 1e-5, "prepared": 1e-5, "drafts": 1e-5, "bfloat16": 0.05, "int8 cache": 0.05}
INTERPRETED = Interpreted("decode/triton_decode_cases.py", ())


@pytest.mark.parametrize("group", GROUPS)
def test_tokens_are_the_oracles(interpreted: dict[str, Any], group: str) -> None:
    triton, reference = interpreted[group]["triton"], interpreted[group]["reference"]
    assert {op for op, backend in triton["chosen"].items() if backend == "triton"} == set(OPS)
    assert set(reference["chosen"].values()) == {"reference"}
    assert triton["outputs"] == reference["outputs"]
    assert all(error is None and reason == "length" for _, _, reason, error in triton["outputs"])
    assert triton["logprobs"] == pytest.approx(reference["logprobs"], abs=GROUPS[group])


def test_steps_were_replayed_and_drafts_accepted(interpreted: dict[str, Any]) -> None:
    """The groups do what they are there for."""
    for group in ("fused", "filtered", "prepared", "bfloat16"):
        assert interpreted[group]["triton"]["replays"] == interpreted[group]["reference"]["replays"] > 0, group
    drafts = interpreted["drafts"]
    for backend in ("triton", "reference"):
        assert drafts[backend]["drafted"] > drafts[backend]["accepted"] > 0
