"""``verify_drafts``: the oracle and the C++ walk keep what a plain walk keeps (Triton's is tested in ``test_triton_verify``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import verify_cases
from torch import Tensor
from verify_cases import call, chain, ints

from engine.kernels import cpu, reference

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def verify_drafts(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu" and cpu.unavailable("cpu") is not None:
        pytest.skip(str(cpu.unavailable("cpu")))
    return {"reference": reference, "cpu": cpu}[request.param].verify_drafts


@pytest.mark.parametrize(("name", "given"), [pytest.param(*case, id=case[0]) for case in verify_cases.cases()])
def test_keeps_what_a_plain_walk_keeps(verify_drafts: Any, name: str, given: dict[str, Tensor]) -> None:
    result = verify_drafts(**given)
    accepted, path = verify_cases.walk(**given)
    assert result.num_accepted.tolist() == accepted
    assert result.path.tolist() == path
    assert result.num_accepted.dtype == result.path.dtype == torch.int32
    assert result.tokens is None and result.status is None


def test_cases_keep_some_and_drop_some() -> None:
    """The random trees end early, end at a failure, and pass other siblings by."""
    kept = {name: verify_cases.walk(**given)[0] for name, given in verify_cases.cases()}
    assert kept["all of a chain"] == [3] and kept["none of a chain, though its rest agrees"] == [0]
    assert kept["a chain of 64"] == [63] and kept["a chain of 64 that ends at each place"] == list(range(63))
    assert kept["the first of equal siblings, though the second has children"] == [1]
    assert kept["ids above 32 bits"] == [0]
    depths = [depth for name, accepted in kept.items() if "of 12" in name for depth in accepted]
    assert {0, 1, 2, 3} < set(depths) and max(depths) > 10


def test_a_sequence_is_the_same_alone(verify_drafts: Any) -> None:
    for _, given in verify_cases.cases():
        start = given["start"].tolist()
        together = verify_drafts(**given)
        for s, (first, last) in enumerate(zip(start, start[1:], strict=False)):
            rows = {name: t[first:last] for name, t in given.items() if name != "start"}
            alone = verify_drafts(**rows, start=ints(0, last - first))
            assert alone.num_accepted.tolist() == [int(together.num_accepted[s])]
            assert torch.equal(alone.path, together.path[first:last])


GOOD = call([chain([1, 2, 3], [1, 2]), chain([1, 2], [1])])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"start": ints(1, 3, 5)}, ValueError, "start must run from 0 to 5, the number of rows, got 1 to 5"),
        ({"start": ints(0, 3, 4)}, ValueError, "start must run from 0 to 5, the number of rows, got 0 to 4"),
        ({"start": ints(0)}, ValueError, "start must run from 0 to 5, the number of rows, got 0 to 0"),
        ({"start": ints(0, 5, 5)}, ValueError, "start must give each sequence 1 to 64 rows, got 0 at 1"),
        ({"start": ints(0, 6, 5)}, ValueError, "start must give each sequence 1 to 64 rows, got -1 at 1"),
        ({"start": ints(0, -(2**31), 2**31 - 1, 5)}, ValueError, "start must give each sequence 1 to 64 rows, got -2147483648 at 0"),
        ({"start": ints()}, ValueError, "start must have shape \\[S \\+ 1\\] with S >= 0, got \\(0,\\)"),
        ({"parent": ints(0, 0, 2, 0, 0)}, ValueError, "parent must be a node before its own, here in \\[0, 2\\), got 2 at 2"),
        ({"parent": ints(0, 0, 1, 0, -1)}, ValueError, "parent must be a node before its own, here in \\[0, 1\\), got -1 at 4"),
        ({"parent": ints(0, 0, 1, 0, 3)}, ValueError, "parent must be a node before its own, here in \\[0, 1\\), got 3 at 4"),
        ({"tokens": ints(1, 2, 3, 1, 2)}, TypeError, "tokens must be int64, got torch.int32"),
        ({"tokens": [1, 2, 3, 1, 2]}, TypeError, "tokens must be a tensor, got list"),
        ({"draft": torch.zeros(5, dtype=torch.int64)}, TypeError, "draft must be int32, got torch.int64"),
        ({"status": ints(0, 0, 0, 0)}, ValueError, "status must have shape \\[R\\] = \\(5,\\), got \\(4,\\)"),
        ({"parent": torch.zeros(10, dtype=torch.int32)[::2]}, ValueError, "parent must be contiguous, got strides \\(2,\\)"),
        ({"start": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "start is on meta while tokens is on cpu"),
    ],
)
def test_bad_input(verify_drafts: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify_drafts(**{**GOOD, **change})


def test_a_tree_of_65_rows_is_refused(verify_drafts: Any) -> None:
    with pytest.raises(ValueError, match="start must give each sequence 1 to 64 rows, got 65 at 0"):
        verify_drafts(**call([chain(list(range(65)), list(range(64)))]))
