"""The block pool: which cache blocks belong to which sequence. Counts and ids only, no tensors.

A *block* holds ``block_size`` consecutive tokens of one sequence. A *block table* holds a sequence's block ids, in token order: an array of
int32, as kernels read it.
Several tables may share a block (fork, permute); a shared block is copied when one of them is about to write into it (copy-on-write),
which only ever concerns the last, partly filled block of a fork.

The *prefix cache* is a trie of full blocks: a cached block has a key, which is its parent (the block before it; for the first of a sequence
the salt) and its tokens, compared themselves and not by a hash. A cached block that no table holds is free and is found by its key all the
same, until it is taken for something else, the one unused for longest first. A table holds with a block all those before it and drops the
last first, so a block is always taken before its parent, and no key ever names a parent that holds other tokens by now.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

BlockTable: TypeAlias = "array[int]"
Write: TypeAlias = "tuple[BlockTable, int, int]"  # of tokens start..end-1 of a table
Salt: TypeAlias = "str | None"
Key: TypeAlias = "tuple[int | Salt, bytes]"  # of a cached block: its parent or salt, and its tokens as int32


def new_table() -> BlockTable:
    return array("i")


class BlockPool:
    """``num_blocks`` reference-counted blocks of ``block_size`` tokens.

    Methods that take a ``table`` change it in place. Nothing is allocated unless everything asked for fits: callers ask
    ``new_blocks`` first and make room (preempt) themselves.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; the cache needs at least one block")
        if block_size < 16 or block_size % 16:
            raise ValueError(f"block_size is {block_size}; it must be a positive multiple of 16")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack whose top is the lowest id: a small working set stays in the same, warm memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks  # of those cached
        self._cached: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and held by no table, the one unused for longest first

    @property
    def num_free(self) -> int:
        """Blocks that no table holds, those that are cached included."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, held or not."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def is_writable(self, table: BlockTable, start: int, end: int) -> bool:
        """Whether tokens ``start..end-1`` have blocks already, all their own and none cached: a write takes nothing of the pool."""
        size, references, keys = self.block_size, self._references, self._keys
        for block in table[start // size : -(-end // size)]:
            if references[block] > 1 or keys[block] is not None:
                return False
        return end <= len(table) * size

    def _shared(self, table: BlockTable, start: int, end: int) -> list[int]:
        """Indices into ``table`` of the blocks that tokens ``start..end-1`` would write into while another table also holds them, or the
        prefix cache."""
        last = min(self.blocks_for(end), len(table))
        places = range(start // self.block_size, last)
        return [i for i in places if self._references[table[i]] > 1 or self._keys[table[i]] is not None]

    def new_blocks(self, writes: Iterable[Write]) -> int:
        """Blocks that must be taken from the pool before all ``writes`` can be made, one after the other."""
        needed = 0
        holders: dict[int, int] = {}  # of shared blocks, after the writes so far: the last table to write needs no copy
        for table, start, end in writes:
            needed += max(0, self.blocks_for(end) - len(table))
            for i in self._shared(table, start, end):
                left = holders.get(table[i], self._references[table[i]])
                if left > 1 or self._keys[table[i]] is not None:
                    holders[table[i]] = left - 1
                    needed += 1
        return needed

    def prepare(self, table: BlockTable, start: int, end: int) -> list[tuple[int, int]]:
        """Make tokens ``start..end-1`` writable; returns the block copies ``(source, destination)`` to carry out before the write.

        Raises ``RuntimeError`` if the pool has too few free blocks; the table is then unchanged.
        """
        needed = self.new_blocks([(table, start, end)])
        if needed > self.num_free:
            raise RuntimeError(f"{needed} blocks are needed and {self.num_free} are free")
        copies = []
        for i in self._shared(table, start, end):
            source, table[i] = table[i], self._take()
            self._drop(source)
            copies.append((source, table[i]))
        while len(table) < self.blocks_for(end):
            table.append(self._take())
        return copies

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks."""
        for block in table:
            self._references[block] += 1
        return table[:]

    def permute(self, tables: list[BlockTable], parents: list[int]) -> list[BlockTable]:
        """Tables of which the i-th continues ``tables[parents[i]]``: shared by several, passed on to one, dropped by none of them.

        The given tables are used up. No block is taken or copied.
        """
        children = Counter(parents)
        for i, table in enumerate(tables):
            if not children[i]:
                self.release(table)
        result = []
        for parent in parents:
            children[parent] -= 1
            result.append(self.fork(tables[parent]) if children[parent] else tables[parent])
        return result

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Drop the blocks past the first ``num_tokens`` tokens."""
        keep = self.blocks_for(num_tokens)
        while len(table) > keep:
            self._drop(table.pop())

    def release(self, table: BlockTable) -> None:
        """Drop every block of a table."""
        self.truncate(table, 0)

    def key(self, table: Sequence[int], tokens: Sequence[int], place: int, salt: Salt) -> Key:
        """The key of the block at ``place`` of a table over ``tokens``, whose earlier blocks are cached."""
        start = place * self.block_size
        return table[place - 1] if place else salt, array("i", tokens[start : start + self.block_size]).tobytes()

    def match(self, tokens: Sequence[int], most: int, salt: Salt) -> BlockTable:
        """The cached blocks that ``tokens`` begin with, ``most`` of them at most; they are not taken."""
        found = new_table()
        while len(found) < most:
            block = self._cached.get(self.key(found, tokens, len(found), salt))
            if block is None:
                break
            found.append(block)
        return found

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of these some table holds."""
        return sum(self._references[block] > 0 for block in blocks)

    def share(self, blocks: BlockTable) -> BlockTable:
        """A table over blocks found by ``match``."""
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
        return self.fork(blocks)

    def cache(self, table: BlockTable, tokens: Sequence[int], start: int, end: int, salt: Salt) -> None:
        """Tokens ``start..end-1`` of a table over ``tokens`` are in the cache now: keep the blocks that they have filled.

        Where such a block is cached already, the table gets that one, and its own is free: the bits are the same.
        """
        for place in range(start // self.block_size, end // self.block_size):
            key, block = self.key(table, tokens, place, salt), table[place]
            known = self._cached.setdefault(key, block)
            if known == block:
                self._keys[block] = key
                continue
            if self._references[known] == 0:
                del self._idle[known]
            self._references[known] += 1
            table[place] = known
            self._drop(block)

    def forget(self) -> None:
        """Empty the prefix cache. No table may hold one of its blocks."""
        assert len(self._idle) == len(self._cached), "a cached block is held"
        self._free = sorted([*self._free, *self._idle], reverse=True)
        self._keys = [None] * self.num_blocks
        self._cached.clear()
        self._idle.clear()

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._cached[key]
            self._keys[block] = None
        self._references[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert every invariant, given all the tables alive: counts match the tables, each block is either free or held, and each cached
        one is found from the root of the trie."""
        held = Counter(block for table in tables for block in table)
        free = {*self._free, *self._idle}
        assert len(free) == self.num_free, "a block is free twice"
        for block, count in enumerate(self._references):
            assert count == held[block], f"block {block} has reference count {count} but {held[block]} tables hold it"
        assert len(free) + len(held) == self.num_blocks, "a block is neither free nor held"
        assert not held.keys() & free, "a held block is free"
        cached = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {key: block for block, key in cached.items()} == self._cached, "keys and blocks of the prefix cache do not match"
        assert cached.keys() - held.keys() == self._idle.keys(), "a free block is cached and not idle, or idle and not cached"
        age = {block: i for i, block in enumerate(self._idle)}
        for block, (parent, tokens) in cached.items():
            assert len(tokens) == 4 * self.block_size, "a cached block is not full"
            if isinstance(parent, int):
                assert parent in cached, "the parent of a cached block is not cached"
                assert age.get(block, -1) < age.get(parent, self.num_blocks), "a block outlives its parent"

    def check_cached(self, table: BlockTable, tokens: Sequence[int], num_computed: int, salt: Salt) -> None:
        """Assert that of a table its full blocks are cached, by their own tokens, and no other."""
        full = num_computed // self.block_size
        for place, block in enumerate(table):
            expected = self.key(table, tokens, place, salt) if place < full else None
            assert self._keys[block] == expected, f"block {block}, at place {place} of {full} full ones, is cached by a wrong key or none"
