"""The LM head fused with the draw: the token of ``sample``, from a whole vocabulary and from shards of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import head_cases
import pytest
import torch
from torch import Tensor

from engine import kernels
from engine.kernels import STATUS_BAD_PARAMETER, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_OK, HeadDraw, merge_draws, noise, reference
from engine.verify import checks
from engine.verify.laws import Law, small_laws

INF, NAN = float("inf"), float("nan")
BACKENDS = ["reference"] + (["cpu"] if kernels.backends("cpu")["cpu"] is None else [])


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> kernels.Ops:
    return kernels.select("cpu", request.param)


# ---- the same token as `sample`, whole and in shards ----


@pytest.mark.parametrize("vocab", [1, 2, 7, 129, 5003])
def test_hostile_rows(ops: kernels.Ops, vocab: int) -> None:
    for case in head_cases.hostile_cases([vocab]):
        assert head_cases.against_sample(ops.sample_head, case, ops.linear) == []


def test_products(ops: kernels.Ops) -> None:
    for case in head_cases.products([(1, 64, 300), (5, 40, 1001), (0, 8, 5)], [torch.float32]):
        assert head_cases.against_sample(ops.sample_head, case, ops.linear) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_activations_of_16_bits(ops: kernels.Ops, dtype: torch.dtype) -> None:
    for name, x, head, given in head_cases.products([(4, 40, 301)], [dtype]):
        activations = x.float() if ops.chosen["sample_head"] == "cpu" else x
        assert head_cases.against_sample(ops.sample_head, (name, activations, head, given), ops.linear) == []


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_packed_heads(ops: kernels.Ops, form: str) -> None:
    ((_, x, head, given),) = head_cases.products([(4, 64, 300)], [torch.float32])
    assert head_cases.against_sample(ops.sample_head, (form, x, kernels.pack(head, form), given), ops.linear, [1]) == []


def test_a_row_alone_has_the_bits_it_has_among_others(ops: kernels.Ops) -> None:
    ((*_, x, head, given),) = head_cases.products([(9, 40, 1001)], [torch.float32])
    case = ("", x, head, given)
    for pieces in (1, 3):
        together = merge_draws(head_cases.shards(ops.sample_head, case, pieces))
        for r in range(len(x)):
            mine = {key: value[r : r + 1] for key, value in given.items()}
            alone = merge_draws(head_cases.shards(ops.sample_head, ("", x[r : r + 1], head, mine), pieces))
            assert alone.tokens[0] == together.tokens[r]
            if ops.chosen["sample_head"] == "cpu":  # whose product has the same bits in every batch
                assert alone.logprobs[0] == together.logprobs[r] and alone.processed_logprobs[0] == together.processed_logprobs[r]


def test_a_word_with_a_tail_is_the_tokens_own() -> None:
    """Tokens whose word lies below 256, on both sides of where shards meet."""
    rare = torch.tensor([(14677, 1659), (16242, 722), (26827, 612)])  # position, token: of seed 2024 and stream 0
    logits = torch.zeros(4096)
    for position, token in rare.tolist():
        given = {"temperature": torch.ones(1), "seed": torch.tensor([2024]), "position": torch.tensor([position]).int()}
        given["stream"] = torch.zeros(1).int()
        for first in (token - 5, token):
            part = noise.noise(given["seed"], given["position"], given["stream"], 7, first_token=first)
            whole = noise.noise(given["seed"], given["position"], given["stream"], token + 8)
            for one, other in zip(part, whole, strict=True):
                assert torch.equal(one, other[:, first : first + 7])
            assert part.low[0, token - first] > 0
        head = logits.clone()
        head[token] = -6.0
        pieces = [head[:token], head[token:]]
        draws = [
            reference.sample_head(torch.ones(1, 1), piece[:, None], **given, first_token=first)
            for piece, first in zip(pieces, (0, token), strict=True)
        ]
        assert merge_draws(draws).tokens.tolist() == [token]


# ---- the law ----


def _head_sampler(pieces: int, first_token: Callable[[int], int] = lambda first: first, merge: Any = merge_draws) -> Any:
    """A sampler for ``engine.verify`` that draws through the fastest ``sample_head``, in shards."""
    op = kernels.select("cpu").sample_head

    def run(law: Law, seed: Tensor, position: Tensor, stream: Tensor) -> Tensor:
        given = {"temperature": torch.full((len(seed),), law.temperature), "seed": seed, "position": position.int(), "stream": stream.int()}
        draws, first = [], 0
        for piece in law.logits.tensor_split(pieces):
            draws.append(op(torch.ones(len(seed), 1), piece[:, None].contiguous(), **given, first_token=first_token(first)))
            draws[-1] = draws[-1]._replace(tokens=draws[-1].tokens + first - first_token(first))
            first += len(piece)
        tokens: Tensor = merge(draws).tokens
        return tokens

    return run


LAWS = [law for law in small_laws() if not law.top_k and law.top_p == 1 and not (law.min_p or law.counts or law.bias or law.end_tokens)]
LAWS = [dataclasses.replace(law, name=f"{law.name}, fused") for law in LAWS if law.allowed is None]


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_draws_follow_the_law(law: Law, pieces: int) -> None:
    outcome = checks.follows_law(_head_sampler(pieces), law, "position", 20_000, 7)
    assert outcome.holds, str(outcome)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_noise_by_the_token_of_the_shard_is_found(law: Law) -> None:
    """Every shard with the noise of the first tokens: the draws of tokens a shard apart are no longer independent."""
    assert not checks.follows_law(_head_sampler(3, lambda first: 0), law, "position", 20_000, 7).holds


# ---- the merge ----


def _draw(tokens: list[int], scores: list[float], status: list[int] | None = None, largest: float = 0.0, mass: float = 2.0) -> HeadDraw:
    rows = len(tokens)
    both = torch.full((2, rows), largest)
    return HeadDraw(
        torch.tensor(tokens), torch.tensor(status or [STATUS_OK] * rows, dtype=torch.int32), torch.tensor(scores),
        torch.full((2, rows), -0.5), both, torch.full((2, rows), mass),
    )  # fmt: skip


def test_ties_go_to_the_lower_token_in_whatever_order_shards_come() -> None:
    low, high = _draw([3, 3, 3], [1.0, INF, 0.0]), _draw([9, 9, 9], [1.0, INF, -0.0])
    for draws in ([low, high], [high, low]):
        assert merge_draws(draws).tokens.tolist() == [3, 3, 3]
    assert merge_draws([_draw([3, 3], [1.0, 3e38]), _draw([9, 9], [1.0000001, INF])]).tokens.tolist() == [9, 9]


def test_statuses_of_shards() -> None:
    ok, nan, nothing, bad = STATUS_OK, STATUS_NAN, STATUS_NOTHING_ALLOWED, STATUS_BAD_PARAMETER
    first, second = [ok, nan, nothing, nothing, nan, nothing, nothing], [ok, ok, ok, nothing, nothing, nan, bad]
    a = _draw([3 if s == ok else -1 for s in first], [1.0 if s == ok else -INF for s in first], first)
    b = _draw([7 if s == ok else -1 for s in second], [2.0 if s == ok else -INF for s in second], second)
    for draws in ([a, b], [b, a]):
        result = merge_draws(draws)
        assert result.status.tolist() == [ok, nan, ok, nothing, nan, nan, bad] and result.status.dtype == torch.int32
        assert result.tokens.tolist() == [7, -1, 7, -1, -1, -1, -1]
        assert result.logprobs is not None and result.logprobs.isnan().tolist() == [t == -1 for t in result.tokens.tolist()]


def test_no_draws() -> None:
    with pytest.raises(ValueError, match="draws must hold those of at least one shard, got none"):
        merge_draws([])


# ---- arguments ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": torch.ones(2)}, ValueError, "temperature must have shape \\[R\\] = \\(3,\\), got \\(2,\\)"),
        ({"seed": torch.ones(3).int()}, TypeError, "seed must be int64, got torch.int32"),
        ({"stream": torch.ones(3, device="meta").int()}, ValueError, "stream is on meta while x is on cpu"),
        ({"temperature": torch.tensor([1.0, NAN, 1.0])}, ValueError, "temperature must be finite and >= 0, got nan at 1"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0])}, ValueError, "temperature must be finite and >= 0, got -1.0 at 2"),
        ({"first_token": -1}, ValueError, "first_token must be in \\[0, 2\\^22 - V = 4194299\\], got -1"),
        ({"first_token": (1 << 22) - 4}, ValueError, "first_token must be in \\[0, 2\\^22 - V = 4194299\\], got 4194300"),
        ({"first_token": 1.0}, TypeError, "first_token must be an integer, got 1.0"),
        ({"head": torch.ones(5, 3)}, ValueError, "must have shape \\[N, K\\] with K = 2, got \\(5, 3\\)"),
        ({"head": torch.ones(0, 2)}, ValueError, "head must be \\[V, K\\] with V >= 1, got \\(0, 2\\)"),
    ],
)
def test_bad_arguments(ops: kernels.Ops, change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(3, 2), "head": torch.ones(5, 2), "temperature": torch.ones(3), "seed": torch.arange(3)}
    given |= {"position": torch.arange(3).int(), "stream": torch.arange(3).int()}
    assert ops.sample_head(**given, first_token=(1 << 22) - 5).status.tolist() == [STATUS_OK] * 3
    with pytest.raises(error, match=message):
        ops.sample_head(**{**given, **change})
