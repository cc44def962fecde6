"""The block pool against a model of it: every token of every table carries the value that was last written there."""

from __future__ import annotations

import random

import pytest

from engine.blocks import BlockPool


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockPool(0)
    for size in (0, 8, 24, -16):
        with pytest.raises(ValueError, match=f"block_size is {size}"):
            BlockPool(4, size)


def test_prepare_allocates_exactly_what_the_tokens_need():
    pool = BlockPool(4, 16)
    table: list[int] = []
    for end, blocks in ((1, 1), (15, 1), (16, 1), (17, 2), (48, 3)):
        assert pool.prepare(table, 0, end) == []
        assert len(table) == blocks
        pool.check([table])
    pool.truncate(table, 16)
    assert len(table) == 1 and pool.num_free == 3
    pool.release(table)
    assert table == [] and pool.num_free == 4


def test_a_pool_too_small_changes_nothing():
    pool = BlockPool(2, 16)
    table: list[int] = []
    pool.prepare(table, 0, 16)
    with pytest.raises(RuntimeError, match="2 blocks are needed and 1 are free"):
        pool.prepare(table, 16, 48)
    assert len(table) == 1
    pool.check([table])


def test_fork_copies_only_the_block_that_is_written():
    pool = BlockPool(8, 16)
    parent: list[int] = []
    pool.prepare(parent, 0, 20)
    child = pool.fork(parent)
    assert pool.num_free == 6
    assert pool.new_blocks([(child, 20, 21)]) == 1
    copies = pool.prepare(child, 20, 21)
    assert copies == [(parent[1], child[1])]
    assert child[0] == parent[0] and child[1] != parent[1]
    # The parent is now the only holder of its last block and writes without a copy.
    assert pool.prepare(parent, 20, 21) == []
    pool.check([parent, child])


def test_a_fork_at_a_block_edge_copies_nothing():
    pool = BlockPool(8, 16)
    parent: list[int] = []
    pool.prepare(parent, 0, 32)
    child = pool.fork(parent)
    assert pool.prepare(child, 32, 33) == []
    pool.check([parent, child])


def test_check_finds_leaks_and_double_holds():
    pool = BlockPool(4, 16)
    table: list[int] = []
    pool.prepare(table, 0, 20)
    with pytest.raises(AssertionError, match="reference count"):
        pool.check([])
    with pytest.raises(AssertionError, match="reference count"):
        pool.check([table, table])


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_mixes_up_contents(seed: int):
    """Random admit, append, fork, truncate and release, with the cache's contents simulated."""
    rng = random.Random(seed)
    pool = BlockPool(rng.choice([4, 9, 40]), 16)
    memory = [[None] * 16 for _ in range(pool.num_blocks)]
    live: list[tuple[list[int], list[int]]] = []  # (table, contents)
    for _ in range(400):
        action = rng.random()
        if action < 0.5 or not live:
            if not live or rng.random() < 0.3:
                live.append(([], []))
            table, contents = rng.choice(live)
            count = rng.randint(1, 40)
            start, end = len(contents), len(contents) + count
            assert pool.is_writable(table, start, end) == (pool.new_blocks([(table, start, end)]) == 0)
            if pool.new_blocks([(table, start, end)]) > pool.num_free:
                continue
            for source, destination in pool.prepare(table, start, end):
                memory[destination] = list(memory[source])
            assert pool.is_writable(table, start, end)
            for i in range(start, end):
                value = rng.getrandbits(30)
                memory[table[i // 16]][i % 16] = value
                contents.append(value)
        elif action < 0.7:
            table, contents = rng.choice(live)
            live.append((pool.fork(table), list(contents)))
        elif action < 0.85:
            table, contents = rng.choice(live)
            keep = rng.randint(0, len(contents))
            pool.truncate(table, keep)
            del contents[keep:]
        else:
            table, _ = live.pop(rng.randrange(len(live)))
            pool.release(table)
        pool.check(table for table, _ in live)
        for table, contents in live:
            assert [memory[table[i // 16]][i % 16] for i in range(len(contents))] == contents
    for table, _ in live:
        pool.release(table)
    pool.check([])
    assert pool.num_free == pool.num_blocks


def test_permuted_tables_share_pass_on_and_drop():
    pool = BlockPool(10, 16)
    tables: list[list[int]] = [[], [], []]
    for table in tables:
        pool.prepare(table, 0, 20)
    first, second = list(tables[0]), list(tables[2])
    tables = pool.permute(tables, [2, 0, 2])
    assert tables == [second, first, second] and pool.num_free == 10 - 4
    pool.check(tables)
    # Two write to the same last block: the first copies it, the second has it to itself then.
    writes = [(table, 20, 21) for table in tables]
    assert pool.new_blocks(writes) == 1
    copies = [copy for table, start, end in writes for copy in pool.prepare(table, start, end)]
    assert len(copies) == 1 and pool.num_free == 10 - 5
    pool.check(tables)
    for table in pool.permute(tables, [1]):
        pool.release(table)
    assert pool.num_free == 10
