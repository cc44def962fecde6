"""Drafts: chains and trees, their depths and ancestors, and what is left of them."""

from __future__ import annotations

import random

import pytest

from engine.drafters.draft import MAX_DRAFT, Draft, signed


def random_tree(rng: random.Random, size: int) -> Draft:
    """Nodes in the order of their depth."""
    depth_of = [0]
    parents: list[int] = []
    for _ in range(size):
        parent = rng.choice([n for n, depth in enumerate(depth_of) if depth + 1 >= depth_of[-1]])
        parents.append(parent)
        depth_of.append(depth_of[parent] + 1)
    tokens = tuple(rng.randrange(50) for _ in parents)
    return Draft(tokens, tuple(parents), tuple(rng.random() for _ in parents), tuple(map(str, tokens)))  # type: ignore[arg-type]


def path(draft: Draft, node: int) -> list[int]:
    """The nodes from the root to this one."""
    nodes = [node]
    while nodes[-1]:
        nodes.append(draft.parents[nodes[-1] - 1])
    return nodes[::-1]


def test_a_chain():
    draft = Draft.chain([7, 8, 9], [0.5, 0.4, 0.3])
    assert draft == Draft((7, 8, 9), (0, 1, 2), (0.5, 0.4, 0.3))
    assert draft.is_chain and len(draft) == 3 and draft.depths() == [0, 1, 2, 3]
    assert draft.ancestors() == [0b1, 0b11, 0b111, 0b1111]
    assert draft.keep([1, 2]) == Draft.chain([7, 8], [0.5, 0.4])
    assert not Draft() and Draft().is_chain and Draft().depths() == [0] and Draft().ancestors() == [1]


def test_a_tree():
    draft = Draft((5, 6, 7, 8, 9), (0, 0, 1, 2, 3), (0.5,) * 5)
    assert not draft.is_chain and draft.depths() == [0, 1, 1, 2, 2, 3]
    assert draft.ancestors() == [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b101011]


def test_the_last_node_has_the_sign_bit():
    long = Draft.chain([1] * MAX_DRAFT, [0.5] * MAX_DRAFT).ancestors()
    assert len(long) == 64 and long[62] == 2**63 - 1 and long[63] == -1
    flat = Draft((1,) * MAX_DRAFT, (0,) * MAX_DRAFT, (0.5,) * MAX_DRAFT).ancestors()
    assert flat[62] == 2**62 + 1 and flat[63] == 1 - 2**63
    assert [signed(bits) for bits in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]


@pytest.mark.parametrize("seed", range(20))
def test_depths_and_ancestors_follow_the_path(seed: int):
    rng = random.Random(seed)
    draft = random_tree(rng, rng.choice([1, 2, 10, MAX_DRAFT]))
    for node, (depth, bits) in enumerate(zip(draft.depths(), draft.ancestors(), strict=True)):
        nodes = path(draft, node)
        assert depth == len(nodes) - 1
        assert bits % 2**64 == sum(1 << n for n in nodes) and -(2**63) <= bits < 2**63


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_keeps_its_paths(seed: int):
    rng = random.Random(seed)
    draft = random_tree(rng, rng.choice([1, 4, 20, MAX_DRAFT]))
    nodes: list[int] = []
    for node, parent in enumerate(draft.parents, 1):
        if parent in (0, *nodes) and rng.random() < 0.7:
            nodes.append(node)
    kept = draft.keep(nodes)
    assert len(kept) == len(nodes) and kept.depths() == sorted(kept.depths())
    for new, old in enumerate(nodes, 1):
        named = [draft.tokens[n - 1] for n in path(draft, old)[1:]]
        assert [kept.tokens[n - 1] for n in path(kept, new)[1:]] == named
        assert kept.confidence[new - 1] == draft.confidence[old - 1] and kept.sequences[new - 1] == draft.sequences[old - 1]
    assert draft.keep(range(1, len(draft) + 1)) is draft and not draft.keep([])


def test_what_a_draft_need_not_have_is_not_kept_either():
    draft = Draft((5, 6), (0, 0), (0.5, 0.5))
    assert draft.keep([2]) == Draft((6,), (0,), (0.5,))
    masses = Draft((5, 6), (0, 1), (0.5, 0.5), proposal=("a", "b"))
    assert masses.keep([1]) == Draft((5,), (0,), (0.5,), proposal=("a",))
